"""Importer converters for quantised products: convolutions and matrix products as sums of integers.

A model in QDQ form converts bytes to floats, multiplies, and converts back. With x = s (a - z) and weights
w = t b, the sum of x w is s t (sum a b - z sum b): a sum of products of bytes, and one number for each
output that is known beforehand. Where the processor has an instruction for such sums (see
`kernels.dot_products`), that is up to several times as fast. The sums are exact, so that only the rounding of
the scaled results differs from what floats give.

Source: Jacob et al., arXiv 1712.05877, section 2; ONNX Runtime fuses the same operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx, topi

from gpu_aware_tune.kernels.dot_products import DotProduct
from gpu_aware_tune.model.operators import Converter, dtype_of

_BYTES = ("uint8", "int8")
_SIGNED = 128  # a signed byte is an unsigned one less this
_MOST = np.iinfo(np.int32).max


@dataclass(frozen=True)
class _Image:
    """Activations that were dequantised: `scale * (values - zero)`, the values as `_operand` gives them."""

    values: Any
    scale: float
    zero: int


@dataclass(frozen=True)
class _Weights:
    """Weights that were dequantised, less their zero point, and a scale for all or for each output."""

    values: np.ndarray
    scale: np.ndarray


def integer_converters(instruction: DotProduct) -> dict[str, Converter]:
    """The converters by ONNX operator, for an instruction of the processor.

    Each gives None where operands are of another kind, or no whole vectors of outputs come of them: that
    is left to floats.
    """

    kinds = {
        "Conv": _conv,
        "Gemm": _product,
        "MatMul": _product,
        "MatMulInteger": _matmul_integer,
    }
    return {name: partial(convert, instruction=instruction) for name, convert in kinds.items()}


def _conv(
    builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], instruction: DotProduct
) -> Any:
    lanes = instruction.lanes
    image = _image(builder, inputs[0], instruction)
    weights = _weights(builder, inputs[1], 0, instruction)
    if image is None or weights is None or weights.values.ndim != 4:
        return None
    outputs, channels = weights.values.shape[:2]
    if attributes.get("group", 1) != 1 or outputs < lanes:
        return None
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b""):
        return None
    pads = [int(pad) for pad in attributes.get("pads", [0] * 4)]
    strides = [int(step) for step in attributes.get("strides", [1, 1])]
    dilations = [int(step) for step in attributes.get("dilations", [1, 1])]
    offsets = _offsets(weights.values.reshape(outputs, -1).T, image.zero)
    if offsets is None:
        return None
    # Filters of zeros fill the last vector; their results are left out again.
    more = ((0, -outputs % lanes), (0, -channels % instruction.terms), (0, 0), (0, 0))
    groups = np.pad(weights.values, more).astype(instruction.types[1], order="C")
    sums = builder.emit_te(
        _convolved, image.values, relax.const(groups), pads, strides, dilations, image.zero,
        primfunc_name_hint="conv2d_bytes",
    )  # fmt: skip
    if outputs % lanes:
        sums = builder.normalize(relax.op.strided_slice(sums, [1], [0], [outputs]))
    along = [1, outputs, 1, 1]
    bias = inputs[2] if len(inputs) > 2 else None
    if bias is not None:
        bias = builder.normalize(relax.op.reshape(bias, along))
    scale = image.scale * weights.scale
    return _scaled(builder, sums, offsets.reshape(along), scale.reshape(_along(scale, along)), bias)


def _along(scale: np.ndarray, shape: Sequence[int]) -> Sequence[int]:
    return shape if scale.size > 1 else [1] * len(shape)


def _product(
    builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], instruction: DotProduct
) -> Any:
    if attributes.get("transA", 0):
        return None
    transposed = bool(attributes.get("transB", 0))
    image = _image(builder, inputs[0], instruction)
    weights = _weights(builder, inputs[1], 0 if transposed else 1, instruction)
    if image is None or weights is None or weights.values.ndim != 2:
        return None
    matrix = weights.values.T if transposed else weights.values
    offsets = _offsets(matrix, image.zero)
    sums = _summed(builder, image.values, matrix, instruction)
    if offsets is None or sums is None:
        return None
    bias = inputs[2] if len(inputs) > 2 else None
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if bias is not None and beta != 1.0:
        bias = builder.normalize(relax.op.multiply(bias, relax.const(beta, "float32")))
    return _scaled(builder, sums, offsets, image.scale * weights.scale * alpha, bias)


def _matmul_integer(
    builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], instruction: DotProduct
) -> Any:
    """MatMulInteger with constant weights: `sum a b - z sum b`, z as it is computed, for all rows."""
    values = inputs[0]
    zeros = [inputs[place] if place < len(inputs) else None for place in (2, 3)]
    matrix = _moved(builder, inputs[1], zeros[1], instruction)
    if matrix is None or matrix.ndim != 2 or dtype_of(values) not in _BYTES:
        return None
    if zeros[0] is not None and _elements(zeros[0]) != 1:
        return None
    columns = _offsets(matrix, -1)
    sums = _summed(builder, values, matrix, instruction)
    if columns is None or sums is None:
        return None
    zero = relax.const(_shift(values, instruction), "int32")
    if zeros[0] is not None:
        given = relax.op.astype(relax.op.reshape(zeros[0], []), "int32")
        zero = relax.op.add(builder.normalize(given), zero)
    moved = builder.normalize(relax.op.multiply(relax.const(columns), builder.normalize(zero)))
    return relax.op.subtract(sums, moved)


def _summed(builder: Any, values: Any, matrix: np.ndarray, instruction: DotProduct) -> Any:
    """Emit the sums of products of bytes (..., K) and (K, N), int32; None where they are not wanted."""
    lanes = instruction.lanes
    shape = values.ty.shape
    terms, columns = matrix.shape
    if terms % instruction.terms or shape is None or len(shape) < 2 or columns < lanes:
        return None
    more = -columns % lanes
    padded = np.pad(matrix, ((0, 0), (0, more))).astype(instruction.types[1], order="C")
    sums = builder.emit_te(
        _multiplied, values, relax.const(padded), primfunc_name_hint="matmul_bytes"
    )
    if more:
        axis = len(shape) - 1
        sums = builder.normalize(relax.op.strided_slice(sums, [axis], [0], [columns]))
    return sums


def _scaled(builder: Any, sums: Any, offsets: np.ndarray, scale: np.ndarray, bias: Any) -> Any:
    """Emit `(sums + offsets) * scale + bias` in float32."""
    if np.any(offsets):
        sums = builder.normalize(relax.op.add(sums, relax.const(offsets)))
    floats = builder.normalize(relax.op.astype(sums, "float32"))
    result = relax.op.multiply(floats, relax.const(scale.astype(np.float32)))
    if bias is None:
        return result
    return relax.op.add(builder.normalize(result), bias)


def _offsets(matrix: np.ndarray, zero: int) -> np.ndarray | None:
    """What the zero point of the activations takes from each sum; None beyond 32 bits."""
    if np.abs(matrix).sum(axis=0, dtype=np.int64).max(initial=0) * 255 > _MOST:
        return None
    return (-zero * matrix.sum(axis=0, dtype=np.int64)).astype(np.int32)


def _convolved(
    data: te.Tensor,
    weights: te.Tensor,
    pads: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    zero: int,
) -> te.Tensor:
    """Sums of (N, C, H, W) bytes and (O, C, h, w) weights, what is outside the image being `zero`.

    The weights may have more channels than the image, for which they are 0.
    """
    image = _operand(data, weights)
    more = int(weights.shape[1]) - int(data.shape[1])
    if any(pads) or more:
        top, left, bottom, right = pads
        image = topi.nn.pad(
            image, [0, 0, top, left], [0, more, bottom, right], tirx.const(zero, image.dtype)
        )
    outputs, channels, rows, columns = (int(extent) for extent in weights.shape)
    reach = [(size - 1) * step + 1 for size, step in zip((rows, columns), dilations, strict=True)]
    height, width = (
        (image.shape[2 + axis] - reach[axis]) // strides[axis] + 1 for axis in range(2)
    )
    rc, ry, rx = (
        te.reduce_axis((0, extent), name)
        for extent, name in ((channels, "rc"), (rows, "ry"), (columns, "rx"))
    )

    def element(n: Any, o: Any, y: Any, x: Any) -> Any:
        row, column = y * strides[0] + ry * dilations[0], x * strides[1] + rx * dilations[1]
        value = image[n, rc, row, column].astype("int32")
        return te.sum(value * weights[o, rc, ry, rx].astype("int32"), axis=[rc, ry, rx])

    return te.compute((image.shape[0], outputs, height, width), element, name="conv2d_bytes")


def _multiplied(data: te.Tensor, weights: te.Tensor) -> te.Tensor:
    """Sums of (..., K) bytes and (K, N) weights."""
    values = _operand(data, weights)
    terms, columns = weights.shape
    k = te.reduce_axis((0, terms), "k")

    def element(*index: Any) -> Any:
        value = values(*index[:-1], k).astype("int32")
        return te.sum(value * weights[k, index[-1]].astype("int32"), axis=[k])

    return te.compute((*data.shape[:-1], columns), element, name="matmul_bytes")


def _operand(data: te.Tensor, weights: te.Tensor) -> te.Tensor:
    """Bytes as what is multiplied with the weights: unsigned ones with bytes, else 16 bits of any."""
    if weights.dtype != "int8":
        return te.compute(data.shape, lambda *i: data(*i).astype(weights.dtype), name="widened")
    if data.dtype == "uint8":
        return data
    return te.compute(
        data.shape,
        lambda *index: (data(*index).astype("int32") + _SIGNED).astype("uint8"),
        name="unsigned",
    )


def _image(builder: Any, value: Any, instruction: DotProduct) -> _Image | None:
    """The bytes that activations were dequantised from, with one scale and zero point for all."""
    call = _dequantised(builder, value)
    if call is None or dtype_of(call.args[0]) not in _BYTES:
        return None
    scale, zero = (_constant(builder, argument) for argument in call.args[1:3])
    if scale is None or zero is None or scale.size != 1 or zero.size != 1:
        return None
    values = call.args[0]
    return _Image(
        values, float(scale.reshape(())), int(zero.reshape(())) + _shift(values, instruction)
    )


def _shift(values: Any, instruction: DotProduct) -> int:
    """What `_operand` adds to bytes."""
    signed = dtype_of(values) == "int8" and instruction.types[0] == "uint8"
    return _SIGNED if signed else 0


def _weights(builder: Any, value: Any, axis: int, instruction: DotProduct) -> _Weights | None:
    """Dequantised constant weights, if their scale is one for all or for each place of an axis."""
    call = _dequantised(builder, value)
    if call is None:
        return None
    scale = _constant(builder, call.args[1])
    values = _moved(builder, call.args[0], call.args[2], instruction)
    if values is None or scale is None:
        return None
    if scale.size > 1 and (scale.ndim != 1 or int(call.attrs.axis) % values.ndim != axis):
        return None
    return _Weights(values, scale.reshape(-1).astype(np.float64))


def _moved(builder: Any, value: Any, zero: Any, instruction: DotProduct) -> np.ndarray | None:
    """Weights less their zero point; None where they are no bytes, or the instruction has no room."""
    values, zeros = _constant(builder, value), _constant(builder, zero)
    if values is None or values.dtype.name not in _BYTES or (zero is not None and zeros is None):
        return None
    shift = np.zeros(1, np.int16) if zeros is None else zeros.ravel().astype(np.int16)
    if np.any(shift != shift[0]):
        return None
    moved: np.ndarray = values.astype(np.int16) - shift[0]
    limits = np.iinfo(instruction.types[1])
    fits = not moved.size or (limits.min <= moved.min() and moved.max() <= limits.max)
    return moved if fits else None


def _dequantised(builder: Any, value: Any) -> Any:
    """The call of `dequantize` that made a value of float32, None for anything else."""
    made = _made(builder, value)
    is_call = isinstance(made, tvm.ir.Call) and isinstance(made.op, tvm.ir.Op)
    if not is_call or str(made.op.name) != "relax.dequantize":
        return None
    return made if str(made.attrs.out_dtype) == "float32" else None


def _made(builder: Any, value: Any) -> Any:
    while isinstance(value, relax.Var):
        bound = builder.lookup_binding(value)
        if bound is None:
            return value
        value = bound
    return value


def _constant(builder: Any, value: Any) -> np.ndarray | None:
    made = None if value is None else _made(builder, value)
    return np.asarray(made.value.numpy()) if isinstance(made, tvm.ir.GenericConst) else None


def _elements(value: Any) -> int:
    shape = value.ty.shape
    return -1 if shape is None else int(np.prod([int(extent) for extent in shape]))
