"""Rules for quantised operators that TVM lacks: exact integers, or through the floats they stand for."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule


def conv_integer(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: ConvInteger as a convolution in float64, which holds its integer sums exactly.

    A product of 8-bit integers has 16 bits, float64 a mantissa of 53: 2**37 terms fit.
    """
    data, kernel = (to.cast(name, np.float64) for name in node.input[:2])
    shape = to.shape(node.input[1])
    if shape is None:
        return None
    if zero := input_of(node, 2):
        data = to.op("Sub", data, to.cast(zero, np.float64))
    if zero := input_of(node, 3):
        zero = to.cast(zero, np.float64)
        if to.shape(input_of(node, 3)) not in ((), (1,)):  # one for each filter
            zero = to.op("Reshape", zero, to.constant([-1] + [1] * (len(shape) - 1)))
        kernel = to.op("Sub", kernel, zero)
    return [to.cast(to.op("Conv", data, kernel, **attributes(node)), np.int32)]


def _dequantized(to: Rewriter, value: str, scale: str, zero: str) -> str:
    inputs = [to.op("Reshape", each, to.constant([])) for each in (scale, zero) if each]
    return to.op("DequantizeLinear", value, *inputs)


def _quantized(to: Rewriter, value: str, scale: str, zero: str) -> str:
    inputs = [to.op("Reshape", each, to.constant([])) for each in (scale, zero) if each]
    return to.op("QuantizeLinear", value, *inputs)


def _binary(op_type: str) -> Rule:
    def rule(node: NodeProto, to: Rewriter) -> list[str] | None:
        if not input_of(node, 7):
            return None  # without a zero point the output's type is not stated
        a, b = _dequantized(to, *node.input[:3]), _dequantized(to, *node.input[3:6])
        return [_quantized(to, to.op(op_type, a, b), node.input[6], node.input[7])]

    return rule


def _unary(op_type: str) -> Rule:
    def rule(node: NodeProto, to: Rewriter) -> list[str] | None:
        if not input_of(node, 4):
            return None
        value = _dequantized(to, *node.input[:3])
        result = to.op(op_type, value, **attributes(node))
        return [_quantized(to, result, node.input[3], node.input[4])]

    return rule


def _concat(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: QLinearConcat; the output's scale and zero point come first."""
    parts = [_dequantized(to, *node.input[at : at + 3]) for at in range(2, len(node.input), 3)]
    whole = to.op("Concat", *parts, **attributes(node))
    return [_quantized(to, whole, node.input[0], node.input[1])]


QUANTIZED: dict[str, Rule] = {
    "ConvInteger": conv_integer,
    "com.microsoft.QLinearAdd": _binary("Add"),
    "com.microsoft.QLinearMul": _binary("Mul"),
    "com.microsoft.QLinearConcat": _concat,
    "com.microsoft.QLinearLeakyRelu": _unary("LeakyRelu"),
    "com.microsoft.QLinearSigmoid": _unary("Sigmoid"),
}
"""Rules by operator name, see `rewriter.operator_name`. Source: ONNX Runtime's contrib operators."""
