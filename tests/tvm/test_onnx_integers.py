"""Integers, booleans and tensors of rank 0: exact, and of the right type and shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from onnx import TensorProto, helper
from onnx_check import LLVM, assert_correct, imported
from onnx_graphs import F32, I64, make_model, node_model, numbers, value

from gpu_aware_tune.codegen.compile import compile_model
from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.arguments import check_inputs
from gpu_aware_tune.library.program import Program
from gpu_aware_tune.model.importer import TensorSpec, random_inputs

TYPES = {"int32": TensorProto.INT32, "int64": TensorProto.INT64}
INTEGERS = np.random.default_rng(0).integers(-100, 100, (3, 7))
BASES = np.array([-3, -2, -1, 0, 1, 2, 3, 5, 9])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["Sum", "Mean", "Max", "Min", "L1", "L2", "SumSquare"])
def test_reductions_of_integers(kind: str, dtype: str) -> None:
    feeds = {"x": INTEGERS.astype(dtype)}
    for axes in (None, [1]):
        for keepdims in (0, 1):
            for opset in (13, 18):
                as_input = axes is not None and (opset == 18 or kind == "Sum")
                attributes: dict[str, Any] = {"keepdims": keepdims}
                if axes is not None and not as_input:
                    attributes["axes"] = axes
                constants = {"a": np.array(axes)} if as_input else {}
                outputs = [("y", TYPES[dtype])]
                model = node_model(f"Reduce{kind}", feeds, constants, outputs, opset, **attributes)
                assert_correct(model, feeds)


@pytest.mark.parametrize("kind", ["Max", "Min"])
def test_reductions_of_booleans(kind: str) -> None:
    feeds = {"x": INTEGERS > 20}
    for constants in ({}, {"a": np.array([1])}):
        model = node_model(f"Reduce{kind}", feeds, constants, [("y", TensorProto.BOOL)], 20)
        assert_correct(model, feeds)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("exponent", [0, 1, 2, 5, 9, BASES - BASES, np.arange(9), np.arange(9) - 4])
def test_powers_of_integers_are_exact(exponent: Any, dtype: str) -> None:
    exponent = np.asarray(exponent, dtype)
    base = BASES.astype(dtype)
    want = base ** np.abs(exponent)
    want = np.where((exponent < 0) & (np.abs(base) != 1), 0, want).astype(dtype)
    feeds = {"x": base}
    model = node_model("Pow", feeds, {"e": exponent}, [("y", TYPES[dtype])], 15)
    assert_correct(model, feeds, [want])
    feeds = {"x": base, "e": exponent}
    assert_correct(node_model("Pow", feeds, {}, [("y", TYPES[dtype])], 15), feeds, [want])


def test_powers_of_mixed_types_have_the_type_of_the_base() -> None:
    cases = [
        (np.array([2, 3, 9], "int32"), np.array([2, 0.5, 1.5], "float32"), TensorProto.INT32),
        (np.array([3, 7, 2**31], "int64"), np.float32(2), TensorProto.INT64),
        (np.array([1.5, 2, 3], "float32"), np.array([1, 2, 3], "int64"), F32),
        (np.array([2, 3], "int64"), np.array([40, 3], "int32"), I64),
    ]
    for base, exponent, dtype in cases:
        feeds = {"x": np.asarray(base), "e": np.asarray(exponent)}
        assert_correct(node_model("Pow", feeds, {}, [("y", dtype)], 15), feeds)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64"])
def test_the_sign_of_integers(dtype: str) -> None:
    feeds = {"x": np.array([0, 1, 100]).astype(dtype)}
    outputs = [("y", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))]
    assert_correct(node_model("Sign", feeds, {}, outputs), feeds)


@pytest.mark.parametrize("largest", [0, 1])
def test_an_unsorted_top_k_is_sorted(largest: int) -> None:
    feeds, k = {"x": numbers(4, 9)}, {"k": np.array([3])}
    outputs = [("v", F32), ("i", I64)]
    order = np.argsort(-feeds["x"] if largest else feeds["x"], axis=1)[:, :3]
    want = [np.take_along_axis(feeds["x"], order, 1), order]
    model = node_model("TopK", feeds, k, outputs, 17, sorted=0, largest=largest)
    assert_correct(model, feeds, want)


def test_maxima_go_out_and_back() -> None:
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p", "i"], **window),
        helper.make_node("MaxUnpool", ["p", "i"], ["y"], **window),
    ]
    feeds = {"x": numbers(1, 2, 6, 8)}
    model = make_model(nodes, [value("x", F32, [1, 2, 6, 8])], [("y", F32), ("i", I64)], {}, 13)
    assert_correct(model, feeds)


# --- rank 0, bfloat16 ------------------------------------------------------------------------------


def test_scalars_go_in_and_come_out_as_scalars() -> None:
    inputs = [value("x", F32, [3]), value("t", F32, []), value("n", I64, [])]
    nodes = [
        helper.make_node("Mul", ["x", "t"], ["scaled"]),
        helper.make_node("ReduceSum", ["scaled"], ["y"], keepdims=0),
        helper.make_node("Neg", ["n"], ["m"]),
    ]
    proto = make_model(nodes, inputs, [("y", F32), ("m", I64)], {}, 13)
    feeds = {"x": numbers(3), "t": np.array(2, np.float32), "n": np.array(5)}
    model = assert_correct(proto, feeds)
    assert [spec.shape for spec in model.inputs] == [(3,), (), ()]
    assert [spec.shape for spec in model.outputs] == [(), ()]
    executable = compile_model(model, LLVM, {})
    program = Program(executable.jit(), [], tvm_cpu())
    got = program(program.place(check_inputs(model.inputs, feeds)))
    assert [array.shape for array in got] == [(), ()]
    np.testing.assert_allclose(got[0], feeds["x"].sum() * 2, rtol=1e-6)


def tvm_cpu() -> Any:
    import tvm

    return tvm.cpu()


def test_bfloat16_inputs_may_come_from_a_file(tmp_path: Path) -> None:
    specs = (TensorSpec("x", (2, 3), "bfloat16"),)
    values = numbers(2, 3).astype(bfloat16)
    np.save(tmp_path / "x.npy", values)
    (array,) = check_inputs(specs, {"x": np.load(tmp_path / "x.npy")})
    assert array.dtype == bfloat16
    np.testing.assert_array_equal(array, values)
    with pytest.raises(UserError, match="it must be bfloat16"):
        check_inputs(specs, {"x": np.zeros((2, 3), np.float16)})
    assert len(set(random_inputs(specs, 0)["x"].reshape(-1).tolist())) > 2  # no zeros and ones


def test_what_cannot_be_imported_is_told_in_a_line(tmp_path: Path) -> None:
    feeds = {"x": np.array([1, 2], np.int32)}
    model = node_model("Sqrt", feeds, {}, [("y", TensorProto.INT32)])  # of floats alone
    with pytest.raises(UserError, match=r"operator Sqrt \(node 'y', opset 18\)") as caught:
        imported(model)
    assert len(str(caught.value)) <= 300 and str(caught.value).isprintable()
    assert "ir.Op(" not in str(caught.value)
