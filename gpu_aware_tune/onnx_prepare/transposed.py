"""Rule for transposed convolutions: as convolutions that compute each phase of the strides apart.

TVM puts zeros between the elements of the input and convolves that: with strides of two, three of four
products are with zeros. An output at `stride * place + phase` takes every `stride`-th tap only, so that
a convolution of the input as it is, with the taps of each phase as filters of their own, computes the
same (sub-pixel convolution: Shi et al., arXiv 1609.07009); the phases are then put side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter


def conv_transpose(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: padding made explicit, and strides made phases."""
    explicit = _explicit(node, to)
    phases = _in_phases(node, to, attributes(node) if explicit is None else explicit)
    if phases is not None or explicit is None:
        return phases
    return [to.op("ConvTranspose", *node.input, **explicit)]


def _explicit(node: NodeProto, to: Rewriter) -> dict[str, Any] | None:
    """The attributes with `output_shape` as padding; None where there is none, or it cannot be."""
    values = attributes(node)
    data, kernel = to.shape(node.input[0]), to.shape(node.input[1])
    if "output_shape" not in values or data is None or kernel is None:
        return None
    rank = len(data) - 2
    strides = values.get("strides", [1] * rank)
    dilations = values.get("dilations", [1] * rank)
    extra = values.get("output_padding", [0] * rank)
    begin, end, more = [], [], []
    for axis, wanted in enumerate(values["output_shape"][-rank:]):
        reach = (kernel[2 + axis] - 1) * dilations[axis] + 1
        total = strides[axis] * (data[2 + axis] - 1) + extra[axis] + reach - wanted
        more.append(extra[axis] + max(0, -total))  # larger than the strides give: pad the output
        total = max(total, 0)
        small, large = total // 2, total - total // 2
        upper = values.get("auto_pad", b"NOTSET") == b"SAME_UPPER"
        begin.append(small if upper else large)
        end.append(large if upper else small)
    if any(padding >= max(s, d) for padding, s, d in zip(more, strides, dilations, strict=True)):
        return None
    kept = {k: v for k, v in values.items() if k not in ("output_shape", "auto_pad", "pads")}
    return {**kept, "output_padding": more, "pads": begin + end}


def _in_phases(node: NodeProto, to: Rewriter, values: Mapping[str, Any]) -> list[str] | None:
    data = to.shape(node.input[0])
    weight, bias = to.shape(node.input[1]), input_of(node, 2)
    if data is None or weight is None or "output_shape" in values:
        return None
    rank = len(data) - 2
    strides = list(values.get("strides", [1] * rank))
    if (
        values.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"")
        or any(step != 1 for step in values.get("dilations", [1] * rank))
        or math.prod(strides) == 1
        or (bias and to.shape(bias) is None)
    ):
        return None
    pads = values.get("pads", [0] * (2 * rank))
    extra = values.get("output_padding", [0] * rank)
    kernel, outputs, groups = weight[2:], weight[1], values.get("group", 1)
    taps = [-(-kernel[axis] // strides[axis]) for axis in range(rank)]
    left, right, starts, sizes = [], [], [], []
    for axis in range(rank):
        size, step = data[2 + axis], strides[axis]
        wanted = step * (size - 1) + extra[axis] + kernel[axis] - pads[axis] - pads[axis + rank]
        first, last = pads[axis] // step, (pads[axis] + wanted - 1) // step
        left.append(max(0, taps[axis] - 1 - first))
        right.append(max(0, last - size + 1))
        starts.append(pads[axis] - step * (taps[axis] - 1 - left[-1]))
        sizes.append(wanted)
    inputs = [node.input[0], _filters(node, to, groups, strides, taps)]
    if bias:
        inputs.append(_biases(node, to, groups, math.prod(strides)))
    phases = to.op("Conv", *inputs, group=groups, pads=left + right)
    grid = [data[2 + axis] + left[axis] + right[axis] - taps[axis] + 1 for axis in range(rank)]
    image = _side_by_side(phases, to, (data[0], groups, outputs), strides, grid)
    whole = [count * step for count, step in zip(grid, strides, strict=True)]
    if whole == sizes:
        return [image]
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    axes = to.constant([2 + axis for axis in range(rank)])
    return [to.op("Slice", image, to.constant(starts), to.constant(ends), axes)]


def _side_by_side(
    phases: str,
    to: Rewriter,
    channels: tuple[int, int, int],
    strides: Sequence[int],
    grid: Sequence[int],
) -> str:
    """The phases in their places: images, groups and channels of each, and the places of a phase."""
    images, groups, outputs = channels
    rank = len(strides)
    if rank == 2 and groups == 1 and strides[0] == strides[1]:
        return to.op("DepthToSpace", phases, blocksize=strides[0])
    split = to.op("Reshape", phases, to.constant([images, groups, *strides, outputs, *grid]))
    order = [at for axis in range(rank) for at in (3 + rank + axis, 2 + axis)]
    beside = to.op("Transpose", split, perm=[0, 1, 2 + rank, *order])
    whole = [count * step for count, step in zip(grid, strides, strict=True)]
    return to.op("Reshape", beside, to.constant([images, groups * outputs, *whole]))


def _filters(
    node: NodeProto, to: Rewriter, groups: int, strides: Sequence[int], taps: Sequence[int]
) -> str:
    """(inputs, outputs / groups, *kernel) to (groups * phases * outputs, inputs / groups, *taps).

    All channels of a phase side by side: blocks of channels stay whole where the phases are put in
    their places. As nodes, which are folded with the import: large weights are no constants here.
    """
    rank = len(strides)
    inputs, outputs, *kernel = to.shape(node.input[1]) or []
    filters = node.input[1]
    missing = [step * count - size for step, count, size in zip(strides, taps, kernel, strict=True)]
    if any(missing):
        filters = to.op("Pad", filters, to.constant([0] * (rank + 4) + missing))
    pairs = [extent for pair in zip(taps, strides, strict=True) for extent in pair]
    filters = to.op("Reshape", filters, to.constant([groups, inputs // groups, outputs, *pairs]))
    for axis, count in enumerate(taps):
        if count > 1:
            backwards = to.constant([*range(count - 1, -1, -1)])
            filters = to.op("Gather", filters, backwards, axis=3 + 2 * axis)
    phases = [4 + 2 * axis for axis in range(rank)]
    order = [0, *phases, 2, 1, *(3 + 2 * axis for axis in range(rank))]
    filters = to.op("Transpose", filters, perm=order)
    shape = [groups * outputs * math.prod(strides), inputs // groups, *taps]
    return to.op("Reshape", filters, to.constant(shape))


def _biases(node: NodeProto, to: Rewriter, groups: int, phases: int) -> str:
    """(groups * outputs) to (groups * phases * outputs)."""
    (count,) = to.shape(node.input[2]) or (0,)
    each = to.op("Reshape", node.input[2], to.constant([groups, 1, count // groups]))
    every = to.op("Expand", each, to.constant([groups, phases, count // groups]))
    return to.op("Reshape", every, to.constant([-1]))
