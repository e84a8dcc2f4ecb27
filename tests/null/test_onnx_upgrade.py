"""Operator sets 7 to 12 mean the same after preparation: ONNX Runtime on the original file."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.defs
import pytest
from onnx import TensorProto, helper
from onnx_graphs import (
    BOOL,
    F32,
    I64,
    assert_as_onnxruntime,
    make_model,
    node_model,
    numbers,
    operators,
    value,
)

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.onnx_prepare import prepare
from gpu_aware_tune.onnx_prepare.upgrade import UPGRADES

X = {"x": numbers(2, 3, 4, 6)}
FLAT = {"x": numbers(2, 1, 4, 1)}
INDICES = {"i": np.array([[1, 0, 2]]), "u": numbers(1, 3, seed=1)}
NORM = {name: np.abs(numbers(3, seed=seed)) + 0.1 for seed, name in enumerate("sbmv")}
EACH = {name: np.abs(numbers(3, 4, 6, seed=seed)) + 0.1 for seed, name in enumerate("sbmv")}
GEMM = {"w": numbers(3, 4), "c": numbers(4)}
ONE_HOT = {"d": np.array(3), "v": np.array([0.5, 2], np.float32)}
Case = tuple[str, dict[str, np.ndarray], dict[str, Any], dict[str, Any]]


def scales(*values: float) -> dict[str, np.ndarray]:
    return {"s": np.array([1, 1, *values], np.float32)}


# Name -> operator, inputs, constants, attributes; then the operator sets it is written in.
CASES: dict[str, tuple[Case, tuple[int, ...]]] = {
    "batch norm": (("BatchNormalization", X, NORM, {"epsilon": 0.01}), (7, 8, 9, 12)),
    "batch norm of elements": (("BatchNormalization", X, EACH, {"spatial": 0}), (7, 8)),
    "clip": (("Clip", X, {}, {"min": -0.5, "max": 0.25}), (7, 10)),
    "clip above": (("Clip", X, {}, {"max": 0.25}), (7, 10)),
    "clip by inputs": (("Clip", X, {"lo": np.float32(-0.5)}, {}), (11, 12)),
    "dropout": (("Dropout", X, {}, {"ratio": 0.3}), (7, 10, 11)),
    "hardmax": (("Hardmax", X, {}, {}), (7, 11, 12)),
    "hardmax from 2": (("Hardmax", X, {}, {"axis": 2}), (7, 11)),
    "log softmax": (("LogSoftmax", X, {}, {}), (7, 11, 12)),
    "softmax": (("Softmax", X, {}, {}), (7, 11, 12)),
    "softmax of all": (("Softmax", X, {}, {"axis": 0}), (7, 11)),
    "softmax of the last": (("Softmax", X, {}, {"axis": 3}), (7, 11)),
    "softmax from the end": (("Softmax", X, {}, {"axis": -2}), (11, 12)),
    "softmax of one long axis": (("Softmax", FLAT, {}, {}), (7, 11)),
    "pad": (("Pad", X, {}, {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "value": 2.5}), (7, 10)),
    "pad by reflection": (("Pad", X, {}, {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "mode": "reflect"}), (7,)),
    "pad by input": (("Pad", X, {"p": np.array([0, 0, 1, 0, 0, 0, 0, 2])}, {}), (11, 12)),
    "reduce sum": (("ReduceSum", X, {}, {"axes": [1, 3], "keepdims": 0}), (7, 11, 12)),
    "reduce sum of all": (("ReduceSum", X, {}, {}), (7, 11)),
    "scatter": (("Scatter", {"x": numbers(3, 3), **INDICES}, {}, {"axis": 0}), (9, 10)),
    "scatter elements": (("ScatterElements", {"x": numbers(3, 3), **INDICES}, {}, {}), (11, 12)),
    "slice": (("Slice", X, {}, {"starts": [1, -3], "ends": [99, -1], "axes": [1, 3]}), (7, 9)),
    "slice without axes": (("Slice", X, {}, {"starts": [0, 1], "ends": [1, 2]}), (7, 9)),
    "squeeze": (("Squeeze", FLAT, {}, {"axes": [1, 3]}), (7, 11, 12)),
    "squeeze all": (("Squeeze", FLAT, {}, {}), (7, 11)),
    "unsqueeze": (("Unsqueeze", X, {}, {"axes": [0, 3]}), (7, 11, 12)),
    "upsample": (("Upsample", X, {}, {"scales": [1.0, 1.0, 2.0, 3.0]}), (7, 8)),
    "upsample by a fraction": (("Upsample", X, {}, {"scales": [1.0, 1.0, 1.5, 2.3]}), (7, 8)),
    "upsample linear": (("Upsample", X, {}, {"scales": [1.0, 1.0, 2.0, 1.5], "mode": "linear"}), (7, 8)),
    "upsample by input": (("Upsample", X, scales(2, 3), {}), (9,)),
    "upsample linear by input": (("Upsample", X, scales(2, 2.5), {"mode": "linear"}), (9,)),
    "resize up": (("Resize", X, scales(2, 1.7), {}), (10,)),
    "resize down": (("Resize", X, scales(0.5, 0.6), {}), (10,)),
    "resize up and down": (("Resize", X, scales(2.5, 0.6), {}), (10,)),
    "resize linear": (("Resize", X, scales(2, 0.5), {"mode": "linear"}), (10,)),
    # Other operators that the converter changes, and that have the same form since.
    "argmax": (("ArgMax", X, {}, {"axis": 1}), (7, 11, 12)),
    "average pool": (("AveragePool", X, {}, {"kernel_shape": [2, 2]}), (7, 10, 11)),
    "cast": (("Cast", X, {}, {"to": I64}), (7, 9)),
    "flatten": (("Flatten", X, {}, {"axis": 2}), (7, 9, 11)),
    "gather": (("Gather", X, {"i": np.array([1, 0])}, {"axis": 1}), (7, 11)),
    "gemm": (("Gemm", {"x": numbers(2, 3)}, GEMM, {"beta": 0.5}), (7, 9, 11)),
    "max": (("Max", {**X, "o": numbers(6, seed=3)}, {}, {}), (8, 12)),
    "max pool": (("MaxPool", X, {}, {"kernel_shape": [2, 2], "strides": [2, 2]}), (7, 8, 10, 11, 12)),
    "mean variance": (("MeanVarianceNormalization", X, {}, {}), (9, 11)),
    "one hot": (("OneHot", {"x": np.array([[0, 2]])}, ONE_HOT, {}), (9, 11)),
    "pow": (("Pow", {"x": np.abs(X["x"])}, {"e": np.float32(1.7)}, {}), (7, 12)),
    "prelu": (("PRelu", X, {"a": numbers(3, 1, 1)}, {}), (7, 9)),
    "reduce mean": (("ReduceMean", X, {}, {"axes": [1], "keepdims": 0}), (7, 11)),
    "reshape": (("Reshape", X, {"n": np.array([0, -1])}, {}), (7, 12)),
    "depth to space": (("DepthToSpace", {"x": numbers(1, 8, 2, 3)}, {}, {"blocksize": 2}), (7, 11)),
}  # fmt: skip
RUNS = [(name, opset) for name, (_, opsets) in CASES.items() for opset in opsets]
TYPES = {"ArgMax": I64, "Cast": I64}


@pytest.mark.parametrize(("name", "opset"), RUNS)
def test_an_old_operator_means_what_it_meant(name: str, opset: int) -> None:
    (op_type, feeds, constants, attributes), _ = CASES[name]
    outputs = [("y", TYPES.get(op_type, F32))]
    model = node_model(op_type, feeds, constants, outputs, opset, **attributes)
    prepared = assert_as_onnxruntime(model, feeds)
    assert prepared.opset_import[0].version >= 13


@pytest.mark.parametrize("opset", [7, 9, 10, 11])
def test_an_old_top_k_keeps_both_outputs(opset: int) -> None:
    attributes: dict[str, Any] = {"k": 2} if opset < 10 else {}
    constants = {} if opset < 10 else {"k": np.array([2])}
    model = node_model("TopK", X, constants, [("v", F32), ("i", I64)], opset, axis=1, **attributes)
    assert_as_onnxruntime(model, X)


@pytest.mark.parametrize("opset", [7, 11])
@pytest.mark.parametrize("sizes", [None, [1, 2]])
def test_an_old_split_splits_alike(opset: int, sizes: list[int] | None) -> None:
    attributes: dict[str, Any] = {"axis": 1, **({"split": sizes} if sizes else {})}
    feeds = {"x": numbers(2, 3 if sizes else 4)}
    model = node_model("Split", feeds, {}, [("a", F32), ("b", F32)], opset, **attributes)
    assert_as_onnxruntime(model, feeds)


@pytest.mark.parametrize(("opset", "dtype"), [(7, F32), (10, BOOL), (11, BOOL)])
def test_the_mask_of_an_old_dropout_is_of_ones(opset: int, dtype: int) -> None:
    model = node_model("Dropout", X, {}, [("y", F32), ("mask", dtype)], opset)
    prepared = prepare(
        model, {}, None, {("", "Identity"), ("", "Expand"), ("", "Cast"), ("", "Constant")}
    )
    assert [info.type.tensor_type.elem_type for info in prepared.graph.output] == [F32, dtype]


def test_operators_inside_branches_are_upgraded() -> None:
    def branch(name: str, limit: float) -> onnx.GraphProto:
        node = helper.make_node("Clip", ["x"], [name], max=limit)
        return helper.make_graph([node], name, [], [value(name, F32, None)])

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("t", 0.5), else_branch=branch("e", -0.5)
    )
    inputs = [value("x", F32, [2, 3]), value("c", TensorProto.BOOL, [])]
    model = make_model([node], inputs, [("y", F32)], opset=9)
    for taken in (True, False):
        prepared = assert_as_onnxruntime(model, {"x": numbers(2, 3), "c": np.array(taken)})
        assert operators(prepared).count("Clip") == 2


def test_every_operator_that_changed_its_form_has_an_upgrade() -> None:
    """Those with new attributes or inputs that have defaults mean the same without them."""
    schemas = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""]
    changed = set()
    for old in schemas:
        versions = sorted(s.since_version for s in schemas if s.name == old.name)
        replaced = next((v for v in versions if v > old.since_version), 99)
        if not (old.since_version <= 12 and 7 < replaced <= 13):
            continue
        new = onnx.defs.get_schema(old.name, 13)
        kept = all(
            name in new.attributes and attribute.default_value == new.attributes[name].default_value
            for name, attribute in old.attributes.items()
        )
        names = [[each.name for each in schema.inputs] for schema in (old, new)]
        if new.deprecated or not kept or names[0] != names[1][: len(names[0])]:
            changed.add(old.name)
    assert changed - set(UPGRADES) == {"Scan"}  # set 8 had batches: refused


def test_a_set_that_cannot_be_converted_is_told() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"])
    model = make_model([node], [value("x", F32, [1, 1, 4, 4])], [("y", F32)], opset=1)
    with pytest.raises(UserError, match=r"operator set 1 cannot be converted.*export it again"):
        prepare(model, {}, None, {("", "ConvTranspose")})
