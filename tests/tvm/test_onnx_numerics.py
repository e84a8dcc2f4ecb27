"""What ONNX models compute after import and compilation, where importers go wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_check import assert_correct
from onnx_graphs import F32, node_model, numbers

IMAGE = {"x": numbers(1, 3, 7, 6)}

# --- old operator sets, and Resize -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(("opset", "op_type"), [(7, "Upsample"), (9, "Upsample"), (10, "Resize")])
def test_old_resizes_are_asymmetric(opset: int, op_type: str, mode: str) -> None:
    for factors in ([2.0, 3.0], [2.0, 1.5]):
        scales = [1.0, 1.0, *factors]
        attributes: dict[str, Any] = {"scales": scales} if opset == 7 else {}
        constants = {} if opset == 7 else {"s": np.array(scales, np.float32)}
        model = node_model(op_type, IMAGE, constants, [("y", F32)], opset, mode=mode, **attributes)
        assert_correct(model, IMAGE)


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax", "Hardmax"])
def test_an_old_softmax_is_over_all_further_axes(op_type: str) -> None:
    for axis in (1, 2):
        assert_correct(node_model(op_type, IMAGE, {}, [("y", F32)], 11, axis=axis), IMAGE)


RESIZES: list[dict[str, Any]] = [
    {"mode": "linear"},
    {"mode": "nearest", "nearest_mode": "ceil", "coordinate_transformation_mode": "asymmetric"},
    {"mode": "cubic", "coordinate_transformation_mode": "align_corners"},
    {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
    {"mode": "linear", "antialias": 1},
]


@pytest.mark.parametrize("attributes", RESIZES, ids=lambda each: "-".join(map(str, each.values())))
def test_resizes_are_those_of_onnxruntime(attributes: dict[str, Any]) -> None:
    """Some of these TVM computes itself, others are replaced."""
    for sizes in ([14, 3], [7, 1], [3, 10]):
        targets = {"n": np.array([1, 3, *sizes])}
        model = node_model("Resize", IMAGE, targets, opset=18, order="x,,,n", **attributes)
        assert_correct(model, IMAGE)


@pytest.mark.parametrize("auto_pad", ["SAME_LOWER", "SAME_UPPER"])
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "LpPool", "Conv"])
def test_pools_and_convolutions_are_padded_alike(op_type: str, auto_pad: str) -> None:
    for length in (7, 8):
        feeds = {"x": numbers(1, 3, length, 6)}
        weights = {"w": numbers(3, 3, 3, 3, seed=1)} if op_type == "Conv" else {}
        window = {} if weights else {"kernel_shape": [3, 3]}
        attributes: dict[str, Any] = {"strides": [2, 2], "auto_pad": auto_pad, **window}
        assert_correct(node_model(op_type, feeds, weights, **attributes), feeds)


def test_a_group_norm_of_large_means_is_a_number() -> None:
    feeds = {"x": 1000 + numbers(1, 4, 8, 8)}
    constants = {"s": numbers(4, seed=1), "b": numbers(4, seed=2)}
    model = node_model("GroupNormalization", feeds, constants, opset=21, num_groups=2)
    groups = feeds["x"].astype(np.float64).reshape(1, 2, -1)
    normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(
        groups.var(-1, keepdims=True) + 1e-5
    )
    along = (1, 4, 1, 1)
    want = normal.reshape(1, 4, 8, 8) * constants["s"].reshape(along) + constants["b"].reshape(
        along
    )
    assert_correct(model, feeds, [want.astype(np.float32)], tolerance=5e-4)
