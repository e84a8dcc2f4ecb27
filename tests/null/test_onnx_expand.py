"""Operators that TVM lacks or gets wrong: expanded into the same, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_graphs import (
    BOOL,
    F32,
    I64,
    SUPPORTED,
    U8,
    assert_same,
    batch_norm_constants,
    copy,
    make_model,
    node_model,
    numbers,
    operators,
    value,
)

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.onnx_prepare import prepare

IMAGE = {"x": numbers(1, 8, 4, 6)}
NORM = {"x": numbers(2, 4, 3, 3)}
INTS = {"x": np.array([[0, 2], [-1, 7]], np.int64)}
INFS = {"x": np.array([1.0, np.inf, -np.inf, np.nan], np.float32)}
BYTES = {"x": np.arange(24, dtype=np.uint8).reshape(1, 1, 4, 6)}
LOGITS, LABELS = {"x": numbers(3, 5)}, {"t": np.array([0, 4, 2])}
SCALE = {"s": np.float32(0.1), "z": np.uint8(3)}
EXPANDED = {
    "Celu": node_model("Celu", IMAGE, {}, alpha=0.7),
    "Swish": node_model("Swish", IMAGE, {}, opset=24, alpha=0.7),
    "SpaceToDepth CRD": node_model("SpaceToDepth", IMAGE, {}, opset=28, blocksize=2, mode="CRD"),
    "LayerNormalization mean": node_model(
        "LayerNormalization",
        IMAGE,
        {"scale": numbers(6, seed=1), "bias": numbers(6, seed=2)},
        [("y", F32), ("mean", F32), ("inv", F32)],
    ),
    "CenterCropPad": node_model("CenterCropPad", IMAGE, {"s": np.array([6, 3])}, axes=[2, 3]),
    "SoftmaxCrossEntropyLoss": node_model("SoftmaxCrossEntropyLoss", {**LOGITS, **LABELS}, {}),
    "BatchNormalization training": node_model(
        "BatchNormalization",
        NORM,
        batch_norm_constants(),
        [("y", F32), ("m", F32), ("v", F32)],
        training_mode=1,
        momentum=0.8,
    ),
    "ConvTranspose output_shape": node_model(
        "ConvTranspose",
        {"x": numbers(1, 1, 3, 3)},
        {"w": numbers(1, 2, 3, 3)},
        strides=[3, 2],
        output_shape=[10, 8],
    ),
    "Dropout mask": node_model("Dropout", IMAGE, {}, [("y", F32), ("mask", BOOL)]),
    "IsInf positive": node_model("IsInf", INFS, {}, [("y", BOOL)], detect_negative=0),
    "IsInf never": node_model(
        "IsInf", INFS, {}, [("y", BOOL)], detect_negative=0, detect_positive=0
    ),
    "LpNormalization": node_model("LpNormalization", IMAGE, {}, p=2, axis=1),
    "OneHot": node_model(
        "OneHot",
        {**INTS, "v": np.array([-1, 5], np.float32)},
        {"d": np.int64(3)},
        order="x,d,v",
        axis=1,
    ),
    "Pow mixed": node_model("Pow", {**INTS, "e": numbers(2, 2)}, {}, [("y", I64)]),
    "Split zero": node_model(
        "Split", {"x": numbers(4)}, {"s": np.array([0, 3, 1])}, [("a", F32), ("b", F32), ("c", F32)]
    ),
    "QLinearMatMul": node_model(
        "QLinearMatMul",
        {"x": BYTES["x"][0, 0]},
        {"w": np.arange(18, dtype=np.uint8).reshape(6, 3)},
        [("y", U8)],
        opset=19,
        order="x,s,z,w,s,z,s2,z",
    ),
    "QLinearConv": node_model(
        "QLinearConv",
        BYTES,
        {"w": np.arange(18, dtype=np.uint8).reshape(2, 1, 3, 3), "b": np.array([9, -5], np.int32)},
        [("y", U8)],
        opset=19,
        order="x,s,z,w,s,z,s2,z,b",
    ),
}
for _name in ("QLinearMatMul", "QLinearConv"):
    for _key, _scalar in {**SCALE, "s2": np.float32(2.0)}.items():
        EXPANDED[_name].graph.initializer.append(numpy_helper.from_array(np.asarray(_scalar), _key))
FEEDS = [IMAGE, NORM, INFS, LOGITS, LABELS, INTS, BYTES]


def feeds_of(model: ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Gives the inputs that the table above made each model for, by their names and shapes."""
    feeds = {}
    for info in model.graph.input:
        shape = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        known = [f[info.name] for f in FEEDS if info.name in f and f[info.name].shape == shape]
        known = [array for array in known if array.dtype == dtype]
        feeds[info.name] = known[0] if known else numbers(*shape, seed=seed).astype(dtype)
    return feeds


