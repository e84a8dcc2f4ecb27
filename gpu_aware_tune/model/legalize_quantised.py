"""Legalizations of quantize and dequantize with one scale, which becomes an argument of the kernel.

TVM writes scale and zero point into the kernel as numbers: of fifty equal layers, each is then a task of
its own, measured and searched for itself. As arguments they are one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

_BYTES = ("int8", "uint8")


def _alone(value: Any, dtype: str, rank: int) -> Any:
    """A constant of one element as a constant of so many dimensions; None for anything else."""
    if not isinstance(value, tvm.ir.GenericConst):
        return None
    array = np.asarray(value.value.numpy())
    if array.size != 1:
        return None
    return relax.const(array.astype(dtype).reshape([1] * rank), dtype)


def _rank(value: Any) -> int:
    return len(value.ty.shape) if value.ty.shape is not None else 0


def _of_tvm(name: str, builder: Any, call: Any) -> Any:
    return tvm.ir.Op.get(name).get_attr("FLegalize")(builder, call)


def quantize(builder: Any, call: Any) -> Any:
    """`clip(round(x / scale) + zero)`, in float32."""
    x, dtype, rank = call.args[0], str(call.attrs.out_dtype), _rank(call.args[0])
    scale, zero = (_alone(value, "float32", rank) for value in call.args[1:3])
    if not rank or scale is None or zero is None or str(x.ty.dtype) != "float32":
        return _of_tvm("relax.quantize", builder, call)
    if dtype not in _BYTES:
        return _of_tvm("relax.quantize", builder, call)
    low, high = float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
    first = (0,) * rank

    def quantized(data: te.Tensor, scale: te.Tensor, zero: te.Tensor) -> te.Tensor:
        def element(*index: Any) -> Any:
            moved = te.round(data(*index) / scale[first]) + zero[first]
            bounded = te.max(te.min(moved, tirx.const(high)), tirx.const(low))
            return bounded.astype(dtype)

        return te.compute(data.shape, element, name="quantized")

    return builder.call_te(quantized, x, scale, zero, primfunc_name_hint="quantize")


def dequantize(builder: Any, call: Any) -> Any:
    """`(x - zero) * scale`, in float32, which holds the difference exactly."""
    x, rank = call.args[0], _rank(call.args[0])
    scale, zero = _alone(call.args[1], "float32", rank), _alone(call.args[2], "int32", rank)
    if not rank or scale is None or zero is None or str(x.ty.dtype) not in _BYTES:
        return _of_tvm("relax.dequantize", builder, call)
    if str(call.attrs.out_dtype) != "float32":
        return _of_tvm("relax.dequantize", builder, call)
    first = (0,) * rank

    def dequantized(data: te.Tensor, scale: te.Tensor, zero: te.Tensor) -> te.Tensor:
        def element(*index: Any) -> Any:
            moved = data(*index).astype("int32") - zero[first]
            return moved.astype("float32") * scale[first]

        return te.compute(data.shape, element, name="dequantized")

    return builder.call_te(dequantized, x, scale, zero, primfunc_name_hint="dequantize")
