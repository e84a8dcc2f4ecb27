"""States the padding of convolutions and pools in numbers, where ONNX has it computed.

TVM's importer copies the padded input for a convolution, and gets the outputs of pools wrong where
the stride does not divide the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter


def explicit_padding(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: replace `auto_pad` by `pads`, for Conv, MaxPool, AveragePool and LpPool."""
    values = attributes(node)
    mode = values.pop("auto_pad", b"NOTSET")
    data = to.shape(node.input[0])
    kernel = values.get("kernel_shape")
    if kernel is None and node.op_type == "Conv":
        kernel = (to.shape(node.input[1]) or ())[2:]
    if mode in (b"NOTSET", b"") or data is None or not kernel:
        return None
    if mode == b"VALID":
        return to.same(node, node.input, values | {"pads": [0] * (2 * len(kernel))})
    dilations = values.get("dilations", [1] * len(kernel))
    if node.op_type != "Conv":
        dilations = [1] * len(kernel)  # ONNX Runtime pads a dilated pool like one that is not
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    strides = values.get("strides", [1] * len(kernel))
    pads = same_padding(data[2:], reach, strides, mode == b"SAME_LOWER")
    inputs = list(node.input)
    if any(pad < 0 for pad in pads):  # the kernel is smaller than the stride
        if node.op_type != "Conv":  # there, too, only pools follow ONNX Runtime
            inputs[0] = _cropped(inputs[0], data, pads, to)
        pads = [max(pad, 0) for pad in pads]
    return to.same(node, inputs, values | {"pads": pads})


def same_padding(
    extents: Sequence[int], reach: Sequence[int], strides: Sequence[int], lower: bool
) -> list[int]:
    """Return the padding before each axis, then after each, that makes one output per stride.

    Negative where windows of `reach` elements leave some of the input out, as in ONNX Runtime.
    """
    begin, end = [], []
    for extent, window, stride in zip(extents, reach, strides, strict=True):
        total = (-(-extent // stride) - 1) * stride + window - extent
        begin.append(int((total + 1) / 2) if lower else int(total / 2))  # towards zero
        end.append(total - begin[-1])
    return begin + end


def _cropped(value: str, shape: Sequence[int], pads: Sequence[int], to: Rewriter) -> str:
    rank = len(shape) - 2
    starts = [max(-pad, 0) for pad in pads[:rank]]
    ends = [extent - max(-pad, 0) for extent, pad in zip(shape[2:], pads[rank:], strict=True)]
    axes = to.constant(range(2, len(shape)))
    return to.op("Slice", value, to.constant(starts), to.constant(ends), axes)


def lp_pool(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: sum powers over windows that are padded with zeros to their full size.

    TVM's importer averages, and counts fewer elements in windows that ceil_mode adds.
    """
    if (explicit := explicit_padding(node, to)) is not None:
        return explicit
    values = attributes(node)
    data, dtype = to.shape(node.input[0]), to.dtype(node.input[0])
    if data is None or dtype is None:
        return None
    kernel = values["kernel_shape"]
    pads = full_windows(data[2:], values)
    power = values.get("p", 2)
    raised = to.op("Abs", node.input[0])
    if power != 1:
        raised = to.op("Pow", raised, to.constant(power, dtype))
    if any(pads):
        rank = len(kernel)
        around = [0, 0, *pads[:rank], 0, 0, *pads[rank:]]
        raised = to.op("Pad", raised, to.constant(around), to.constant(0, dtype))
    shape = {k: v for k, v in values.items() if k in ("kernel_shape", "strides", "dilations")}
    total = to.op("AveragePool", raised, **shape)
    total = to.op("Mul", total, to.constant(np.prod(kernel), dtype))
    return [total if power == 1 else to.op("Pow", total, to.constant(1 / power, dtype))]


def full_windows(extents: Sequence[int], values: dict[str, Any]) -> list[int]:
    """Return the padding of a pool with what ceil_mode adds behind."""
    kernel = values["kernel_shape"]
    rank = len(kernel)
    pads = list(values.get("pads", [0] * (2 * rank)))
    for axis, extent in enumerate(extents if values.get("ceil_mode", 0) else ()):
        stride = values.get("strides", [1] * rank)[axis]
        reach = (kernel[axis] - 1) * values.get("dilations", [1] * rank)[axis] + 1
        padded = extent + pads[axis] + pads[axis + rank]
        steps = -(-(padded - reach) // stride)
        if steps * stride >= extent + pads[axis]:
            steps -= 1  # a window must begin before the padding behind
        pads[axis + rank] += max(steps * stride + reach - padded, 0)
    return pads
