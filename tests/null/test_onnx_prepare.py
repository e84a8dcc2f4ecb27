"""Preparing ONNX models: what is told of bad files and shapes, and what is folded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_graphs import (
    F16,
    F32,
    I32,
    SUPPORTED,
    assert_same,
    batch_norm_constants,
    copy,
    make_model,
    numbers,
    operators,
    value,
)

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.onnx_prepare import prepare, read_model
from gpu_aware_tune.onnx_prepare.fold import fold


def relu_model(shape: Sequence[int | str] | None) -> ModelProto:
    node = helper.make_node("Relu", ["x"], ["y"], name="the_relu")
    return make_model([node], [value("x", F32, shape)], [("y", F32)])


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"This is not a model.\n" * 40, "not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (relu_model([1, 3]).SerializeToString()[:-9], "truncated"),
        (relu_model([1, 3]).SerializeToString()[:4], "truncated"),
    ],
)
def test_bad_files_are_told_apart(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_model(tmp_path / "absent.onnx")
    with pytest.raises(UserError, match="is a folder"):
        read_model(tmp_path)


def test_external_data_is_loaded_and_its_absence_named(tmp_path: Path) -> None:
    weight = numbers(64, 64)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = make_model([node], [value("x", F32, [1, 64])], [("y", F32)], {"w": weight})
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    read = read_model(path)
    np.testing.assert_array_equal(numpy_helper.to_array(read.graph.initializer[0]), weight)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(UserError, match=r"weights\.bin.*not in"):
        read_model(path)


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "given", "words"),
    [
        ([1, 3], {"z": (1, 3)}, r"no such input; its inputs are x"),
        (["N", 3], {"x": (1, 3, 1)}, r"3 dimensions, but the model's input has 2: Nx3"),
        (["N", 3], {"x": (1, 4)}, r"dimension 1 is fixed to 3"),
        (["N", 3], {"x": (0, 3)}, r"at least 1"),
        (["N", 3, 32, 32], {}, r"dynamic dimension 0 \(N\).*--input x:1x3x32x32"),
        (["N", "c", "h", "w"], {}, r"--input x:1x3x224x224"),
        (["N", "length"], {}, r"0 \(N\), 1 \(length\).*--input x:1x128"),
        (None, {}, r"has no shape"),
    ],
)
def test_shape_problems_name_the_fix(
    shape: Any, given: dict[str, tuple[int, ...]], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        prepare(relu_model(shape), given, None, SUPPORTED)


def test_a_given_shape_fixes_the_same_symbol_everywhere() -> None:
    inputs = [value("a", F32, ["N", 4]), value("b", F32, ["N", 4])]
    model = make_model([helper.make_node("Add", ["a", "b"], ["y"])], inputs, [("y", F32)])
    prepared = prepare(copy(model), {"a": (2, 4)}, None, SUPPORTED)
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in prepared.graph.input]
    assert shapes == [[2, 4], [2, 4]]
    with pytest.raises(UserError, match=r"\(N\) is already 2"):
        prepare(model, {"a": (2, 4), "b": (3, 4)}, None, SUPPORTED)


def test_initializers_are_not_inputs() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    inputs = [value("x", F32, [1, 8]), value("w", F32, [8, 8])]
    model = make_model([node], inputs, [("y", F32)], {"w": numbers(8, 8)})
    model.ir_version = 3
    prepared = prepare(model, {}, None, SUPPORTED)
    assert [v.name for v in prepared.graph.input] == ["x"]
    assert prepared.ir_version >= 8


@pytest.mark.parametrize("dtype", ["float15", "fp16", "FLOAT16"])
def test_an_unknown_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(UserError, match=f"'{dtype}' is unknown; use one of float16, float32"):
        prepare(relu_model([1, 3]), {}, dtype, SUPPORTED)


# --- folding -------------------------------------------------------------------------------------


def test_shape_arithmetic_is_folded_away() -> None:
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Unsqueeze", ["n", "axes"], ["n1"]),
        node("Concat", ["n1", "rest"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    constants = {"zero": np.int64(0), "axes": np.array([0]), "rest": np.array([-1])}
    model = make_model(nodes, [value("x", F32, [2, 3, 4])], [("y", F32)], constants)
    assert operators(fold(copy(model))) == ["Reshape"]  # without ONNX Runtime
    prepared = assert_same(model, {"x": numbers(2, 3, 4)})
    assert operators(prepared) == ["Reshape"]


def branch(name: str, factor: float) -> onnx.GraphProto:
    nodes = [
        helper.make_node("Constant", [], ["c"], value_float=factor),
        helper.make_node("Mul", ["x", "c"], [name]),
    ]
    return helper.make_graph(nodes, name, [], [value(name, F32, None)])


@pytest.mark.parametrize("condition", [True, False])
def test_a_known_condition_takes_its_branch(condition: bool) -> None:
    nodes = [
        helper.make_node(
            "If",
            ["cond"],
            [f"m{i}"],
            then_branch=branch(f"t{i}", 2.0 + i),
            else_branch=branch(f"e{i}", 5.0 + i),
        )
        for i in range(2)
    ]
    nodes.append(helper.make_node("Add", ["m0", "m1"], ["y"]))
    model = make_model(
        nodes, [value("x", F32, [4])], [("y", F32)], {"cond": np.array(condition)}, opset=16
    )
    prepared = assert_same(model, {"x": numbers(4)})
    assert "If" not in operators(prepared)


def test_old_operators_are_converted() -> None:
    node = helper.make_node("Slice", ["x"], ["y"], axes=[1], starts=[1], ends=[3])
    model = make_model([node], [value("x", F32, [2, 4])], [("y", F32)], opset=9)
    prepared = prepare(model, {}, None, SUPPORTED)
    assert prepared.opset_import[0].version >= 13
    x = numbers(2, 4)
    np.testing.assert_array_equal(ReferenceEvaluator(prepared).run(None, {"x": x})[0], x[:, 1:3])


def test_batch_norms_are_folded_even_without_a_convolution() -> None:
    norm = helper.make_node("BatchNormalization", ["r", *batch_norm_constants()], ["y"])
    model = make_model(
        [helper.make_node("Relu", ["x"], ["r"]), norm],
        [value("x", F32, [2, 4, 3, 3])],
        [("y", F32)],
        batch_norm_constants(),
    )
    prepared = assert_same(model, {"x": numbers(2, 4, 3, 3)})
    assert operators(prepared) == ["Relu", "Mul", "Add"]


def test_preparing_is_deterministic_and_depends_on_the_weights() -> None:
    def prepared(seed: int) -> bytes:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        weight = numbers(32, 32, seed=seed)
        model = make_model([node], [value("x", F32, [1, 32])], [("y", F32)], {"w": weight})
        return prepare(model, {}, None, SUPPORTED).SerializeToString(deterministic=True)

    assert prepared(1) == prepared(1)
    assert prepared(1) != prepared(2)


# --- float16 -------------------------------------------------------------------------------------


def test_float16_converts_weights_and_keeps_inputs_and_outputs() -> None:
    node = helper.make_node
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Softmax", ["m"], ["y"])]
    x, weight = numbers(4, 32), numbers(32, 32, seed=1)
    model = make_model(nodes, [value("x", F32, [4, 32])], [("y", F32)], {"w": weight})
    prepared = prepare(copy(model), {}, "float16", SUPPORTED)
    types = {t.name: t.data_type for t in prepared.graph.initializer}
    assert types["w"] == F16
    assert {v.type.tensor_type.elem_type for v in prepared.graph.input} == {F32}
    assert {v.type.tensor_type.elem_type for v in prepared.graph.output} == {F32}
    onnx.checker.check_model(prepared)  # its nodes are in order
    got = ReferenceEvaluator(prepared).run(None, {"x": x})[0]
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, expected, atol=5e-3)


def test_float16_needs_something_to_convert() -> None:
    node = helper.make_node("Abs", ["x"], ["y"])
    model = make_model([node], [value("x", I32, [4])], [("y", I32)])
    with pytest.raises(UserError, match="no float32 values"):
        prepare(model, {}, "float16", SUPPORTED)


def test_names_are_unique_afterwards_and_a_sum_of_two_is_an_addition() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="y"),
        helper.make_node("Sum", ["a", "x"], ["b"], name="y"),
        helper.make_node("Sum", ["a", "b", "x"], ["y"], name="y"),
    ]
    model = make_model(nodes, [value("x", F32, [2, 3])], [("y", F32)])
    prepared = prepare(copy(model), {}, None, SUPPORTED | {("", "Sum")})
    names = [node.name for node in prepared.graph.node]
    assert len(set(names)) == len(names)
    assert operators(prepared) == ["Relu", "Add", "Sum"]
    feeds = {"x": numbers(2, 3)}
    wanted, got = (ReferenceEvaluator(each).run(None, feeds) for each in (model, prepared))
    np.testing.assert_allclose(got[0], wanted[0])
