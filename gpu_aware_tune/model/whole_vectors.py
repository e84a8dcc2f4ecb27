"""Importer converters for weights with a number of outputs that no vector divides, as most vocabularies.

GPT-2 knows 50257 words, which is 29 times a prime, and ImageNet 21841 classes, a prime: no tile of whole
vectors covers the results, and a product with them is computed one number at a time. A convolution
with 1000 or 255 channels of results cannot have them in blocks of 16. The weights get outputs of zeros
behind, once and for all, and these are cut off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax

from gpu_aware_tune.model.integer_operands import constant_of
from gpu_aware_tune.model.operators import (
    Converter,
    biased,
    dtype_of,
    pads_are_given,
    steps_of,
)

_VECTORS = (4, 2, 1)  # side by side, of which whole numbers are best
_GROWTH = 1 / 16  # of the columns at most, for more than one vector


def whole_vector_converters(lanes: int) -> dict[str, Converter]:
    """The converters by ONNX operator, for vectors of so many float32 values."""
    kinds = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}
    return {name: partial(convert, lanes=lanes) for name, convert in kinds.items()}


def _conv(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], lanes: int) -> Any:
    """Where only few channels have to be added: results in rows are not much slower than in blocks."""
    given = inputs[2] if len(inputs) > 2 else None
    is_plain = attributes.get("group", 1) == 1 and pads_are_given(attributes)
    if not is_plain or not _is_odd(inputs[1], 0, lanes):
        return None
    weights, bias = constant_of(builder, inputs[1]), constant_of(builder, given)
    if weights is None or (bias is None) != (given is None):
        return None
    channels, rank = len(weights), weights.ndim - 2
    added = padding(channels, lanes)
    convolve = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d}.get(rank)
    if convolve is None or added > _GROWTH * channels:
        return None
    padded = relax.const(np.pad(weights, ((0, added), *[(0, 0)] * (rank + 1))))
    result = convolve(inputs[0], padded, **steps_of(attributes, rank))
    if bias is not None:
        along = np.pad(bias, (0, added)).reshape(1, -1, *[1] * rank)
        result = relax.op.add(builder.normalize(result), relax.const(along))
    return relax.op.strided_slice(result, axes=[1], begin=[0], end=[channels])


def _matmul(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], lanes: int) -> Any:
    return _product(builder, inputs[0], inputs[1], transposed=False, lanes=lanes)


def _gemm(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], lanes: int) -> Any:
    if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0:
        return None
    transposed = bool(attributes.get("transB", 0))
    result = _product(builder, inputs[0], inputs[1], transposed=transposed, lanes=lanes)
    if result is None or len(inputs) < 3 or inputs[2] is None:
        return result
    return biased(result, inputs[2], attributes)


def _product(builder: Any, x: Any, weights: Any, transposed: bool, lanes: int) -> Any:
    """A product of whole vectors, what is too much cut off; None where its columns are so already."""
    if len(weights.ty.shape) != 2 or not _is_odd(weights, 0 if transposed else 1, lanes):
        return None
    stored = constant_of(builder, weights)
    if stored is None:
        return None
    stored = stored.T if transposed else stored
    columns = stored.shape[1]
    padded = np.pad(stored, ((0, 0), (0, padding(columns, lanes))))
    product = relax.op.matmul(x, relax.const(padded))
    axis = len(x.ty.shape) - 1
    return relax.op.strided_slice(product, axes=[axis], begin=[0], end=[columns])


def _is_odd(weights: Any, axis: int, lanes: int) -> bool:
    """Whether these are of float32, with a number of outputs of which no vectors are a whole part."""
    if dtype_of(weights) != "float32":
        return False
    outputs = weights.ty.shape[axis]
    return (
        isinstance(outputs, tvm.tirx.IntImm) and int(outputs) > lanes and int(outputs) % lanes > 0
    )


def padding(columns: int, lanes: int) -> int:
    """How many columns of zeros to add."""
    extra = [-columns % (lanes * vectors) for vectors in _VECTORS]
    return next((each for each in extra if each <= _GROWTH * columns), extra[-1])
