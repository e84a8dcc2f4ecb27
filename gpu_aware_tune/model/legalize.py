"""Legalizations of our own: NaN passes through elementwise operators as in NumPy and ONNX Runtime.

TVM's maximum is the larger of two values where one is NaN, so a NaN that comes out of a convolution
is 0 behind its Relu. A selection by `x < bound` keeps it and is a single instruction on a CPU too.

Maxima over windows and axes (MaxPool, ReduceMax) are TVM's: keeping NaN there takes 1.6 to 3.5 times
as long, more than 2 % of a ResNet-50, and ONNX Runtime loses it as well, depending on the order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import te, tirx, topi

from gpu_aware_tune.model.legalize_quantised import dequantize, quantize
from gpu_aware_tune.model.legalize_softmax import softmax

Legalizer = Callable[[Any, Any], Any]


def clamped(x: te.Tensor, low: Any, high: Any) -> te.Tensor:
    """Clip between numbers or scalar tensors, or None; a bound that is NaN bounds nothing."""

    def value(bound: Any) -> Any:
        return bound() if isinstance(bound, te.Tensor) else tirx.const(bound, x.dtype)

    def element(*indices: Any) -> Any:
        result = x(*indices)
        if low is not None:
            result = tirx.Select(result < value(low), value(low), result)
        if high is not None:
            result = tirx.Select(result > value(high), value(high), result)
        return result

    return te.compute(x.shape, element, name="clip", tag=topi.tag.ELEMWISE)


def is_float(value: Any) -> bool:
    """Tell whether a tensor, of TE or of relax, holds floats."""
    dtype = str(value.dtype if isinstance(value, te.Tensor) else value.ty.dtype)
    return "float" in dtype


def _not_nan(value: Any) -> Any:
    """Compare with infinity: TVM's `isnan` is not vectorized, and `x == x` is simplified away."""
    return value <= tirx.const(math.inf, str(value.ty))


_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF << 52}


def _isnan(builder: Any, call: Any) -> Any:
    """By the bits: TVM's own is not vectorized, and of `not x <= inf` it makes `inf < x`."""

    def isnan(x: te.Tensor) -> te.Tensor:
        dtype = str(x.dtype)
        bits = int(dtype.removeprefix("b").removeprefix("float"))
        whole = f"uint{bits}"
        positive, infinity = (
            tirx.const(number, whole) for number in ((1 << (bits - 1)) - 1, _INFINITY[dtype])
        )

        def element(*indices: Any) -> Any:
            return tirx.reinterpret(whole, x(*indices)) & positive > infinity

        return te.compute(x.shape, element, name="isnan", tag=topi.tag.ELEMWISE)

    known = str(call.args[0].ty.dtype) in _INFINITY
    compute = isnan if known else topi.isnan
    return builder.call_te(compute, call.args[0], primfunc_name_hint="tir_isnan")


def _relu(builder: Any, call: Any) -> Any:
    def relu(x: te.Tensor) -> te.Tensor:
        return clamped(x, 0, None)

    return builder.call_te(relu, call.args[0], primfunc_name_hint="relu")


def _clip(builder: Any, call: Any) -> Any:
    low, high = (float(bound.value) for bound in call.args[1:3])
    if not is_float(call.args[0]):
        return builder.call_te(topi.clip, *call.args, primfunc_name_hint="tir_clip")
    return builder.call_te(clamped, call.args[0], low, high, primfunc_name_hint="tir_clip")


def _sign(builder: Any, call: Any) -> Any:
    def sign(x: te.Tensor) -> te.Tensor:
        def element(*indices: Any) -> Any:
            value = x(*indices)
            one, minus = tirx.const(1, x.dtype), tirx.const(-1, x.dtype)
            zero = tirx.const(0, x.dtype)
            return tirx.Select(value > zero, one, tirx.Select(value < zero, minus, value))

        return te.compute(x.shape, element, name="sign", tag=topi.tag.ELEMWISE)

    if not is_float(call.args[0]):
        return builder.call_te(topi.sign, call.args[0], primfunc_name_hint="tir_sign")
    return builder.call_te(sign, call.args[0], primfunc_name_hint="tir_sign")


def _larger(a: Any, b: Any) -> Any:
    return tirx.Select(_not_nan(a), tirx.Select(a > b, a, b), a)


def _smaller(a: Any, b: Any) -> Any:
    return tirx.Select(_not_nan(a), tirx.Select(a < b, a, b), a)


def scalar(value: Any) -> float | None:
    """Return the number that a constant of rank 0 is, None for anything else and for NaN."""
    if not isinstance(value, tvm.ir.GenericConst):
        return None
    array = np.asarray(value.value.numpy())
    return None if array.ndim or np.isnan(float(array)) else float(array)


def _binary(name: str, plain: Any, choose: Callable[[Any, Any], Any]) -> Legalizer:
    def legalize(builder: Any, call: Any) -> Any:
        first, second = call.args
        if not is_float(first):
            return builder.call_te(plain, first, second, primfunc_name_hint=name)
        for tensor, bound in ((first, scalar(second)), (second, scalar(first))):
            if bound is not None:
                bounds = (bound, None) if name == "maximum" else (None, bound)
                return builder.call_te(clamped, tensor, *bounds, primfunc_name_hint=name)

        def elementwise(a: te.Tensor, b: te.Tensor) -> te.Tensor:
            shape = [int(extent) for extent in call.ty.shape]
            left, right = (topi.broadcast_to(x, shape) for x in (a, b))
            return te.compute(shape, lambda *i: choose(left(*i), right(*i)), name=name)

        return builder.call_te(elementwise, first, second, primfunc_name_hint=name)

    return legalize


LEGALIZERS: dict[str, Legalizer] = {
    "relax.clip": _clip,
    "relax.dequantize": dequantize,
    "relax.isnan": _isnan,
    "relax.maximum": _binary("maximum", topi.maximum, _larger),
    "relax.minimum": _binary("minimum", topi.minimum, _smaller),
    "relax.nn.relu": _relu,
    "relax.nn.softmax": softmax,
    "relax.quantize": quantize,
    "relax.sign": _sign,
}
