"""Rules for pools that also say where their maxima are, and for their inverse."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.half import is_half
from gpu_aware_tune.onnx_prepare.padding import explicit_padding, full_windows
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter

WINDOW_ELEMENTS = 64  # larger windows would become too many nodes


def max_pool(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: compare the elements of each window one after another where indices are wanted.

    An index counts through the whole tensor, by rows, or by columns with `storage_order` 1.
    """
    if (explicit := explicit_padding(node, to)) is not None:
        return explicit
    values = attributes(node)
    data, dtype, outputs = (
        to.shape(node.input[0]),
        to.dtype(node.input[0]),
        to.shape(node.output[0]),
    )
    if len(node.output) < 2 or data is None or outputs is None or dtype is None:
        return None
    kernel = values["kernel_shape"]
    if np.prod(kernel) > WINDOW_ELEMENTS:
        return None
    rank = len(kernel)
    strides, dilations = (values.get(key, [1] * rank) for key in ("strides", "dilations"))
    pads = full_windows(data[2:], values)
    padded = _padded(node.input[0], pads, dtype, to)
    steps = np.cumprod([1, *data[2:][::-1]])[:-1][::-1]  # of an index, along each axis
    if values.get("storage_order", 0):
        steps = np.cumprod([1, *data[2:]])[:-1]
    best, place = "", ""
    for window in itertools.product(*map(range, kernel)):
        first = [position * apart for position, apart in zip(window, dilations, strict=True)]
        ends = [f + (o - 1) * s + 1 for f, o, s in zip(first, outputs[2:], strides, strict=True)]
        bounds = (to.constant(part) for part in (first, ends, range(2, rank + 2), strides))
        element = to.op("Slice", padded, *bounds)
        offset = to.constant(int(np.dot(first, steps)))
        if not best:
            best, place = element, offset
            continue
        larger = to.op("Greater", element, best)
        best = to.op("Where", larger, element, best)
        place = to.op("Where", larger, offset, place)
    start = _window_starts(data, outputs, strides, pads, steps)
    return [best, to.op("Add", to.constant(start), place)]


def _padded(value: str, pads: Sequence[int], dtype: Any, to: Rewriter) -> str:
    if not any(pads):
        return value
    rank = len(pads) // 2
    is_float = is_half(dtype) or np.issubdtype(dtype, np.floating)
    lowest = -np.inf if is_float else np.iinfo(dtype).min
    around = [0, 0, *pads[:rank], 0, 0, *pads[rank:]]
    return to.op("Pad", value, to.constant(around), to.constant(lowest, dtype))


def _window_starts(
    data: Sequence[int],
    outputs: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    steps: np.ndarray,
) -> np.ndarray:
    """Return the index of each window's first element, (N, C, outputs...)."""
    plane = int(np.prod(data[2:]))
    start = np.arange(data[0] * data[1]).reshape(data[0], data[1], *[1] * len(steps)) * plane
    for axis, extent in enumerate(outputs[2:]):
        along = [1] * len(outputs)
        along[2 + axis] = extent
        places = (np.arange(extent) * strides[axis] - pads[axis]) * steps[axis]
        start = start + places.reshape(along)
    return start


def max_unpool(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: scatter the values into zeros; the indices count through the whole output."""
    values = attributes(node)
    data, dtype = to.shape(node.input[0]), to.dtype(node.input[0])
    if data is None or dtype is None:
        return None
    kernel = values["kernel_shape"]
    rank = len(kernel)
    strides, pads = values.get("strides", [1] * rank), values.get("pads", [0] * (2 * rank))
    shape = [*data[:2]]
    for axis, extent in enumerate(data[2:]):
        padding = pads[axis] + pads[axis + rank]
        shape.append((extent - 1) * strides[axis] + kernel[axis] - padding)
    if input_of(node, 2):
        wanted = to.facts.constant(node.input[2])
        if wanted is None:
            return None
        shape = [int(extent) for extent in wanted]
    zeros = to.op("Expand", to.constant(0, dtype), to.constant([int(np.prod(shape))]))
    flat = [to.op("Reshape", name, to.constant([-1])) for name in node.input[:2]]
    filled = to.op("ScatterElements", zeros, flat[1], flat[0], axis=0)
    return [to.op("Reshape", filled, to.constant(shape))]


def top_k(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: without an order, the sorted one is as good as any."""
    values = attributes(node)
    if values.pop("sorted", 1):
        return None
    return to.same(node, node.input, values)
