"""Which integer inputs of an ONNX graph index something, and how many elements it has."""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from gpu_aware_tune.onnx_prepare.facts import Facts, attributes

# Operators whose first output holds the integers of their first input.
_PASSING = {"Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Expand",
            "Slice", "Split", "Concat"}  # fmt: skip


def index_bounds(model: ModelProto) -> dict[str, int]:
    """Return how many elements each input indexes, by name; inputs that index nothing are left out.

    An index is followed through operators that only move or cast it. Where it indexes several
    things, the smallest counts.

    Args:
        model: with static inputs.
    """
    facts = Facts(model)
    readers: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, position))
    bounds: dict[str, int] = {}
    for value in model.graph.input:
        found = _bound(value.name, readers, facts)
        if found is not None:
            bounds[value.name] = found
    return bounds


def _bound(name: str, readers: dict[str, list[tuple[NodeProto, int]]], facts: Facts) -> int | None:
    bounds: list[int] = []
    waiting, seen = [name], {name}
    while waiting:
        for node, position in readers.get(waiting.pop(), ()):
            if node.op_type in _PASSING and (position == 0 or node.op_type == "Concat"):
                fresh = [output for output in node.output if output and output not in seen]
                seen.update(fresh)
                waiting += fresh
            else:
                bounds += _indexed(node, position, facts)
    return min(bounds, default=None)


def _indexed(node: NodeProto, position: int, facts: Facts) -> list[int]:
    """The extent that an input of a node indexes, if it does."""
    values = attributes(node)
    shape = facts.shapes.get(node.input[0])
    if node.op_type in ("Gather", "GatherElements", "ScatterElements", "Scatter") and position == 1:
        return [shape[int(values.get("axis", 0))]] if shape else []
    if node.op_type in ("GatherND", "ScatterND") and position == 1:
        return [min(shape)] if shape else []
    if node.op_type == "OneHot" and position == 0:
        depth = facts.constant(node.input[1])
        return [] if depth is None else [int(depth.reshape(-1)[0])]
    if node.op_type == "EmbedLayerNormalization" and position < 2:
        table = facts.shapes.get(node.input[2 if position == 0 else 4])
        return [table[0]] if table else []
    return []
