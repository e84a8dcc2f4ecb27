"""Pools and convolutions whose padding ONNX has computed, as ONNX Runtime computes it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_graphs import F32, I64, assert_as_onnxruntime, make_model, node_model, numbers, value

from gpu_aware_tune.onnx_prepare.facts import attributes as attributes_of

LENGTHS = [7, 8, 9, 10]
WINDOWS = [(3, 2), (2, 2), (4, 3), (2, 3), (3, 1)]


@pytest.mark.parametrize("auto_pad", ["SAME_LOWER", "SAME_UPPER", "VALID"])
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "LpPool", "Conv"])
def test_padding_is_stated(op_type: str, auto_pad: str) -> None:
    for length, (kernel, stride) in itertools.product(LENGTHS, WINDOWS):
        feeds = {"x": numbers(1, 2, length, 6)}
        weights = {"w": numbers(2, 2, kernel, 3, seed=1)} if op_type == "Conv" else {}
        window = {} if weights else {"kernel_shape": [kernel, 3]}
        attributes: dict[str, Any] = {"strides": [stride, 2], "auto_pad": auto_pad, **window}
        if op_type == "MaxPool" and kernel < stride and auto_pad != "VALID":
            continue  # ONNX Runtime refuses that
        model = node_model(op_type, feeds, weights, opset=19, **attributes)
        prepared = assert_as_onnxruntime(model, feeds)
        for node in prepared.graph.node:
            assert attributes_of(node).get("auto_pad", b"NOTSET") == b"NOTSET"


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "LpPool"])
def test_dilated_pools_are_padded_as_in_onnxruntime(op_type: str) -> None:
    for length, auto_pad in itertools.product(LENGTHS, ["SAME_LOWER", "SAME_UPPER"]):
        feeds = {"x": numbers(1, 2, length, 6)}
        attributes: dict[str, Any] = {"strides": [2, 1], "dilations": [1, 2], "auto_pad": auto_pad}
        for ceil_mode in (0, 1):
            model = node_model(
                op_type,
                feeds,
                {},
                opset=19,
                kernel_shape=[3, 2],
                ceil_mode=ceil_mode,
                **attributes,
            )
            assert_as_onnxruntime(model, feeds)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("ceil_mode", [0, 1])
def test_powers_are_summed_over_whole_windows(p: int, ceil_mode: int) -> None:
    for length, (kernel, stride), pads in itertools.product(LENGTHS, WINDOWS, [0, 1]):
        feeds = {"x": numbers(1, 2, length, 6)}
        attributes: dict[str, Any] = {"kernel_shape": [kernel, 3], "strides": [stride, 2], "p": p}
        model = node_model(
            "LpPool",
            feeds,
            {},
            opset=19,
            pads=[pads, 0, 0, pads],
            ceil_mode=ceil_mode,
            **attributes,
        )
        assert_as_onnxruntime(model, feeds)


@pytest.mark.parametrize("storage_order", [0, 1])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "dilations": [1, 2]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    ],
)
def test_a_pool_says_where_its_maxima_are(attributes: dict[str, Any], storage_order: int) -> None:
    feeds = {"x": numbers(2, 3, 6, 7)}
    attributes = {**attributes, "storage_order": storage_order}
    model = node_model("MaxPool", feeds, {}, [("y", F32), ("i", I64)], 13, **attributes)
    assert_as_onnxruntime(model, feeds)


def test_where_volumes_and_rows_have_their_maxima() -> None:
    for shape in ((1, 2, 9), (2, 1, 4, 5, 6)):
        feeds = {"x": numbers(*shape)}
        kernel = [2] * (len(shape) - 2)
        model = node_model("MaxPool", feeds, {}, [("y", F32), ("i", I64)], 13, kernel_shape=kernel)
        assert_as_onnxruntime(model, feeds)


@pytest.mark.parametrize("shape", [None, [1, 2, 7, 8]])
def test_maxima_are_put_back(shape: list[int] | None) -> None:
    feeds = {"x": numbers(1, 2, 6, 8)}
    node = helper.make_node
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    names = ["p", "i"] + (["s"] if shape else [])
    nodes = [
        node("MaxPool", ["x"], ["p", "i"], **window),
        node("MaxUnpool", names, ["y"], **window),
    ]
    constants = {"s": np.array(shape)} if shape else {}
    model = make_model(nodes, [value("x", F32, [1, 2, 6, 8])], [("y", F32)], constants, 13)
    assert_as_onnxruntime(model, feeds)
