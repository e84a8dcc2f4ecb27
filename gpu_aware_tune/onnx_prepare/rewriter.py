"""Emits the nodes and constants that take another node's place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import tensor_dtype_to_np_dtype

from gpu_aware_tune.onnx_prepare.facts import Facts, opset_of


class Rewriter:
    """Emits the nodes and constants of a replacement, and knows the graph's facts."""

    def __init__(self, model: ModelProto) -> None:
        self.facts = Facts(model)
        self.opset = opset_of(model)
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.producers = {name: node for node in model.graph.node for name in node.output}
        taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self._prefix = "expanded"
        while any(name.startswith(self._prefix) for name in taken):
            self._prefix += "_"
        self._count = 0

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Emit a node and return its first output; the others are that name plus .1, .2, ..."""
        self._count += 1
        first = f"{self._prefix}{self._count}"
        names = [first, *(f"{first}.{index}" for index in range(1, outputs))]
        self.nodes.append(onnx.helper.make_node(op_type, list(inputs), names, **attributes))
        return first

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Add an initializer and return its name."""
        self._count += 1
        name = f"{self._prefix}{self._count}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def dtype(self, name: str) -> Any:
        """Return the NumPy type of a value, None where it is not known."""
        found = self.facts.types.get(name)
        return None if not found else tensor_dtype_to_np_dtype(found)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the static shape of a value, None where it has none."""
        return self.facts.shapes.get(name)

    def reduce(self, kind: str, value: str, axes: Sequence[int]) -> str:
        """Emit a reduction that keeps its dimensions, in the form this operator set has."""
        if self.opset >= 18 or kind == "ReduceSum":
            return self.op(kind, value, self.constant(list(axes)), keepdims=1)
        return self.op(kind, value, axes=list(axes), keepdims=1)
