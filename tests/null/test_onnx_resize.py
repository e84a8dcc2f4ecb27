"""Resize by the standard, as ONNX Runtime computes it on the original file."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from onnx_graphs import (
    F16,
    F32,
    SUPPORTED,
    assert_as_onnxruntime,
    copy,
    node_model,
    numbers,
    operators,
    run_onnxruntime,
)

from gpu_aware_tune.onnx_prepare import prepare
from gpu_aware_tune.onnx_prepare.interpolation import Axis, Mode, resize_matrix

IMAGE = {"x": numbers(1, 3, 7, 6)}
COORDINATES = [
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "asymmetric",
    "align_corners",
    "tf_crop_and_resize",
]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
KINDS: list[dict[str, Any]] = [
    *({"mode": "nearest", "nearest_mode": rounding} for rounding in ROUNDINGS),
    {"mode": "linear"},
    {"mode": "linear", "antialias": 1},
    {"mode": "cubic"},
    {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
    {"mode": "cubic", "antialias": 1},
]
REGION = np.array([0, 0, 0.2, -0.1, 1, 1, 1.3, 0.8], np.float32)
# Whole and fractional, up and down, single values, one axis kept.
TARGETS: list[list[float] | list[int]] = [
    [2.0, 3.0], [1.7, 0.6], [0.5, 1.0], [14, 4], [1, 3], [5, 1], [7, 11]
]  # fmt: skip


def resize_model(
    targets: list[float] | list[int], x: np.ndarray, opset: int = 19, **attributes: Any
) -> Any:
    is_scale = isinstance(targets[0], float)
    dtype = np.float32 if is_scale else np.int64
    full = targets if "axes" in attributes else [*((1, 1) if is_scale else x.shape[:2]), *targets]
    constants: dict[str, np.ndarray] = {"t": np.array(full, dtype)}
    crop = attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if crop:
        constants["r"] = REGION
    order = f"x,{'r' if crop else ''},{'t' if is_scale else ',t'}"
    outputs = [("y", TensorProto.FLOAT)]
    return node_model("Resize", {"x": x}, constants, outputs, opset, order, **attributes)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_every_mode_is_computed_as_by_onnxruntime(coordinates: str, kind: dict[str, Any]) -> None:
    if coordinates == "half_pixel_symmetric" and kind.get("nearest_mode") in ("floor", "ceil"):
        pytest.skip("whole coordinates, and only ONNX Runtime's rounding errors decide")
    for targets in TARGETS:
        attributes: dict[str, Any] = {"coordinate_transformation_mode": coordinates, **kind}
        assert_as_onnxruntime(resize_model(targets, IMAGE["x"], **attributes), IMAGE)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize("sizes", [[5, 9], [12, 8], [3, 3]])
def test_an_aspect_ratio_is_kept(policy: str, sizes: list[int]) -> None:
    attributes: dict[str, Any] = {"axes": [2, 3], "keep_aspect_ratio_policy": policy}
    assert_as_onnxruntime(resize_model(sizes, IMAGE["x"], **attributes), IMAGE)


def test_batch_and_channels_can_be_resized() -> None:
    scales = {"s": np.array([2, 2.5, 1, 1], np.float32)}
    model = node_model("Resize", IMAGE, scales, opset=19, order="x,,s")
    assert "Resize" not in operators(assert_as_onnxruntime(model, IMAGE))


@pytest.mark.parametrize("order", ["x,e,e,n", "x,,e,n", "x,e,s"])
@pytest.mark.parametrize("size", [14, 10])
def test_inputs_without_elements_count_as_absent(order: str, size: int) -> None:
    """As exporters of operator set 11 write them."""
    values = {
        "e": np.zeros(0, np.float32),
        "n": np.array([1, 3, size, 12]),
        "s": np.array([1, 1, size / 7, 2], np.float32),
    }
    used = {name: array for name, array in values.items() if name in order.split(",")}
    opset = 13 if ",," in order else 11  # there an input could not be left out by its name
    model = node_model("Resize", IMAGE, used, opset=opset, order=order, mode="linear")
    prepared = assert_as_onnxruntime(model, IMAGE)
    for node in prepared.graph.node:
        assert node.op_type != "Resize" or len(list(filter(None, node.input))) == 2


def test_half_pixel_for_nearest_is_taken() -> None:
    attributes: dict[str, Any] = {
        "coordinate_transformation_mode": "tf_half_pixel_for_nn",
        "nearest_mode": "floor",
    }
    scales = {"r": np.zeros(0, np.float32), "s": np.array([1, 1, 2, 0.6], np.float32)}
    model = node_model("Resize", IMAGE, scales, opset=11, order="x,r,s", **attributes)
    assert_as_onnxruntime(model, IMAGE)


def test_a_constant_is_not_resized_by_the_reference() -> None:
    """Its matrix for one value is of an unrounded length."""
    attributes: dict[str, Any] = {
        "coordinate_transformation_mode": "pytorch_half_pixel",
        "mode": "linear",
    }
    constants = {"x": IMAGE["x"], "s": np.array([1, 1, 0.25, 0.3], np.float32)}
    model = node_model("Resize", {}, constants, opset=18, order="x,,s", **attributes)
    assert_as_onnxruntime(model, {})


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_integers_are_interpolated_and_cut_off(dtype: Any) -> None:
    feeds = {"x": np.random.default_rng(0).integers(0, 200, (1, 1, 5, 4)).astype(dtype)}
    scales = {"s": np.array([1, 1, 2.5, 1.5], np.float32)}
    outputs = [("y", TensorProto.UINT8 if dtype is np.uint8 else TensorProto.INT32)]
    model = node_model("Resize", feeds, scales, outputs, 13, "x,,s", mode="linear")
    assert_as_onnxruntime(model, feeds)


def test_float16_is_interpolated_in_float32() -> None:
    x = (1000 + 60 * numbers(1, 2, 5, 4)).astype(np.float16)
    scales = {"s": np.array([1, 1, 2.6, 1.5], np.float32)}
    model = node_model("Resize", {"x": x}, scales, [("y", F16)], 13, "x,,s", mode="cubic")
    wide = {"x": x.astype(np.float32)}
    exact = run_onnxruntime(
        node_model("Resize", wide, scales, [("y", F32)], 13, "x,,s", mode="cubic"), wide
    )[0]
    got = run_onnxruntime(prepare(copy(model), {}, None, SUPPORTED), {"x": x})[0]
    np.testing.assert_array_max_ulp(got, exact.astype(np.float16), 1)


def test_ties_are_broken_as_by_onnxruntime() -> None:
    """Where rounding errors put a coordinate just beside the middle of two elements."""
    for rounding, (extent, size) in itertools.product(
        ROUNDINGS[:2], [(7, 8), (10, 12), (11, 26), (14, 19), (23, 28)]
    ):
        for coordinates in ("asymmetric", "half_pixel"):
            attributes: dict[str, Any] = {
                "coordinate_transformation_mode": coordinates,
                "nearest_mode": rounding,
            }
            feeds = {"x": np.arange(extent, dtype=np.float32).reshape(1, 1, extent, 1)}
            assert_as_onnxruntime(resize_model([size, 1], feeds["x"], **attributes), feeds)


def test_an_unknown_mode_has_no_matrix() -> None:
    assert resize_matrix(Axis(4, 2.0, 8), Mode(kind="lanczos")) is None
    assert resize_matrix(Axis(4, 2.0, 8), Mode(coordinates="sideways")) is None


def test_a_matrix_that_no_machine_holds_is_not_made() -> None:
    assert resize_matrix(Axis(100_000, 2.0, 200_000), Mode(kind="linear")) is None
    assert resize_matrix(Axis(4, 1e-30, 1), Mode(kind="cubic", antialias=True)) is None
    assert resize_matrix(Axis(4, float("nan"), 4), Mode(kind="linear", antialias=True)) is None
    assert resize_matrix(Axis(4, 0.1, 0), Mode(kind="linear")) is None


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_a_resize_to_the_same_size_is_left_out(mode: str) -> None:
    model = resize_model([7, 6], IMAGE["x"], mode=mode)
    assert "Resize" not in operators(prepare(model, {}, None, SUPPORTED, []))
    assert_as_onnxruntime(model, IMAGE)
