"""Operands of quantised products in an import: bytes and what they stand for, found by how they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from gpu_aware_tune.kernels.dot_products import DotProduct
from gpu_aware_tune.model.operators import dtype_of

BYTES = ("uint8", "int8")
SIGNED = 128  # a signed byte is an unsigned one less this


@dataclass(frozen=True)
class Image:
    """Activations that were bytes: `scale * (values - zero)`, the values as `_operand` gives them.

    `zero` is a number, or where it is computed while the model runs an int32 without dimensions.
    """

    values: Any
    scale: float
    zero: Any


@dataclass(frozen=True)
class Weights:
    """Weights that were dequantised, less their zero point, and a scale for all or for each output."""

    values: np.ndarray
    scale: np.ndarray


def image_of(builder: Any, value: Any, instruction: DotProduct) -> Image | None:
    """The bytes that activations were made from, with one scale and zero point for all."""
    call = call_of(builder, value, "dequantize")
    if call is None:
        return _moved_bytes(builder, value, instruction)
    if dtype_of(call.args[0]) not in BYTES or str(call.attrs.out_dtype) != "float32":
        return None
    scale, zero = (constant_of(builder, argument) for argument in call.args[1:3])
    if scale is None or zero is None or scale.size != 1 or zero.size != 1:
        return None
    values = call.args[0]
    return Image(
        values, float(scale.reshape(())), int(zero.reshape(())) + shift_of(values, instruction)
    )


def _moved_bytes(builder: Any, value: Any, instruction: DotProduct) -> Image | None:
    """Bytes in floats, less a byte for all or nothing: what ConvInteger has become here."""
    less = call_of(builder, value, "subtract")
    values = _bytes(builder, value if less is None else less.args[0])
    if values is None:
        return None
    shift = shift_of(values, instruction)
    if less is None:
        return Image(values, 1.0, shift)
    known, computed = constant_of(builder, less.args[1]), _bytes(builder, less.args[1])
    limits = np.iinfo(dtype_of(values))  # what is outside of an image is the zero point
    if known is not None and known.size == 1 and known == np.rint(known):
        number = int(known.reshape(()))
        return Image(values, 1.0, number + shift) if limits.min <= number <= limits.max else None
    if computed is None or elements_of(computed) != 1 or dtype_of(computed) != dtype_of(values):
        return None
    return Image(values, 1.0, computed_zero(builder, computed, shift))


def _bytes(builder: Any, value: Any) -> Any:
    """The bytes that floats were made from; None where they were not."""
    call = call_of(builder, value, "astype")
    if call is None or str(call.attrs.dtype) not in ("float32", "float64"):
        return None
    return call.args[0] if dtype_of(call.args[0]) in BYTES else None


def shift_of(values: Any, instruction: DotProduct) -> int:
    """What `_operand` adds to bytes."""
    signed = dtype_of(values) == "int8" and instruction.types[0] == "uint8"
    return SIGNED if signed else 0


def weights_of(builder: Any, value: Any, axis: int, instruction: DotProduct) -> Weights | None:
    """Dequantised constant weights, if their scale is one for all or for each place of an axis."""
    call = call_of(builder, value, "dequantize")
    if call is None:
        return _whole(builder, value, instruction)
    scale = constant_of(builder, call.args[1])
    if str(call.attrs.out_dtype) != "float32":
        return None
    values = moved(builder, call.args[0], call.args[2], instruction)
    if values is None or scale is None:
        return None
    if scale.size > 1 and (scale.ndim != 1 or int(call.attrs.axis) % values.ndim != axis):
        return None
    return Weights(values, scale.reshape(-1).astype(np.float64))


def _whole(builder: Any, value: Any, instruction: DotProduct) -> Weights | None:
    """Constant floats that are whole numbers for which the instruction has room."""
    values = constant_of(builder, value)
    if values is None or values.dtype.kind != "f" or not values.size:
        return None
    limits = np.iinfo(instruction.types[1])
    fits = limits.min <= values.min() and values.max() <= limits.max
    if not fits or np.any(values != np.rint(values)):
        return None
    return Weights(values.astype(np.int16), np.ones(1))


def moved(builder: Any, value: Any, zero: Any, instruction: DotProduct) -> np.ndarray | None:
    """Weights less their zero point; None where they are no bytes, or the instruction has no room."""
    values, zeros = constant_of(builder, value), constant_of(builder, zero)
    if values is None or values.dtype.name not in BYTES or (zero is not None and zeros is None):
        return None
    shift = np.zeros(1, np.int16) if zeros is None else zeros.ravel().astype(np.int16)
    if np.any(shift != shift[0]):
        return None
    moved: np.ndarray = values.astype(np.int16) - shift[0]
    limits = np.iinfo(instruction.types[1])
    fits = not moved.size or (limits.min <= moved.min() and moved.max() <= limits.max)
    return moved if fits else None


def call_of(builder: Any, value: Any, operator: str) -> Any:
    """The call of a relax operator that made a value, None for anything else."""
    made = maker_of(builder, value)
    is_call = isinstance(made, tvm.ir.Call) and isinstance(made.op, tvm.ir.Op)
    return made if is_call and str(made.op.name) == f"relax.{operator}" else None


def maker_of(builder: Any, value: Any) -> Any:
    """The expression that a value was bound to; the value itself where it was not."""
    while isinstance(value, relax.Var):
        bound = builder.lookup_binding(value)
        if bound is None:
            return value
        value = bound
    return value


def constant_of(builder: Any, value: Any) -> np.ndarray | None:
    """The elements of a constant, None for anything else."""
    made = None if value is None else maker_of(builder, value)
    return np.asarray(made.value.numpy()) if isinstance(made, tvm.ir.GenericConst) else None


def elements_of(value: Any) -> int:
    """How many elements a value has; -1 where its shape is not known."""
    shape = value.ty.shape
    return -1 if shape is None else int(np.prod([int(extent) for extent in shape]))


def computed_zero(builder: Any, given: Any, shift: int) -> Any:
    """A zero point that is a byte for all, computed while the model runs, as `Image` has it."""
    number = builder.normalize(relax.op.reshape(given, []))
    number = builder.normalize(relax.op.astype(number, "int32"))
    return builder.normalize(relax.op.add(number, relax.const(shift, "int32")))