@pytest.mark.parametrize("name", EXPANDED)
def test_expansions_compute_the_same(name: str) -> None:
    model = EXPANDED[name]
    if name == "Split zero":
        del model.graph.output[0]  # an empty output is of no use
    feeds = feeds_of(model)
    if name == "QLinearMatMul":
        feeds = {"x": BYTES["x"][0, 0]}
    prepared = assert_same(model, feeds)
    before, after = (
        [(n.op_type, len(n.attribute)) for n in m.graph.node] for m in (model, prepared)
    )
    assert before != after


def test_unread_outputs_of_a_split_still_count() -> None:
    model = node_model("Split", {"x": numbers(6)}, {}, [("y", F32), ("a", F32), ("b", F32)], 13)
    del model.graph.output[1:]
    prepared = assert_same(model, {"x": numbers(6)})
    assert ReferenceEvaluator(prepared).run(None, {"x": numbers(6)})[0].shape == (2,)


def test_the_first_norm_takes_absolute_values() -> None:
    # Not against the reference, which sums the values with their signs.
    model = node_model("LpNormalization", LOGITS, {}, p=1, axis=1)
    prepared = prepare(copy(model), {}, None, SUPPORTED)
    x = LOGITS["x"]
    expected = x / np.abs(x).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(ReferenceEvaluator(prepared).run(None, LOGITS)[0], expected, 1e-5)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
def test_an_output_shape_pads_as_in_onnxruntime(auto_pad: str) -> None:
    # Not against the reference, which cannot crop. One more on one side than on the other.
    feeds, weights = {"x": numbers(1, 1, 3, 3)}, {"w": numbers(1, 2, 3, 3)}
    attributes: dict[str, Any] = {"strides": [3, 2], "output_shape": [8, 6], "auto_pad": auto_pad}
    model = node_model("ConvTranspose", feeds, weights, **attributes)
    prepared = prepare(copy(model), {}, None, SUPPORTED)
    assert "output_shape" not in str(prepared)
    got, expected = (
        onnxruntime.InferenceSession(m.SerializeToString()).run(None, feeds)[0]
        for m in (prepared, model)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


RESIZES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "scale not whole": ({"mode": "linear"}, {"s": [1, 1, 0.6, 0.6]}, "x,,s"),
    "cubic": ({"mode": "cubic", "cubic_coeff_a": -0.5}, {"s": [1, 1, 0.8, 0.7]}, "x,,s"),
    "antialias": ({"mode": "linear", "antialias": 1}, {"s": [1, 1, 0.5, 0.5]}, "x,,s"),
    "axes": ({"mode": "nearest", "axes": [3, 2]}, {"s": [2.0, 1.5]}, "x,,s"),
    "channels": ({"mode": "nearest"}, {"s": [1, 2, 1, 1]}, "x,,s"),
    "not larger": (
        {"mode": "nearest", "axes": [2, 3], "keep_aspect_ratio_policy": "not_larger"},
        {"n": [7, 8]},
        "x,,,n",
    ),
    "crop": (
        {
            "mode": "linear",
            "axes": [2, 3],
            "coordinate_transformation_mode": "tf_crop_and_resize",
            "extrapolation_value": 9.0,
        },
        {"r": [0.4, 0.6, 1.2, 1.7], "n": [3, 3]},
        "x,r,,n",
    ),
    "symmetric": (
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"},
        {"s": [1, 1, 2.3, 2.94]},
        "x,,s",
    ),
}


