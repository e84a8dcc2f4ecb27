"""Rules that unroll a Loop or Scan whose length is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, numpy_helper

from gpu_aware_tune.onnx_prepare.facts import Facts, attributes, input_of, walk
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule

UNROLLED_NODES = 20_000  # importing more takes minutes
PASSING = ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape")  # they keep a condition


def loop(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: unroll a Loop that always makes the same number of iterations.

    Inputs are the trip count, the condition and the initial values; the body takes the iteration,
    the condition and the values, and returns the condition, the next values and what is stacked.
    """
    body = attributes(node)["body"]
    trips = _trips(node, to.facts)
    carried = len(node.input) - 2
    if trips is None or trips * _size(body) > UNROLLED_NODES:
        return None
    stacked: list[list[str]] = [[] for _ in body.output[1 + carried :]]
    if not trips and stacked:
        return None  # empty outputs of a shape that nothing says
    copier = _Copier(body, to)
    values = list(node.input[2:])
    true = to.constant(True, np.bool_)
    for trip in range(trips):
        _, *made = copier.emit([to.constant(trip), true, *values])
        values = made[:carried]
        for parts, part in zip(stacked, made[carried:], strict=True):
            parts.append(part)
    return [*values, *(to.stack(parts) for parts in stacked)]


def _trips(node: NodeProto, facts: Facts) -> int | None:
    """The number of iterations, None where it depends on values."""
    count = facts.constant(node.input[0]) if node.input[0] else None
    first = facts.constant(node.input[1]) if input_of(node, 1) else np.array(True)
    if first is not None and not first.all():
        return 0
    if count is None or first is None or not _stays_true(attributes(node)["body"], facts):
        return None
    return max(int(count.reshape(())), 0)


def _stays_true(body: GraphProto, facts: Facts) -> bool:
    """Tell whether the condition that a body returns is true whenever the one it took is."""
    name = body.output[0].name
    producers = {output: node for node in body.node for output in node.output}
    tensors = {tensor.name: tensor for tensor in body.initializer}
    while name != body.input[1].name:
        node = producers.get(name)
        if node is None and name in tensors:
            return bool(numpy_helper.to_array(tensors[name]).all())
        if node is None:
            known = facts.constant(name)
            return known is not None and bool(known.all())
        if node.op_type == "Constant":
            tensor = attributes(node).get("value")
            return tensor is not None and bool(numpy_helper.to_array(tensor).all())
        if node.op_type not in PASSING:
            return False
        name = node.input[0]
    return True


def scan(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: unroll a Scan over inputs of static length.

    Inputs are the initial states, then the sequences; the body takes states and elements, and
    returns the next states and elements of the outputs.
    """
    values = attributes(node)
    body, count = values["body"], values["num_scan_inputs"]
    if len(node.input) != len(body.input):
        return None  # of operator set 8: it had a batch, and lengths of the sequences
    states, sequences = list(node.input[:-count]), list(node.input[-count:])
    axes = values.get("scan_input_axes", [0] * count)
    shapes = [to.shape(name) for name in sequences]
    lengths = {shape[axis] for shape, axis in zip(shapes, axes, strict=True) if shape}
    if None in shapes or len(lengths) != 1:
        return None
    (length,) = lengths
    outputs = len(body.output) - len(states)
    if length * _size(body) > UNROLLED_NODES or (not length and outputs):
        return None
    directions = values.get("scan_input_directions", [0] * count)
    stacked: list[list[str]] = [[] for _ in range(outputs)]
    copier = _Copier(body, to)
    places = [to.constant(place) for place in range(length)]
    for step in range(length):
        elements = [
            to.op("Gather", name, places[length - 1 - step if backwards else step], axis=axis)
            for name, axis, backwards in zip(sequences, axes, directions, strict=True)
        ]
        made = copier.emit([*states, *elements])
        kept = len(states)
        states = made[:kept]
        for parts, part in zip(stacked, made[kept:], strict=True):
            parts.append(part)
    out_axes = values.get("scan_output_axes", [0] * outputs)
    backwards = values.get("scan_output_directions", [0] * outputs)
    results = [
        to.stack(parts[::-1] if backward else parts, axis)
        for parts, axis, backward in zip(stacked, out_axes, backwards, strict=True)
    ]
    return [*states, *results]


def _size(body: GraphProto) -> int:
    return sum(1 for _ in walk(body)) + len(body.output)


class _Copier:
    """Emits copies of a body, each with names of its own; its constants are shared."""

    def __init__(self, body: GraphProto, to: Rewriter) -> None:
        self.body, self.to = body, to
        self.shared: dict[str, str] = {}
        for tensor in body.initializer:
            self.shared[tensor.name] = to.tensor(tensor)

    def emit(self, inputs: Sequence[str]) -> list[str]:
        """Emit one iteration and return the names of its outputs."""
        names = dict(self.shared)
        names |= {value.name: name for value, name in zip(self.body.input, inputs, strict=True)}
        for original in self.body.node:
            names |= {output: next(self.to.names) for output in original.output if output}
            node = NodeProto()
            node.CopyFrom(original)
            node.name = ""
            _rename(node, names)
            self.to.nodes.append(node)
        return [names.get(value.name, value.name) for value in self.body.output]


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """Rename what a node reads and makes; graphs inside it may hide names of the outside."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            inner = attribute.g
            own = {name for each in inner.node for name in each.output}
            own |= {value.name for value in (*inner.input, *inner.initializer)}
            outside = {key: name for key, name in names.items() if key not in own}
            for each in inner.node:
                _rename(each, outside)
            for value in inner.output:
                value.name = outside.get(value.name, value.name)


def loop_reason(node: NodeProto, facts: Facts) -> str:
    """Say why a Loop or Scan was not unrolled."""
    if node.op_type == "Loop" and _trips(node, facts) is None:
        return "it is not known how often it runs; export it with a constant trip count"
    if node.op_type == "Scan" and len(node.input) != len(attributes(node)["body"].input):
        return "it has the form of operator set 8; export it with 9 or newer"
    return f"its length must be static and at least 1, its copies at most {UNROLLED_NODES} nodes"


LOOPS: dict[str, Rule] = {"Loop": loop, "Scan": scan}
"""Rules by operator name, see `rewriter.operator_name`."""
