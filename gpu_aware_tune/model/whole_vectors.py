"""Importer converters for products whose weights have columns that no vector divides, as most vocabularies.

GPT-2 knows 50257 words, which is 29 times a prime, and ImageNet 21841 classes, a prime: no tile of whole
vectors covers the results, and a product with them computed one number at a time. The weights get
columns of zeros behind, once and for all, and the results of these are cut off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from tvm import relax

from gpu_aware_tune.model.integer_operands import constant_of
from gpu_aware_tune.model.operators import Converter

_VECTORS = (4, 2, 1)  # side by side, of which whole numbers are best
_GROWTH = 1 / 16  # of the columns at most, for more than one vector


def whole_vector_converters(lanes: int) -> dict[str, Converter]:
    """The converters by ONNX operator, for vectors of so many float32 values."""
    return {"Gemm": partial(_gemm, lanes=lanes), "MatMul": partial(_matmul, lanes=lanes)}


def _matmul(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], lanes: int) -> Any:
    return _product(inputs[0], constant_of(builder, inputs[1]), lanes)


def _gemm(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], lanes: int) -> Any:
    if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0:
        return None
    weights = constant_of(builder, inputs[1])
    if weights is not None and attributes.get("transB", 0):
        weights = weights.T
    result = _product(inputs[0], weights, lanes)
    if result is None or len(inputs) < 3 or inputs[2] is None:
        return result
    bias, beta = inputs[2], attributes.get("beta", 1.0)
    if beta != 1.0:
        bias = relax.op.multiply(bias, relax.const(beta, "float32"))
    return relax.op.add(result, bias)


def _product(x: Any, weights: np.ndarray | None, lanes: int) -> Any:
    """A product of whole vectors, what is too much cut off; None where its columns are so already."""
    if weights is None or weights.ndim != 2 or weights.dtype != np.float32:
        return None
    columns = weights.shape[1]
    if columns % lanes == 0 or columns <= lanes:
        return None
    padded = np.pad(weights, ((0, 0), (0, padding(columns, lanes))))
    product = relax.op.matmul(x, relax.const(padded))
    axis = len(x.ty.shape) - 1
    return relax.op.strided_slice(product, axes=[axis], begin=[0], end=[columns])


def padding(columns: int, lanes: int) -> int:
    """How many columns of zeros to add."""
    extra = [-columns % (lanes * vectors) for vectors in _VECTORS]
    return next((each for each in extra if each <= _GROWTH * columns), extra[-1])