@pytest.mark.parametrize("name", RESIZES)
def test_resizes_that_tvm_gets_wrong_become_matrices(name: str) -> None:
    attributes, values, order = RESIZES[name]
    dtypes = {"s": np.float32, "r": np.float32, "n": np.int64}
    constants = {key: np.array(array, dtypes[key]) for key, array in values.items()}
    model = node_model("Resize", IMAGE, constants, opset=19, order=order, **attributes)
    prepared = assert_same(model, IMAGE)
    assert "Resize" not in operators(prepared)


def test_a_resize_that_tvm_gets_right_is_left() -> None:
    scales = {"s": np.array([1, 1, 2, 0.5], np.float32)}
    model = node_model("Resize", IMAGE, scales, opset=19, order="x,,s", mode="linear")
    assert operators(assert_same(model, IMAGE)) == ["Resize"]


# --- refusals ------------------------------------------------------------------------------------


def test_what_is_empty_is_left_out_of_a_concatenation() -> None:
    feeds = {"x": numbers(2, 4, 3, 8)}
    nothing = {"none": np.zeros((2, 4, 3, 0), np.float32)}
    pair = node_model("Concat", feeds, nothing, axis=3)
    assert operators(assert_same(pair, feeds)) in ([], ["Identity"])
    pair.graph.node[0].input.append("x")
    pair.graph.node.append(helper.make_node("Relu", ["y"], ["r"]))
    pair.graph.output[0].name = "r"
    (concat, _) = assert_same(pair, feeds).graph.node
    assert list(concat.input) == ["x", "x"]


def test_a_declared_output_shape_that_is_wrong_is_not_believed() -> None:
    """As in files whose batch size was changed by hand; ONNX Runtime warns and goes on."""
    model = node_model(
        "MaxPool", IMAGE, {}, [("y", F32), ("i", I64)], kernel_shape=[2, 2], strides=[2, 2]
    )
    for output in model.graph.output:
        output.CopyFrom(value(output.name, output.type.tensor_type.elem_type, [7, 3]))
    prepared = prepare(copy(model), {}, None, SUPPORTED)
    found = ReferenceEvaluator(prepared).run(None, IMAGE)
    assert [array.shape for array in found] == [(1, 8, 2, 3)] * 2


def test_an_output_that_is_no_tensor_is_refused() -> None:
    model = node_model("Relu", IMAGE, {})
    model.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", F32, None))
    with pytest.raises(UserError, match="output 'y' is no tensor; sequences"):
        prepare(model, {}, None, SUPPORTED)


def test_every_unsupported_operator_is_named_at_once() -> None:
    nodes = [
        helper.make_node("Unique", ["x"], ["d"], name="first"),
        helper.make_node("Frobnicate", ["d"], ["y"], name="second", domain="my.company"),
    ]
    model = make_model(nodes, [value("x", F32, [2, 2])], [("y", F32)], opset=17)
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    with pytest.raises(UserError) as caught:
        prepare(model, {}, None, SUPPORTED)
    for word in ("Unique", "'first'", "my.company.Frobnicate", "'second'", "opset 17"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            node_model(
                "Dropout", {**IMAGE, "t": np.array(True)}, {"r": np.float32(0.5)}, order="x,r,t"
            ),
            "Dropout.*training mode",
        ),
        (
            node_model(
                "MaxPool",
                {"x": numbers(1, 1, 12, 12)},
                {},
                [("y", F32), ("i", I64)],
                kernel_shape=[9, 9],
            ),
            "MaxPool.*first output",
        ),
        (
            node_model("Expand", {**IMAGE, "s": np.array([2, 8, 4, 6])}, {}),
            "Expand.*'s' must be constant",
        ),
        (
            node_model("Resize", {**IMAGE, "s": np.ones(4, np.float32)}, {}, order="x,,s"),
            "Resize.*not constant",
        ),
        (
            node_model(
                "BatchNormalization",
                NORM,
                batch_norm_constants(),
                [("y", F32), ("m", F32), ("v", F32)],
                opset=13,
            ),
            "BatchNormalization.*training mode",
        ),
    ],
)
def test_what_would_come_out_wrong_is_refused(model: ModelProto, words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepare(copy(model), {}, None, SUPPORTED)
