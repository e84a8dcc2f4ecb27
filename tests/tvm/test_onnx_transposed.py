"""Transposed convolutions, of every form that ONNX Runtime runs, as convolutions in phases."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from onnx_check import assert_correct
from onnx_graphs import F32, node_model, numbers

from gpu_aware_tune.model.importer import supported_operators
from gpu_aware_tune.onnx_prepare import prepare

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "kernel as stride": ((1, 6, 5, 7), (6, 4, 2, 2), {"strides": [2, 2]}),
    "larger kernel": ((2, 3, 5, 4), (3, 5, 4, 4), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "odd kernel": (
        (1, 4, 6, 5), (4, 2, 3, 3),
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
    ),
    "smaller kernel": ((1, 2, 4, 3), (2, 3, 1, 2), {"strides": [3, 3], "output_padding": [2, 0]}),
    "uneven": (
        (1, 4, 5, 6), (4, 3, 5, 3), {"strides": [3, 2], "pads": [0, 1, 2, 1]},
    ),
    "wide padding": ((1, 2, 6, 6), (2, 2, 5, 5), {"strides": [2, 2], "pads": [4, 3, 4, 4]}),
    "stride in one axis": ((1, 3, 4, 5), (3, 2, 3, 3), {"strides": [1, 2]}),
    "groups": ((1, 6, 4, 4), (6, 2, 3, 3), {"strides": [2, 2], "group": 3}),
    "depthwise": ((2, 4, 5, 5), (4, 1, 4, 4), {"strides": [2, 2], "group": 4, "pads": [1] * 4}),
    "sequence": ((1, 4, 9), (4, 3, 16), {"strides": [8], "pads": [4, 4]}),
    "volume": ((1, 2, 3, 4, 3), (2, 3, 2, 3, 2), {"strides": [2, 2, 2]}),
    "large filters": ((1, 16, 5, 6), (16, 12, 4, 4), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "large filters, odd": ((1, 16, 4, 5), (16, 12, 3, 3), {"strides": [2, 2], "pads": [1] * 4}),
    "output shape": ((1, 3, 4, 4), (3, 2, 3, 3), {"strides": [2, 2], "output_shape": [8, 8]}),
}  # fmt: skip
LEFT = {
    "dilated": ((1, 3, 5, 5), (3, 2, 3, 3), {"strides": [2, 2], "dilations": [2, 2]}),
    "stride of one": ((1, 3, 5, 5), (3, 2, 3, 3), {}),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", [*CASES, *LEFT])
def test_it_is_right(case: str, bias: bool) -> None:
    data, kernel, values = {**CASES, **LEFT}[case]
    constants = {"w": numbers(*kernel, seed=1)}
    if bias:
        constants["b"] = numbers(kernel[1] * values.get("group", 1), seed=2)
    feeds = {"x": numbers(*data)}
    order = "x,w,b" if bias else "x,w"
    model = node_model("ConvTranspose", feeds, constants, [("y", F32)], 17, order, **values)
    prepared = prepare(copy.deepcopy(model), {}, None, supported_operators())
    assert ("ConvTranspose" in [node.op_type for node in prepared.graph.node]) == (case in LEFT)
    assert_correct(model, feeds)


def test_weights_that_are_computed_are_rearranged_in_every_call() -> None:
    feeds = {"x": numbers(1, 3, 4, 4), "w": numbers(3, 2, 2, 2, seed=1)}
    model = node_model("ConvTranspose", feeds, {}, [("y", F32)], 17, "x,w", strides=[2, 2])
    assert_correct(model, feeds)


def test_infinities_reach_what_they_touch_only() -> None:
    """Between the elements TVM puts zeros, and zero times infinity is no number."""
    array = numbers(1, 1, 3, 3)
    array[0, 0, 1, 1] = np.inf
    feeds = {"x": array}
    weights = {"w": np.ones((1, 1, 2, 2), np.float32)}
    model = node_model("ConvTranspose", feeds, weights, [("y", F32)], 17, "x,w", strides=[2, 2])
    assert_correct(model, feeds)
