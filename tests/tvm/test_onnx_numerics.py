"""What ONNX models compute after import and compilation, where importers go wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
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


# --- NaN, infinities and signed zeros ---------------------------------------------------------------

VALUES = np.array(
    [np.nan, -np.inf, np.inf, -0.0, 0.0, 1, -1, 3, -3, 0.5, -0.5, 100, -100, np.nan, 2, 5],
    np.float32,
)
UNARY = """
Abs Ceil Elu Erf Exp Floor HardSigmoid HardSwish LeakyRelu Log Neg Reciprocal Relu Round Selu Shrink
Sigmoid Sign Softplus Softsign Sqrt Tanh ThresholdedRelu
"""


@pytest.mark.parametrize("op_type", UNARY.split())
def test_functions_of_special_values(op_type: str) -> None:
    assert_correct(node_model(op_type, {"x": VALUES}, {}), {"x": VALUES})


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 6.0), (2.0, -2.0), (np.nan, 1.0)])
@pytest.mark.parametrize("constant", [True, False])
def test_clipping_keeps_nan(bounds: tuple[float, float], constant: bool) -> None:
    values = dict(zip(("low", "high"), map(np.float32, bounds), strict=True))
    arrays = {name: np.array(value) for name, value in values.items()}
    feeds = {"x": VALUES, **({} if constant else arrays)}
    constants = arrays if constant else {}
    want = VALUES.copy()
    want[want < bounds[0]] = bounds[0]
    want[want > bounds[1]] = bounds[1]
    assert_correct(node_model("Clip", feeds, constants), feeds, [want])


@pytest.mark.parametrize("op_type", ["Max", "Min"])
@pytest.mark.parametrize("others", [[1.0], [np.nan], [VALUES[::-1]], [VALUES[:4], 0.5]])
def test_the_larger_of_nan_and_a_number_is_nan(op_type: str, others: list[Any]) -> None:
    constants = {f"c{i}": np.array(other, np.float32) for i, other in enumerate(others)}
    feeds = {"x": VALUES.reshape(4, 4) if len(others) > 1 else VALUES}
    want = feeds["x"]
    for array in constants.values():
        want = (np.maximum if op_type == "Max" else np.minimum)(want, array)
    model = node_model(op_type, feeds, constants)
    assert_correct(model, feeds, [want])
    variables = {**feeds, **constants}
    assert_correct(node_model(op_type, variables, {}), variables, [want])


def test_integers_have_their_maximum_still() -> None:
    feeds = {"x": np.array([-5, 2, 7], np.int32), "y": np.array([1, 1, 9], np.int32)}
    for op_type in ("Max", "Min"):
        model = node_model(op_type, feeds, {}, [("z", TensorProto.INT32)])
        assert_correct(model, feeds)
    bounds = {"low": np.int32(-1), "high": np.int32(3)}
    x = {"x": feeds["x"]}
    assert_correct(node_model("Clip", x, bounds, [("z", TensorProto.INT32)]), x)
