"""Products with weights of odd columns: computed in whole vectors, with the numbers of the original."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from onnx.helper import make_node
from onnx_check import assert_correct, imported
from onnx_graphs import F32, make_model, node_model, value

from gpu_aware_tune.model.whole_vectors import padding

AVX512 = tvm.target.Target({"kind": "llvm", "mcpu": "skylake-avx512", "num-cores": 2})
X = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [(50257, 50304), (21841, 21888), (1000, 1024), (577, 608), (365, 384), (91, 96), (33, 48)],
)
def test_columns_become_a_multiple_of_vectors_at_little_cost(columns: int, wanted: int) -> None:
    assert columns + padding(columns, 16) == wanted


@pytest.mark.parametrize("columns", [3, 16, 17, 91, 1009])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_matmul(rank: int, columns: int) -> None:
    x = X[(0,) * (3 - rank)]
    made = node_model("MatMul", {"x": x}, {"w": weights(24, columns)}, [("y", F32)])
    assert_correct(made, {"x": x})


@pytest.mark.parametrize(
    "options", [{}, {"transB": 1}, {"beta": 0.5}, {"alpha": 2.0}, {"transA": 1}]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_gemm(options: dict[str, Any], has_bias: bool) -> None:
    x = X[0].T.copy() if "transA" in options else X[0]
    constants = {"w": weights(37, 24) if "transB" in options else weights(24, 37)}
    if has_bias:
        constants["b"] = weights(37)
    assert_correct(node_model("Gemm", {"x": x}, constants, [("y", F32)], **options), {"x": x})


@pytest.mark.parametrize("channels", [255, 100, 64])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_conv(rank: int, has_bias: bool, channels: int) -> None:
    x = weights(1, 6, *[8] * rank)
    constants = {"w": weights(channels, 6, *[3] * rank)}
    if has_bias:
        constants["b"] = weights(channels)
    options: dict[str, Any] = {
        "pads": [1, 0] * rank,
        "strides": [2] * rank,
        "dilations": [2] * rank,
    }
    made = node_model("Conv", {"x": x}, constants, [("y", F32)], **options)
    assert_correct(made, {"x": x})
    stored = [len(array) for array in imported(made, target=AVX512).weights.values()]
    assert (256 if channels == 255 else channels) in stored, "12 % more of 100 would not pay"


def test_the_columns_of_zeros_are_stored_with_the_weights() -> None:
    made = node_model("MatMul", {"x": X}, {"w": weights(24, 91)}, [("y", F32)])
    model = imported(made, target=AVX512)
    assert [array.shape for array in model.weights.values()] == [(24, 96)]
    (stored,) = model.weights.values()
    np.testing.assert_array_equal(stored[:, :91], weights(24, 91))
    assert not stored[:, 91:].any()
    assert model.outputs[0].shape == (2, 5, 91)


def test_weights_that_are_computed_stay_as_they_are() -> None:
    w = weights(24, 37)
    nodes = [make_node("MatMul", ["x", "w"], ["y"])]
    made = make_model(nodes, [value("x", F32, X.shape), value("w", F32, w.shape)], [("y", F32)])
    assert_correct(made, {"x": X, "w": w})
    assert not imported(made, target=AVX512).weights
