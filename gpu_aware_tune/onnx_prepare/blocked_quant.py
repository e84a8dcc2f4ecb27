"""Rules for quantisation with a scale for each block of elements along an axis."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule


def blocked_dequantize(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: (x - zero point) * scale, both repeated along the blocks."""
    block, shape = attributes(node).get("block_size", 0), to.shape(node.input[0])
    dtype = to.dtype(node.input[1])
    if not block or shape is None or dtype is None:
        return None
    scale = _repeated(node.input[1], node, shape, block, to)
    value = to.cast(node.input[0], np.float32)
    if input_of(node, 2):
        zero = to.cast(node.input[2], np.float32)
        value = to.op("Sub", value, _repeated(zero, node, shape, block, to))
    result = to.op("Mul", value, to.cast(scale, np.float32))
    return [to.cast(result, dtype)]


def blocked_quantize(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: round(x / scale) + zero point, saturated."""
    block, shape = attributes(node).get("block_size", 0), to.shape(node.input[0])
    zero = input_of(node, 2)
    kind = attributes(node).get("output_dtype", 0) or TensorProto.UINT8
    dtype = to.dtype(zero) if zero else onnx.helper.tensor_dtype_to_np_dtype(kind)
    if not block or shape is None or dtype is None or dtype.kind not in "iu":
        return None
    scale = to.cast(_repeated(node.input[1], node, shape, block, to), np.float32)
    value = to.op("Round", to.op("Div", to.cast(node.input[0], np.float32), scale))
    if zero:
        whole = to.cast(zero, np.float32)
        value = to.op("Add", value, _repeated(whole, node, shape, block, to))
    limits = np.iinfo(dtype)
    low, high = (to.constant(limit, np.float32) for limit in (limits.min, limits.max))
    return [to.cast(to.op("Min", to.op("Max", value, low), high), dtype)]


def _repeated(value: str, node: NodeProto, shape: tuple[int, ...], block: int, to: Rewriter) -> str:
    """A value for each block, as one for each element."""
    axis = attributes(node).get("axis", 1) % len(shape)
    return to.op("Gather", value, to.constant(np.arange(shape[axis]) // block), axis=axis)


BLOCKED: dict[str, Rule] = {
    "DequantizeLinear": blocked_dequantize,
    "QuantizeLinear": blocked_quantize,
}
