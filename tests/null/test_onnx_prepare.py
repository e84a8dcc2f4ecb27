"""Preparing ONNX models: what is told of bad files and shapes, and what is folded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
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


def linked_model(folder: Path, location: str = "model.onnx.data") -> Path:
    """Saves a model and its weights as a Hugging Face cache does: both are links to blobs."""
    weight = numbers(64, 64)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = make_model([node], [value("x", F32, [1, 64])], [("y", F32)], {"w": weight})
    tensor = model.graph.initializer[0]
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "1" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "weights").write_bytes(bytes(16) + tensor.raw_data)
    external = {"location": location, "offset": 16, "length": len(tensor.raw_data)}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in external.items():
        tensor.external_data.add(key=key, value=str(text))
    (blobs / "graph").write_bytes(model.SerializeToString())
    (snapshot / "model.onnx").symlink_to("../../../blobs/graph")
    (snapshot / "model.onnx.data").symlink_to("../../../blobs/weights")
    return snapshot / "model.onnx"


def test_external_data_may_be_a_link(tmp_path: Path) -> None:
    read = read_model(linked_model(tmp_path))
    weight = numpy_helper.to_array(read.graph.initializer[0])
    np.testing.assert_array_equal(weight, numbers(64, 64))


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("../../../blobs/weights", "not beside the model"),
        ("/etc/passwd", "not beside the model"),
        ("C:\\weights", "not beside the model"),
        ("", "not beside the model"),
        ("out/weights", "not beside the model"),
        ("absent", "not in"),
        ("x" * 5000, "cannot be read"),
        ("a\0b", "not in"),
        ("folder", "not a regular file"),
        ("short", "too short"),
    ],
)
def test_external_data_stays_beside_the_model(tmp_path: Path, location: str, words: str) -> None:
    path = linked_model(tmp_path, location)
    (path.parent / "folder").mkdir()
    (path.parent / "out").symlink_to(tmp_path / "blobs")
    (path.parent / "short").write_bytes(bytes(99))
    with pytest.raises(UserError, match=words) as caught:
        read_model(path)
    message = str(caught.value).replace(str(path.parent), "")
    assert "\n" not in message and "\0" not in message and len(message) < 300


@pytest.mark.parametrize("by_axis", [True, False])
def test_sparse_initializers_become_dense(tmp_path: Path, by_axis: bool) -> None:
    dense = np.zeros((3, 4), np.float32)
    dense[0, 2], dense[2, 1] = 1.5, -2
    places = np.array([[0, 2], [2, 1]]) if by_axis else np.array([2, 9])
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([1.5, -2], np.float32), "w"),
        numpy_helper.from_array(places, "w_indices"),
        [3, 4],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Constant", [], ["c"], sparse_value=sparse),
        helper.make_node("Add", ["m", "c"], ["y"]),
    ]
    model = make_model(nodes, [value("x", F32, [3, 3])], [("y", F32)])
    model.graph.sparse_initializer.append(sparse)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    prepared = prepare(read_model(path), {}, None, SUPPORTED)
    x = numbers(3, 3)
    got = ReferenceEvaluator(prepared).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, x @ dense + dense, rtol=1e-6)
    sparse.dims[0] = 1 << 40
    model.graph.sparse_initializer[0].CopyFrom(sparse)
    onnx.save(model, path)
    with pytest.raises(UserError, match="sparse tensor 'w' has"):
        read_model(path)


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["n"])], "b", [], [value("n", F32, None)]
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        helper.make_node("Relu", ["x"], ["a"]),
    ]
    model = make_model(nodes, [value("x", F32, [3])], [("y", F32)], {"c": np.array(True)})
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert [node.op_type for node in read_model(path).graph.node] == ["Relu", "If"]
    x = numbers(3)
    got = ReferenceEvaluator(prepare(read_model(path), {}, None, SUPPORTED)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(got, -np.maximum(x, 0))
    model.graph.node[1].input[0] = "y"
    onnx.save(model, path)
    with pytest.raises(UserError, match="needs its own result"):
        read_model(path)


def test_refusals_stay_short() -> None:
    names = [f"Op{number}\x1b[31m" for number in range(40)]
    nodes = [helper.make_node(name, ["x"], ["y" * 4000], domain="z" * 9000) for name in names]
    nodes += [helper.make_node("Unique", ["x"], [f"d{number}"]) for number in range(5)]
    outputs = [("y" * 4000, F32), *((f"d{number}", F32) for number in range(5))]
    model = make_model(nodes[-5:] + nodes[:-5], [value("x", F32, [2, 2])], outputs)
    model.opset_import.append(helper.make_opsetid("z" * 9000, 1))
    with pytest.raises(UserError, match=r"Unique \(node 'd0' and 4 more\)") as caught:
        prepare(model, {}, None, SUPPORTED)
    text = str(caught.value)
    assert len(text) <= 300 and text.isprintable()
    assert "operators more" in text


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "given", "words"),
    [
        ([1, 3], {"z": (1, 3)}, r"no such input; its inputs are x"),
        (["N", 3], {"x": (1, 3, 1)}, r"3 dimensions, but the model's input has 2: Nx3"),
        (["N", 3], {"x": (1, 4)}, r"dimension 1 is fixed to 3"),
        (["N", 3], {"x": (0, 3)}, r"at least 1"),
        (["N", 3, "h", 32], {}, r"dynamic dimension 0 \(N\), 2 \(h\).*--input x:1x3x224x32"),
        (["N", "c", "h", "w"], {}, r"--input x:1x3x224x224"),
        (["N", "length"], {}, r"0 \(N\), 1 \(length\).*--input x:1x128"),
        (None, {}, r"has no shape"),
        (["N", "\x1b[2J"], {}, r"0 \(N\), 1 \(\\x1b\[2J\): fix.*--input x:1x128"),
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


def shapes_of(model: ModelProto) -> list[list[int]]:
    return [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]


def test_an_unknown_batch_is_1_with_a_note() -> None:
    inputs = [value("a", F32, ["N", 4]), value("b", F32, ["N", 4]), value("c", F32, [1, 4])]
    model = make_model([helper.make_node("Sum", ["a", "b", "c"], ["y"])], inputs, [("y", F32)])
    notes: list[str] = []
    supported = SUPPORTED | {("", "Sum")}
    prepared = prepare(copy(model), {}, None, supported, notes)
    assert shapes_of(prepared) == [[1, 4]] * 3
    (note,) = notes
    for word in ("'a', 'b'", "taken as 1", "--input a:1x4"):
        assert word in note
    notes = []
    prepared = prepare(copy(model), {"a": (2, 4)}, None, supported, notes)
    assert shapes_of(prepared) == [[2, 4], [2, 4], [1, 4]]
    assert notes == []


def test_a_batch_is_1_only_where_nothing_else_is_unknown() -> None:
    inputs = [value("a", F32, ["N", 4]), value("b", F32, ["N", "m"])]
    model = make_model([helper.make_node("MatMul", ["a", "b"], ["y"])], inputs, [("y", F32)])
    with pytest.raises(UserError, match=r"'b' has dynamic dimension 0 \(N\), 1 \(m\)"):
        prepare(model, {}, None, SUPPORTED)


@pytest.mark.parametrize("name", ["?", "", "-1", "None"])
def test_dimensions_without_a_name_are_not_one(name: str) -> None:
    model = relu_model([1, name, name])
    assert shapes_of(prepare(model, {"x": (1, 2, 3)}, None, SUPPORTED)) == [[1, 2, 3]]


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
