"""Makes activations of signed bytes unsigned ones, which the processors' instructions for products take.

A byte that is rounded to and converted back at once means the same with 128 added to it and to its zero
point. What is between two such nodes is only stored, or compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from gpu_aware_tune.onnx_prepare.facts import Facts, bodies, input_of, walk

_SIGNED = 128
# Operators that store values elsewhere, or choose among them by their order.
_CARRIED = {
    "Flatten",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
_PLACE_OF_ZERO = 2


def to_unsigned(model: ModelProto) -> ModelProto:
    """Make values unsigned that come from QuantizeLinear and that only DequantizeLinear computes with."""
    graph = model.graph
    made = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    if not made:
        return model
    facts = Facts(model)
    fixed = {value.name for value in graph.output}
    inner = (each for node in graph.node for body in bodies(node) for each in walk(body))
    fixed |= {name for each in inner for name in each.input}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    zeros: dict[int, str] = {}
    for node in made:
        group = _group(node, readers, fixed)
        points = [_zero_point(each, facts) for each in group]
        if any(point is None for point in points):
            continue
        for each, point in zip(group, points, strict=True):
            moved = int(point or 0) + _SIGNED
            if moved not in zeros:
                zeros[moved] = f"{node.output[0]}/unsigned_zero_{moved}"
                tensor = numpy_helper.from_array(np.array(moved, np.uint8), zeros[moved])
                graph.initializer.append(tensor)
            each.input[_PLACE_OF_ZERO] = zeros[moved]
    return model


def _group(
    made: NodeProto, readers: Mapping[str, list[NodeProto]], fixed: Collection[str]
) -> list[NodeProto]:
    """A node that quantises, with all that convert its values back; nothing where others read them."""
    found, wanted = [made], [made.output[0]]
    while wanted:
        name = wanted.pop()
        if name in fixed:
            return []
        for reader in readers.get(name, []):
            if reader.op_type == "DequantizeLinear" and reader.input[0] == name:
                found.append(reader)
            elif reader.op_type in _CARRIED and list(reader.input).count(name) == 1:
                if reader.input[0] != name or len(reader.output) > 1:
                    return []
                wanted.append(reader.output[0])
            else:
                return []
    return found


def _zero_point(node: NodeProto, facts: Facts) -> int | None:
    """The one zero point, a signed byte, of a node; None for anything else."""
    kinds = {attribute.name for attribute in node.attribute} - {"axis", "saturate"}
    name = input_of(node, _PLACE_OF_ZERO)
    value = facts.constant(name) if name and not kinds else None
    if value is None or value.dtype != np.int8 or value.size != 1:
        return None
    scale = facts.shapes.get(node.input[1])
    return int(value.reshape(())) if scale in ((), (1,)) else None
