"""Rules for integers and booleans where TVM knows an operator for floats alone."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter

EXPONENT_BITS = 6  # two to the 64 is beyond every type


def _is_integer(dtype: object) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "iu"


def power(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: Pow gives the base's type; integers to integers are exact, by repeated squaring."""
    base, exponent = to.dtype(node.input[0]), to.dtype(node.input[1])
    if base is None or exponent is None:
        return None
    if _is_integer(base) and _is_integer(exponent):
        constant = to.facts.constant(node.input[1])
        if constant is not None and constant.size == 1 and 0 <= int(constant.reshape(())) < 64:
            return _constant_power(node, int(constant.reshape(())), to)
        return [_integer_power(node.input[0], to.cast(node.input[1], base), to)]
    if base == exponent:
        return None
    if _is_integer(base):
        wide = (to.cast(name, np.float64) for name in node.input)
        return [to.cast(to.op("Pow", *wide), base)]
    return [to.op("Pow", node.input[0], to.cast(node.input[1], base))]


def modulo(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: Mod of floats takes the divisor's sign, as Python's does; fmod takes the dividend's."""
    dtype = to.dtype(node.input[0])
    if dtype is None or _is_integer(dtype) or attributes(node).get("fmod", 0):
        return None
    zero = to.constant(0, dtype)
    rest = to.op("Mod", *node.input, fmod=1)
    other_sign = to.op("Xor", to.op("Less", rest, zero), to.op("Less", node.input[1], zero))
    some = to.op("Not", to.op("Equal", rest, zero))
    moved = to.op("Add", rest, node.input[1])
    return [to.op("Where", to.op("And", some, other_sign), moved, rest)]


def matmul_integer(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: a vector as a matrix of one row or column, as TVM's importer takes matrices alone."""
    shapes = [to.shape(name) for name in node.input[:2]]
    if None in shapes or all(len(shape or ()) > 1 for shape in shapes):
        return None
    operands, removed = list(node.input[:2]), []
    for at, (axis, place) in enumerate(((0, -2), (1, -1))):
        if len(shapes[at] or ()) == 1:
            operands[at] = to.op("Unsqueeze", operands[at], to.constant([axis]))
            removed.append(place)
    product = to.op("MatMulInteger", *operands, *node.input[2:])
    return [to.op("Squeeze", product, to.constant(removed))]


def axes_in_a_list(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: a single axis that is not in a list, which ONNX Runtime takes."""
    axes = to.facts.constant(input_of(node, 1)) if input_of(node, 1) else None
    if axes is None or axes.ndim:
        return None
    return [to.op(node.op_type, node.input[0], to.constant([int(axes)]))]


def _constant_power(node: NodeProto, exponent: int, to: Rewriter) -> list[str] | None:
    base, dtype = node.input[0], to.dtype(node.input[0])
    shapes = [to.shape(name) for name in node.input]
    if shapes[0] is None or shapes[1] is None or len(shapes[1]) > len(shapes[0]):
        return None if exponent == 0 else [_integer_power(base, to.cast(node.input[1], dtype), to)]
    result, square = "", base
    for bit in range(exponent.bit_length()):
        if bit:
            square = to.op("Mul", square, square)
        if exponent >> bit & 1:
            result = to.op("Mul", result, square) if result else square
    if not result:
        result = to.op("Add", to.op("Mul", base, to.constant(0, dtype)), to.constant(1, dtype))
    return [result]


def _integer_power(base: str, exponent: str, to: Rewriter) -> str:
    dtype = to.dtype(base)
    one, two, zero = (to.constant(number, dtype) for number in (1, 2, 0))
    size = to.op("Abs", exponent)
    result, square, rest = one, base, size
    for bit in range(EXPONENT_BITS):
        odd = to.op("Equal", to.op("Mod", rest, two), one)
        result = to.op("Mul", result, to.op("Where", odd, square, one))
        if bit + 1 < EXPONENT_BITS:
            square, rest = to.op("Mul", square, square), to.op("Div", rest, two)
    # The reciprocal of all but 1 and -1 is cut off to 0; it is its own reciprocal for those.
    unit = to.op("Equal", to.op("Abs", base), one)
    reciprocal = to.op("Where", unit, result, zero)
    return to.op("Where", to.op("Less", exponent, zero), reciprocal, result)


def reduce_mean(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: the mean of integers is their sum over their number, cut off to an integer."""
    dtype = to.dtype(node.input[0])
    data, result = to.shape(node.input[0]), to.shape(node.output[0])
    if not _is_integer(dtype) or data is None or result is None:
        return None
    values = attributes(node)
    axes = values.pop("axes", None)
    inputs = [to.cast(node.input[0], np.int64)]
    if axes is not None or input_of(node, 1):
        inputs.append(to.constant(axes) if axes is not None else node.input[1])
    count = int(np.prod(data)) // max(int(np.prod(result)), 1)
    mean = to.op("Div", to.op("ReduceSum", *inputs, **values), to.constant(count))
    return [to.cast(mean, dtype)]


def reduce_in_float64(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: roots and logarithms of sums of integers, cut off to integers."""
    dtype = to.dtype(node.input[0])
    if not _is_integer(dtype):
        return None
    inputs = [to.cast(node.input[0], np.float64), *node.input[1:]]
    return [to.cast(to.same(node, inputs, attributes(node))[0], dtype)]


def reduce_booleans(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: the maximum of booleans says whether any is true, the minimum whether all are."""
    if to.dtype(node.input[0]) != np.bool_:
        return None
    inputs = [to.cast(node.input[0], np.int32), *node.input[1:]]
    reduced = to.same(node, inputs, attributes(node))[0]
    return [to.op("Cast", reduced, to=TensorProto.BOOL)]


def sign(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: the sign of an unsigned integer is 1 or 0."""
    dtype = to.dtype(node.input[0])
    if not isinstance(dtype, np.dtype) or dtype.kind != "u":
        return None
    positive = to.op("Greater", node.input[0], to.constant(0, dtype))
    return [to.cast(positive, dtype)]
