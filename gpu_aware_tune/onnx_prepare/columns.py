"""Rules for operators that move patches of images: Col2Im and DeformConv."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule

KERNEL_ELEMENTS = 1 << 24  # of the filters that Col2Im becomes


def col2im(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: a transposed convolution whose filters put each row of a block in its place.

    (N, C * block, places) to (N, C, image).
    """
    values = attributes(node)
    data, dtype = to.shape(node.input[0]), to.dtype(node.input[0])
    image, block = (to.facts.constant(node.input[at]) for at in (1, 2))
    if data is None or dtype is None or image is None or block is None:
        return None
    rank, taps = len(image), int(np.prod(block))
    strides, dilations = (values.get(key, [1] * rank) for key in ("strides", "dilations"))
    pads = values.get("pads", [0] * (2 * rank))
    reach = [int(d * (b - 1) + 1) for d, b in zip(dilations, block, strict=True)]
    grid, extra = [], []
    for axis in range(rank):
        room = int(image[axis]) + pads[axis] + pads[axis + rank] - reach[axis]
        grid.append(room // strides[axis] + 1)
        extra.append(room % strides[axis])
    channels = data[1] // taps
    if math.prod(grid) != data[2] or channels * taps * taps > KERNEL_ELEMENTS:
        return None
    # One group a channel: its `taps` rows are filters with a single one, each at its own tap.
    filters = np.concatenate([np.eye(taps)] * channels).reshape(-1, 1, *map(int, block))
    rows = to.op("Reshape", node.input[0], to.constant([data[0], data[1], *grid]))
    return [
        to.op(
            "ConvTranspose",
            rows,
            to.constant(filters, dtype),
            group=channels,
            strides=list(strides),
            dilations=list(dilations),
            pads=list(pads),
            output_padding=extra,
        )
    ]


def deform_conv(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: samples at the displaced taps, by bilinear interpolation, and a product with the filters.

    What lies outside the image is zero.
    """
    values = attributes(node)
    data, weight, offset = (to.shape(name) for name in node.input[:3])
    dtype = to.dtype(node.input[0])
    if data is None or weight is None or offset is None or dtype is None or len(data) != 4:
        return None
    batch, channels, height, width = data
    filters, _, rows, columns = weight
    groups, own = values.get("group", 1), values.get("offset_group", 1)
    strides, dilations = (values.get(key, [1, 1]) for key in ("strides", "dilations"))
    pads = values.get("pads", [0, 0, 0, 0])
    taps, outputs = rows * columns, offset[2:]
    steps = (strides, dilations, pads)
    moved = to.op("Reshape", node.input[2], to.constant([batch, own, taps, 2, *outputs]))
    places = []
    for axis, kernel in enumerate((rows, columns)):
        rest = _tap_places(axis, kernel, (rows, columns), outputs, steps)
        by = to.op("Gather", moved, to.constant(axis), axis=3)
        places.append(to.op("Add", by, to.constant(rest, dtype)))
    image = to.op(
        "Reshape", node.input[0], to.constant([batch, own, channels // own, height * width])
    )
    sizes = (batch, own, channels // own, taps * math.prod(outputs))
    sampled = _bilinear(image, places, (height, width), sizes, dtype, to)
    mask = input_of(node, 4)
    if mask:
        weighed = to.op("Reshape", mask, to.constant([batch, own, 1, sizes[3]]))
        sampled = to.op("Mul", sampled, weighed)
    terms = channels // groups * taps
    patches = to.op("Reshape", sampled, to.constant([batch, groups, terms, math.prod(outputs)]))
    matrix = to.op("Reshape", node.input[1], to.constant([1, groups, filters // groups, terms]))
    result = to.op("MatMul", matrix, patches)
    result = to.op("Reshape", result, to.constant([batch, filters, *outputs]))
    if input_of(node, 3):
        bias = to.op("Reshape", node.input[3], to.constant([1, filters, 1, 1]))
        result = to.op("Add", result, bias)
    return [result]


def _tap_places(
    axis: int,
    kernel: int,
    kernels: Sequence[int],
    outputs: Sequence[int],
    steps: tuple[Sequence[int], Sequence[int], Sequence[int]],
) -> np.ndarray:
    """Where each tap of each output lies along an axis before it is displaced: (1, 1, taps, H, W)."""
    strides, dilations, pads = steps
    taps = np.broadcast_to(
        (np.arange(kernel) * dilations[axis]).reshape([-1, 1] if axis == 0 else [1, -1]), kernels
    ).reshape(1, 1, -1, 1, 1)
    start = np.arange(outputs[axis]) * strides[axis] - pads[axis]
    return taps + start.reshape([1, 1, 1, -1, 1] if axis == 0 else [1, 1, 1, 1, -1])


def _bilinear(
    image: str,
    places: Sequence[str],
    extents: tuple[int, int],
    sizes: tuple[int, int, int, int],
    dtype: Any,
    to: Rewriter,
) -> str:
    """Values of an image (N, G, C, H * W) at P places (N, G, ...), as (N, G, C, P), which is `sizes`."""
    one_row, whole_shape = to.constant([*sizes[:2], 1, sizes[3]]), to.constant(sizes)
    lower = [to.op("Floor", place) for place in places]
    beyond = [to.op("Sub", place, low) for place, low in zip(places, lower, strict=True)]
    one, zero = to.constant(1, dtype), to.constant(0, dtype)
    total = ""
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight, index = "", ""
        for axis, upper in enumerate(corner):
            at = to.op("Add", lower[axis], one) if upper else lower[axis]
            part = beyond[axis] if upper else to.op("Sub", one, beyond[axis])
            last = to.constant(extents[axis] - 1, dtype)
            # Comparisons, not limits: a place that is NaN must not become an index.
            inside = to.op("And", to.op("GreaterOrEqual", at, zero), to.op("LessOrEqual", at, last))
            part = to.op("Where", inside, part, zero)
            whole = to.cast(to.op("Where", inside, at, zero), np.int64)
            if axis == 0:
                weight, index = part, to.op("Mul", whole, to.constant(extents[1]))
            else:
                weight, index = to.op("Mul", weight, part), to.op("Add", index, whole)
        index = to.op("Expand", to.op("Reshape", index, one_row), whole_shape)
        value = to.op("GatherElements", image, index, axis=3)
        value = to.op("Mul", value, to.op("Reshape", weight, one_row))
        total = to.op("Add", total, value) if total else value
    return total


COLUMNS: dict[str, Rule] = {"Col2Im": col2im, "DeformConv": deform_conv}
