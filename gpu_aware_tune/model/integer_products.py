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
from functools import partial
from typing import Any

import numpy as np
import tvm
from onnx import TensorProto
from tvm import relax, te, tirx, topi

from gpu_aware_tune.kernels.dot_products import DotProduct
from gpu_aware_tune.model.integer_operands import (
    BYTES,
    SIGNED,
    call_of,
    computed_zero,
    elements_of,
    image_of,
    maker_of,
    moved,
    shift_of,
    weights_of,
)
from gpu_aware_tune.model.operators import Converter, dtype_of, pads_are_given

_MOST = np.iinfo(np.int32).max
_CONVOLVED = "conv2d_bytes"
_CASTS = {TensorProto.FLOAT: "float32", TensorProto.INT32: "int32"}


def integer_converters(instruction: DotProduct) -> dict[str, Converter]:
    """The converters by ONNX operator, for an instruction of the processor.

    Each gives None where operands are of another kind, or no whole vectors of outputs come of them: that
    is left to floats.
    """

    kinds = {
        "Cast": _cast,
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
    image = image_of(builder, inputs[0], instruction)
    weights = weights_of(builder, inputs[1], 0, instruction)
    if image is None or weights is None or weights.values.ndim != 4:
        return None
    outputs, channels = weights.values.shape[:2]
    if attributes.get("group", 1) != 1 or outputs < lanes:
        return None
    if not pads_are_given(attributes):
        return None
    pads = [int(pad) for pad in attributes.get("pads", [0] * 4)]
    strides = [int(step) for step in attributes.get("strides", [1, 1])]
    dilations = [int(step) for step in attributes.get("dilations", [1, 1])]
    matrix = weights.values.reshape(outputs, -1).T
    if not _have_room(matrix):
        return None
    # Filters of zeros fill the last vector; their results are left out again.
    more = ((0, -outputs % lanes), (0, -channels % instruction.terms), (0, 0), (0, 0))
    groups = np.pad(weights.values, more).astype(instruction.types[1], order="C")
    zero = image.zero if any(pads) or isinstance(image.zero, int) else 0
    sums = builder.emit_te(
        _convolved, image.values, relax.const(groups), zero, pads, strides, dilations,
        primfunc_name_hint=_CONVOLVED,
    )  # fmt: skip
    if outputs % lanes:
        sums = builder.normalize(relax.op.strided_slice(sums, [1], [0], [outputs]))
    along = [1, outputs, 1, 1]
    bias = inputs[2] if len(inputs) > 2 else None
    if bias is not None:
        bias = builder.normalize(relax.op.reshape(bias, along))
    scale = image.scale * weights.scale
    scale = scale.reshape(_along(scale, along))
    sums = _moved_sums(builder, sums, matrix, image.zero, along)
    return _scaled(builder, sums, scale, bias, dtype_of(inputs[0]))


def _cast(
    builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], instruction: DotProduct
) -> Any:
    """Sums that have become floats and become integers or other floats: from the sums themselves.

    TVM's cast of floats to integers is a dozen operators, which take seconds to compile.
    """
    whole = call_of(builder, inputs[0], "astype")
    dtype = _CASTS.get(attributes.get("to", 0))
    if whole is None or dtype is None or not _are_sums(builder, whole.args[0]):
        return None
    sums = whole.args[0]
    return sums if dtype == "int32" else relax.op.astype(sums, dtype)


def _are_sums(builder: Any, value: Any) -> bool:
    """Whether integers are those of a convolution here; others may be rounded on their way, and must."""
    made = maker_of(builder, value)
    while isinstance(made, tvm.ir.Call):
        if isinstance(made.args[0], tvm.ir.GlobalVar):
            return str(made.args[0].name_hint).startswith(_CONVOLVED)
        made = maker_of(builder, made.args[0])
    return False


def _along(scale: np.ndarray, shape: Sequence[int]) -> Sequence[int]:
    return shape if scale.size > 1 else [1] * len(shape)


