"""Rules for quantised operators that TVM lacks: exact integers, or through the floats they stand for."""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule

EXACT_IN_FLOAT32 = 1 << 24


def conv_integer(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: ConvInteger as a convolution in floats that hold its integer sums exactly.

    Those are float32 up to some hundred terms, and float64: a product of 8-bit integers has 16 bits,
    float64 a mantissa of 53.
    """
    shape = to.shape(node.input[1])
    if shape is None:
        return None
    zeros = input_of(node, 2), input_of(node, 3)
    largest_weight = 128 if to.dtype(node.input[1]) == np.int8 and not zeros[1] else 255
    largest_sum = math.prod(shape[1:]) * 255 * largest_weight
    dtype = np.float32 if largest_sum <= EXACT_IN_FLOAT32 else np.float64
    data, kernel = (to.cast(name, dtype) for name in node.input[:2])
    if zeros[0]:
        data = to.op("Sub", data, to.cast(zeros[0], dtype))
    if zeros[1]:
        zero = to.cast(zeros[1], dtype)
        if to.shape(zeros[1]) not in ((), (1,)):  # one for each filter
            zero = to.op("Reshape", zero, to.constant([-1] + [1] * (len(shape) - 1)))
        kernel = to.op("Sub", kernel, zero)
    return [to.cast(to.op("Conv", data, kernel, **attributes(node)), np.int32)]


def cast(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: integer sums that floats hold need not be made integers to become floats again."""
    middle = _maker(node.input[0], to)
    dtype = to.dtype(node.output[0])
    if middle is None or middle.op_type != "Cast" or dtype not in (np.float32, np.float64):
        return None
    conv = _maker(middle.input[0], to)
    if conv is None or conv.op_type != "Conv" or to.dtype(middle.output[0]) != np.int32:
        return None
    if len(conv.input) > 2 or not all(_is_integral(name, to) for name in conv.input):
        return None
    return [to.cast(conv.output[0], dtype)]


def _maker(name: str, to: Rewriter) -> NodeProto | None:
    """The node that makes a value, not one that only passes it on."""
    maker = to.producers.get(name)
    while maker is not None and maker.op_type == "Identity":
        maker = to.producers.get(maker.input[0])
    return maker


def _is_integral(name: str, to: Rewriter) -> bool:
    """Tell whether a value has integers in floats, by how it is made."""
    constant = to.facts.constant(name)
    if constant is not None:
        return bool(np.all(constant == np.round(constant)))
    maker = _maker(name, to)
    if maker is None:
        return False
    if maker.op_type == "Cast":
        source = to.dtype(maker.input[0])
        return source is not None and np.dtype(source).kind in "iu"
    if maker.op_type == "Sub":
        return all(_is_integral(operand, to) for operand in maker.input)
    return maker.op_type == "Reshape" and _is_integral(maker.input[0], to)


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


def _gemm(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: QGemm, whose addend is of integers that the product's scale belongs to."""
    values = attributes(node)
    a, a_scale, a_zero, b, b_scale, b_zero = node.input[:6]
    columns = to.shape(b_scale)
    if columns is None:
        return None
    matrix = _dequantized(to, b, b_scale, b_zero)
    if columns not in ((), (1,)):
        axis = 0 if values.get("transB", 0) else 1
        matrix = to.op("DequantizeLinear", b, b_scale, b_zero, axis=axis)
    operands = [_dequantized(to, a, a_scale, a_zero), matrix]
    if addend := input_of(node, 6):
        scale = to.op(
            "Mul", to.op("Mul", a_scale, b_scale), to.constant(values.get("alpha", 1.0), np.float32)
        )
        operands.append(to.op("Mul", to.cast(addend, np.float32), scale))
    result = to.op("Gemm", *operands, **values)
    if not input_of(node, 7):
        return [result]
    return [_quantized(to, result, node.input[7], node.input[8])]


def _pooled(op_type: str) -> Rule:
    def rule(node: NodeProto, to: Rewriter) -> list[str] | None:
        values = attributes(node)
        if values.pop("channels_last", 0) or not input_of(node, 4):
            return None
        result = to.op(op_type, _dequantized(to, *node.input[:3]), **values)
        return [_quantized(to, result, node.input[3], node.input[4])]

    return rule


def _softmax(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: QLinearSoftmax, which says which operator set its `axis` is meant in."""
    values = attributes(node)
    shape, axis = to.shape(node.input[0]), values.get("axis", -1)
    if not input_of(node, 4) or shape is None:
        return None
    if values.get("opset", 13) < 13 and axis not in (-1, len(shape) - 1):
        return None
    result = to.op("Softmax", _dequantized(to, *node.input[:3]), axis=axis)
    return [_quantized(to, result, node.input[3], node.input[4])]


def _where(node: NodeProto, to: Rewriter) -> list[str] | None:
    x, y = _dequantized(to, *node.input[1:4]), _dequantized(to, *node.input[4:7])
    return [_quantized(to, to.op("Where", node.input[0], x, y), *node.input[7:9])]


QUANTIZED: dict[str, Rule] = {
    "Cast": cast,
    "ConvInteger": conv_integer,
    "com.microsoft.QGemm": _gemm,
    "com.microsoft.QLinearAdd": _binary("Add"),
    "com.microsoft.QLinearAveragePool": _pooled("AveragePool"),
    "com.microsoft.QLinearGlobalAveragePool": _pooled("GlobalAveragePool"),
    "com.microsoft.QLinearMul": _binary("Mul"),
    "com.microsoft.QLinearConcat": _concat,
    "com.microsoft.QLinearLeakyRelu": _unary("LeakyRelu"),
    "com.microsoft.QLinearSigmoid": _unary("Sigmoid"),
    "com.microsoft.QLinearSoftmax": _softmax,
    "com.microsoft.QLinearWhere": _where,
}
"""Rules by operator name, see `rewriter.operator_name`. Source: ONNX Runtime's contrib operators."""
