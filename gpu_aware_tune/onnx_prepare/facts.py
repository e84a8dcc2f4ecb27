"""What is known about an ONNX graph without running it: types, static shapes, constants."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
    ValueInfoProto,
    numpy_helper,
)

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FLOATS = (*HALF, TensorProto.FLOAT, TensorProto.DOUBLE)


class Facts:
    """What is known about the values of a graph: types, static shapes, constants."""

    def __init__(self, model: ModelProto) -> None:
        graph = infer_shapes(model).graph
        self.opset = opset_of(model)
        self._outer: Facts | None = None
        self.types: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.constants: dict[str, np.ndarray] = {}
        for tensor in graph.initializer:
            self.types[tensor.name] = tensor.data_type
            self.shapes[tensor.name] = tuple(tensor.dims)
        self._read((*graph.input, *graph.value_info, *graph.output))

    def _read(self, values: Iterable[ValueInfoProto]) -> None:
        for value in values:
            if value.type.WhichOneof("value") != "tensor_type":
                continue
            tensor_type = value.type.tensor_type
            self.types[value.name] = tensor_type.elem_type
            dims = tensor_type.shape.dim
            if tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
                self.shapes[value.name] = tuple(d.dim_value for d in dims)

    def learn(
        self,
        nodes: Sequence[NodeProto],
        opsets: Sequence[OperatorSetIdProto],
        tensors: Sequence[TensorProto] = (),
    ) -> None:
        """Infer the outputs of nodes where the inference of the whole graph did not get there.

        That is so behind operators of other domains, of which it knows nothing.

        Args:
            nodes: in order, or none of them where their outputs are known.
            opsets: of the model.
            tensors: constants that the nodes read and the graph does not have yet.
        """
        own = {name for node in nodes for name in node.output} | {t.name for t in tensors}
        read = {name for node in nodes for name in node.input if name} - own
        if not read <= self.types.keys():
            return
        constants = [self._tensors[name] for name in read if name in self._tensors]
        inputs = [
            onnx.helper.make_tensor_value_info(name, self.types[name], self.shapes.get(name))
            for name in sorted(read - self._tensors.keys())
        ]
        results = [ValueInfoProto(name=name) for name in own]
        graph = onnx.helper.make_graph(nodes, "part", inputs, results, [*constants, *tensors])
        inferred = infer_shapes(onnx.helper.make_model(graph, opset_imports=opsets)).graph
        self._tensors.update({tensor.name: tensor for tensor in tensors})
        for tensor in tensors:
            self.types[tensor.name] = tensor.data_type
            self.shapes[tensor.name] = tuple(tensor.dims)
        self._read(value for value in inferred.output if value.type.tensor_type.elem_type)

    def constant(self, name: str) -> np.ndarray | None:
        """Return the value of a constant, None for anything else."""
        if name not in self.constants and name in self._tensors:
            self.constants[name] = numpy_helper.to_array(self._tensors[name])
        if name not in self.constants and self._outer is not None:
            return self._outer.constant(name)
        return self.constants.get(name)

    def is_half(self, name: str) -> bool:
        """Tell whether a value is float16 or bfloat16."""
        return self.types.get(name) in HALF

    def inside(self, model: ModelProto, body: GraphProto) -> Facts:
        """Return the facts of a graph inside one of the nodes, which sees the values outside."""
        own = {name for node in body.node for name in node.output}
        own |= {value.name for value in (*body.input, *body.initializer)}
        alone = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        alone.graph.CopyFrom(body)
        alone.graph.input.extend(
            onnx.helper.make_tensor_value_info(name, dtype, self.shapes.get(name))
            for name, dtype in self.types.items()
            if name not in own
        )
        facts = Facts(alone)
        facts._outer = self
        return facts


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def input_of(node: NodeProto, index: int) -> str:
    """Return the name of a node's input, "" where it is left out."""
    return node.input[index] if index < len(node.input) else ""


def opset_of(model: ModelProto) -> int:
    """Return the version of the standard operator set that a model imports."""
    return next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 1)


def infer_shapes(model: ModelProto) -> ModelProto:
    """Return the model with inferred types and shapes, or as it is where inference fails."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # an invalid graph is reported where it is imported
        return model


def uses_types(model: ModelProto, types: Collection[int]) -> bool:
    """Tell whether any tensor of the model has one of these element types."""
    found = set(Facts(model).types.values())
    return bool(found & set(types))


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs inside a node: the branches of an If, the body of a Loop."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def walk(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from walk(body)
