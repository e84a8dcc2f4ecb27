"""Emits the nodes and constants that take another node's place, and applies rules that do so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import tensor_dtype_to_np_dtype

from gpu_aware_tune.onnx_prepare.facts import Facts, bodies, opset_of, walk

MOST_PARTS = 16  # that are concatenated at once


class Rewriter:
    """Emits the nodes and constants of a replacement, and knows the graph's facts.

    Args:
        model: whose names the emitted values must not repeat.
        graph: the graph that is rewritten: the model's, or one inside a node.
        facts: what is known about that graph.
        opset: the operator set in which nodes are emitted; the model's by default.
    """

    def __init__(
        self,
        model: ModelProto,
        graph: GraphProto | None = None,
        facts: Facts | None = None,
        opset: int | None = None,
        names: Iterator[str] | None = None,
    ) -> None:
        graph = graph or model.graph
        self.facts = facts or Facts(model)
        self.opset = opset or opset_of(model)
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.producers = {name: node for node in graph.node for name in node.output}
        self.names = names or _fresh_names(model)

    def op(
        self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> str:
        """Emit a node and return its first output; the others are that name plus .1, .2, ..."""
        first = next(self.names)
        names = [first, *(f"{first}.{index}" for index in range(1, outputs))]
        made = onnx.helper.make_node(op_type, list(inputs), names, domain=domain, **attributes)
        self.nodes.append(made)
        return first

    def same(
        self, node: NodeProto, inputs: Sequence[str], values: Mapping[str, Any], op_type: str = ""
    ) -> list[str]:
        """Emit a node with other inputs and attributes, and return all its outputs."""
        first = self.op(
            op_type or node.op_type,
            *inputs,
            outputs=len(node.output),
            domain=node.domain,
            **values,
        )
        return [first, *(f"{first}.{index}" for index in range(1, len(node.output)))]

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Add an initializer and return its name."""
        name = next(self.names)
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def tensor(self, original: TensorProto) -> str:
        """Add a copy of a tensor as an initializer and return its name."""
        copied = TensorProto()
        copied.CopyFrom(original)
        copied.name = next(self.names)
        self.initializers.append(copied)
        return copied.name

    def cast(self, value: str, dtype: Any) -> str:
        """Emit a conversion to a NumPy type."""
        return self.op("Cast", value, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def dtype(self, name: str) -> Any:
        """Return the NumPy type of a value, None where it is not known."""
        found = self.facts.types.get(name)
        return None if not found else tensor_dtype_to_np_dtype(found)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the static shape of a value, None where it has none."""
        return self.facts.shapes.get(name)

    def stack(self, values: Sequence[str], axis: int = 0) -> str:
        """Emit values stacked along a new axis.

        Many in a tree: a kernel that concatenates compares each place with the start of each part.
        """
        parts = [self.op("Unsqueeze", value, self.constant([axis])) for value in values]
        while len(parts) > 1:
            groups = [parts[at : at + MOST_PARTS] for at in range(0, len(parts), MOST_PARTS)]
            parts = [
                self.op("Concat", *group, axis=axis) if len(group) > 1 else group[0]
                for group in groups
            ]
        return parts[0]

    def reduce(self, kind: str, value: str, axes: Sequence[int]) -> str:
        """Emit a reduction that keeps its dimensions, in the form this operator set has."""
        if self.opset >= 18 or kind == "ReduceSum":
            return self.op(kind, value, self.constant(list(axes)), keepdims=1)
        return self.op(kind, value, axes=list(axes), keepdims=1)


Rule = Callable[[NodeProto, Rewriter], list[str] | None]
"""Emits what computes a node's outputs and returns their names; None leaves the node alone."""


def operator_name(node: NodeProto) -> str:
    """Return the name by which rules are looked up: with its domain unless it is ONNX's own."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def apply_rules(model: ModelProto, rules: Mapping[str, Rule], opset: int | None = None) -> bool:
    """Replace nodes by what the rules emit, in the graphs inside nodes too; tell whether any was.

    Args:
        model: changed in place.
        rules: by operator name, see `operator_name`.
        opset: the operator set in which the rules emit nodes; the model's by default.
    """
    if not any(operator_name(node) in rules for node in walk(model.graph)):
        return False
    return _rewrite(model, model.graph, Rewriter(model, opset=opset), rules)


def _rewrite(model: ModelProto, graph: GraphProto, to: Rewriter, rules: Mapping[str, Rule]) -> bool:
    changed = False
    nodes: list[NodeProto] = []
    for node in graph.node:
        for body in bodies(node):
            if any(operator_name(inner) in rules for inner in walk(body)):
                facts = to.facts.inside(model, body)
                inside = Rewriter(model, body, facts, to.opset, to.names)
                changed |= _rewrite(model, body, inside, rules)
        rule = rules.get(operator_name(node))
        known = len(to.initializers)
        outputs = rule(node, to) if rule else None
        emitted = [*to.nodes]
        to.nodes.clear()
        is_unknown = any(name and not to.facts.types.get(name) for name in node.output)
        if outputs is None:
            nodes.append(node)
            if is_unknown:
                to.facts.learn([node], model.opset_import)
            continue
        changed = True
        for made, wanted in zip(outputs, node.output, strict=False):
            if wanted:
                emitted.append(onnx.helper.make_node("Identity", [made], [wanted]))
        if is_unknown:
            to.facts.learn(emitted, model.opset_import, to.initializers[known:])
        for number, each in enumerate(emitted):  # messages then lead to the user's node
            each.name = each.name or f"{node.name or node.output[0]}/{each.op_type}_{number}"
        nodes.extend(emitted)
    if changed:
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(to.initializers)
    return changed


def _fresh_names(model: ModelProto) -> Iterator[str]:
    taken = {name for node in walk(model.graph) for name in (*node.input, *node.output)}
    prefix = "expanded"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    return (f"{prefix}{number}" for number in itertools.count(1))