def _product(
    builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], instruction: DotProduct
) -> Any:
    if attributes.get("transA", 0):
        return None
    transposed = bool(attributes.get("transB", 0))
    image = image_of(builder, inputs[0], instruction)
    weights = weights_of(builder, inputs[1], 0 if transposed else 1, instruction)
    if image is None or weights is None or weights.values.ndim != 2:
        return None
    matrix = weights.values.T if transposed else weights.values
    sums = _summed(builder, image.values, matrix, instruction)
    if sums is None:
        return None
    bias = inputs[2] if len(inputs) > 2 else None
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if bias is not None and beta != 1.0:
        bias = builder.normalize(relax.op.multiply(bias, relax.const(beta, dtype_of(bias))))
    sums = _moved_sums(builder, sums, matrix, image.zero, [-1])
    scale = image.scale * weights.scale * alpha
    return _scaled(builder, sums, scale, bias, dtype_of(inputs[0]))


def _matmul_integer(
    builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], instruction: DotProduct
) -> Any:
    """MatMulInteger with constant weights: `sum a b - z sum b`, z as it is computed, for all rows."""
    values = inputs[0]
    zeros = [inputs[place] if place < len(inputs) else None for place in (2, 3)]
    matrix = moved(builder, inputs[1], zeros[1], instruction)
    if matrix is None or matrix.ndim != 2 or dtype_of(values) not in BYTES:
        return None
    if zeros[0] is not None and elements_of(zeros[0]) != 1:
        return None
    zero = shift_of(values, instruction)
    if zeros[0] is not None:
        zero = computed_zero(builder, zeros[0], zero)
    sums = _summed(builder, values, matrix, instruction)
    return None if sums is None else _moved_sums(builder, sums, matrix, zero, [-1])


def _summed(builder: Any, values: Any, matrix: np.ndarray, instruction: DotProduct) -> Any:
    """Emit the sums of products of bytes (..., K) and (K, N), int32; None where they are not wanted."""
    lanes = instruction.lanes
    shape = values.ty.shape
    terms, columns = matrix.shape
    if terms % instruction.terms or shape is None or len(shape) < 2 or columns < lanes:
        return None
    if not _have_room(matrix):
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


def _scaled(builder: Any, sums: Any, scale: np.ndarray, bias: Any, dtype: str) -> Any:
    """Emit `sums * scale + bias` in floats of a type."""
    result = builder.normalize(relax.op.astype(sums, dtype))
    if np.any(scale != 1):
        result = builder.normalize(relax.op.multiply(result, relax.const(scale.astype(dtype))))
    return result if bias is None else relax.op.add(result, bias)


def _have_room(matrix: np.ndarray) -> bool:
    """Whether 32 bits hold each sum of bytes times a column of weights, and what is taken from it."""
    return bool(np.abs(matrix).sum(axis=0, dtype=np.int64).max(initial=0) * 255 <= _MOST)


def _moved_sums(
    builder: Any, sums: Any, matrix: np.ndarray, zero: Any, shape: Sequence[int]
) -> Any:
    """Emit sums less what the zero point of the activations adds to each.

    Args:
        builder: of the block that a computed zero point is in.
        sums: int32.
        matrix: the weights, a column for each sum.
        zero: see `Image`.
        shape: of the columns' list, for broadcasting.
    """
    columns = -matrix.sum(axis=0, dtype=np.int64).astype(np.int32).reshape(shape)
    if not isinstance(zero, int):
        offsets = builder.normalize(relax.op.multiply(relax.const(columns), zero))
    elif zero and np.any(columns):
        offsets = relax.const(zero * columns)
    else:
        return sums
    return builder.normalize(relax.op.add(sums, offsets))


def _convolved(
    data: te.Tensor,
    weights: te.Tensor,
    zero: te.Tensor | int,
    pads: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> te.Tensor:
    """Sums of (N, C, H, W) bytes and (O, C, h, w) weights, what is outside the image being `zero`.

    The weights may have more channels than the image, for which they are 0.
    """
    image = _operand(data, weights)
    more = int(weights.shape[1]) - int(data.shape[1])
    if any(pads) or more:
        top, left, bottom, right = pads
        outside = tirx.const(zero, "int32") if isinstance(zero, int) else zero()
        image = topi.nn.pad(
            image, [0, 0, top, left], [0, more, bottom, right], outside.astype(image.dtype)
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

    return te.compute((image.shape[0], outputs, height, width), element, name=_CONVOLVED)


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
        lambda *index: (data(*index).astype("int32") + SIGNED).astype("uint8"),
        name="unsigned",
    )
