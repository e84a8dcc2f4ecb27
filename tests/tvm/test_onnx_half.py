"""Half precision: sums, norms, products and functions as exact as float16 and bfloat16 can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from ml_dtypes import bfloat16
from mock_gpu.devices import fake_gpu
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx_check import assert_correct, computed, imported
from onnx_graphs import node_model, numbers, run_onnxruntime

from gpu_aware_tune.codegen.build_options import build_options
from gpu_aware_tune.kernels.space import make_space

TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(bfloat16)}
STEPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # between neighbouring values, relative
ONNX = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def near_40(*shape: int) -> np.ndarray:
    return (40 + 3 * numbers(*shape)).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(numbers(*shape)) + np.float32(0.1)


def large(*shape: int) -> np.ndarray:
    return 30 * numbers(*shape)


IMAGE = {"x": near_40(1, 4, 30, 30)}
ROWS = {"x": near_40(2, 600)}
CHANNELS = {"s": positive(4), "b": numbers(4, seed=2)}
COLUMNS = {"s": positive(600), "b": numbers(600)}
AXIS = {"a": np.array([1])}
Case = tuple[str, dict[str, np.ndarray], dict[str, Any], dict[str, Any], int]
CASES: list[Case] = [
    *((f"Reduce{kind}", ROWS, AXIS, {}, 18) for kind in ("Sum", "Mean", "L1", "L2", "LogSum")),
    ("ReduceLogSumExp", ROWS, AXIS, {}, 18),
    ("ReduceSumSquare", {"x": numbers(2, 600)}, AXIS, {}, 18),
    ("ReduceProd", {"x": 1 + numbers(2, 64) / 50}, AXIS, {}, 18),
    ("CumSum", {"x": positive(2, 600)}, {"a": np.array(1)}, {}, 17),
    ("Sum", {"x": numbers(9), "u": large(9), "v": -large(9)}, {}, {}, 17),
    ("Mean", {"x": numbers(9), "u": 2000 * large(9) / 3, "v": 2000 * large(9) / 3}, {}, {}, 17),
    ("Softmax", {"x": numbers(3, 600)}, {}, {}, 17),
    ("LogSoftmax", {"x": numbers(3, 600)}, {}, {}, 17),
    ("AveragePool", IMAGE, {}, {"kernel_shape": [29, 29]}, 17),
    ("GlobalAveragePool", {"x": near_40(1, 2, 60, 60)}, {}, {}, 17),
    ("GlobalLpPool", IMAGE, {}, {}, 17),
    ("LpPool", IMAGE, {}, {"kernel_shape": [20, 20], "p": 2}, 17),
    ("BatchNormalization", IMAGE, {**CHANNELS, "m": near_40(4), "v": positive(4)}, {}, 17),
    ("GroupNormalization", {"x": 4 + numbers(1, 4, 30, 30)}, CHANNELS, {"num_groups": 2}, 21),
    ("InstanceNormalization", IMAGE, CHANNELS, {}, 17),
    ("LayerNormalization", ROWS, COLUMNS, {}, 17),
    ("RMSNormalization", ROWS, {"s": positive(600)}, {}, 23),
    ("LpNormalization", ROWS, {}, {"p": 1}, 17),
    ("MeanVarianceNormalization", IMAGE, {}, {}, 17),
    ("LRN", {"x": near_40(1, 8, 4, 4)}, {}, {"size": 3, "alpha": 0.1}, 17),
    ("MatMul", {"x": positive(2, 900), "w": positive(900, 3)}, {}, {}, 17),
    ("Einsum", {"x": positive(2, 900), "w": positive(900, 3)}, {}, {"equation": "ij,jk->ik"}, 17),
    ("Gemm", {"x": positive(900, 2)}, {"w": positive(3, 900), "c": numbers(3)},
     {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}, 17),
    ("Conv", {"x": positive(1, 64, 9, 9)}, {"w": positive(8, 64, 3, 3), "b": numbers(8)},
     {"pads": [1, 1, 1, 1]}, 17),
    ("Conv", {"x": positive(1, 8, 90)}, {"w": positive(8, 1, 60)},
     {"group": 8, "auto_pad": "SAME_LOWER", "strides": [2]}, 17),
    ("ConvTranspose", {"x": positive(1, 64, 5, 5)}, {"w": positive(64, 8, 3, 3), "b": numbers(8)},
     {"strides": [2, 2]}, 17),
    *((name, {"x": large(7, 9)}, {}, {}, 20) for name in ("Sigmoid", "Softplus", "Mish", "Gelu")),
    ("Gelu", {"x": large(7, 9)}, {}, {"approximate": "tanh"}, 20),
    ("Swish", {"x": large(7, 9)}, {}, {}, 24),
    ("Clip", {"x": large(7, 9)}, {"lo": np.float32(-2), "hi": np.float32(3)}, {}, 17),
    ("PRelu", {"x": large(7, 9)}, {"a": numbers(9)}, {}, 17),
]  # fmt: skip


def converted(arrays: dict[str, Any], dtype: np.dtype[Any]) -> dict[str, Any]:
    floats = {name for name, array in arrays.items() if np.asarray(array).dtype.kind == "f"}
    return {n: np.asarray(a).astype(dtype) if n in floats else a for n, a in arrays.items()}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_half_precision_is_as_exact_as_its_type(case: Case, dtype: str) -> None:
    """Against the same operator in float32 on the same values."""
    op_type, feeds, constants, attributes, opset = case
    feeds, constants = converted(feeds, TYPES[dtype]), converted(constants, TYPES[dtype])
    single = np.dtype(np.float32)
    wide = {name: array.astype(single) for name, array in feeds.items()}
    wide_constants = {
        n: a.astype(single) if a.dtype == TYPES[dtype] else a for n, a in constants.items()
    }
    reference = node_model(op_type, wide, wide_constants, opset=opset, **attributes)
    try:
        want = run_onnxruntime(reference, wide)[0]
    except Exception:  # a build of ONNX Runtime may be older than the operator set
        want = np.asarray(ReferenceEvaluator(reference).run(None, wide)[0])
    outputs = [("y", ONNX[dtype])]
    model = imported(node_model(op_type, feeds, constants, outputs, opset, **attributes))
    (got,) = computed(model, feeds)
    assert (got.dtype, got.shape) == (TYPES[dtype], want.shape)
    assert np.isfinite(want.astype(TYPES[dtype]).astype(single)).any()
    error = np.abs(got.astype(np.float64) - want)
    error[got == want.astype(TYPES[dtype])] = 0  # infinities
    assert np.all(error <= STEPS[dtype] * np.abs(want) + 3e-7 * np.abs(want).max())


@pytest.mark.parametrize("dtype", TYPES)
def test_constants_are_not_folded_in_half_precision(dtype: str) -> None:
    constants = {"x": np.full((1, 9000), 0.5).astype(TYPES[dtype]), "a": np.array([1])}
    model = node_model("ReduceSum", {}, constants, [("y", ONNX[dtype])], 18)
    (got,) = computed(imported(model), {})
    assert got.astype(np.float32) == np.float32(4500).astype(TYPES[dtype])


def test_a_converted_model_sums_in_float32_and_keeps_large_weights() -> None:
    feeds = {"x": near_40(1, 2, 60, 60)}
    model = node_model("GlobalAveragePool", feeds, {})
    assert_correct(model, feeds, tolerance=2e-3, dtype="float16")
    feeds = {"x": positive(4, 5)}
    model = node_model("Mul", feeds, {"w": np.full((4, 5), 20000, np.float32)})
    assert_correct(model, feeds, tolerance=2e-3, dtype="float16")


def test_sums_in_float32_still_use_tensor_cores() -> None:
    """All of a few random schedules for them compile, not only those that share no memory."""
    from benchmarks.draws import random_schedules
    from gpu_aware_tune.model.tasks import extract

    target = tvm.target.Target(fake_gpu().target(40))
    feeds = {"x": numbers(256, 256).astype(np.float16)}
    weight = {"w": numbers(256, 256, seed=1).astype(np.float16)}
    model = node_model("MatMul", feeds, weight, [("y", TensorProto.FLOAT16)])
    (task,) = extract(imported(model, target=target), target)
    space = make_space(task.module, target, 40)
    drawn = list(random_schedules(task.module, target, space, 4, seed=3))
    assert drawn
    for schedule in drawn:
        assert "wmma" in schedule.mod.script()
        with target, build_options(schedule.mod):
            tvm.tirx.build(schedule.mod, target=target)
