"""Kernels that are computed row by row: softmax, norms of rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import tvm
from onnx_check import assert_correct
from onnx_graphs import BOOL, F32, node_model
from test_schedules import f32, kernels
from tiny_library import target
from tvm import relax
from tvm.relax import op

from gpu_aware_tune.finalize.kernel_check import verify_kernel
from gpu_aware_tune.kernels.schedules.cpu import cpu_schedules
from gpu_aware_tune.kernels.schedules.tile_cost import AVX2, AVX512, Machine
from gpu_aware_tune.kernels.traces import trace_to_json
from gpu_aware_tune.model.legalize_softmax import softmax

MACHINES = {"avx2": Machine(8, 16, 2, AVX2), "avx512": Machine(16, 32, 2, AVX512)}


def rms_norm(_: Any, x: Any) -> Any:
    width = int(x.ty.shape[-1])
    return op.nn.rms_norm(x, relax.const(np.linspace(0.5, 1, width, dtype="float32")), [-1])


def layer_norm(_: Any, x: Any) -> Any:
    width = int(x.ty.shape[-1])
    scale, bias = (relax.const(np.linspace(low, 1, width, dtype="float32")) for low in (0.5, -1))
    return op.nn.layer_norm(x, scale, bias, [-1])


def padded_softmax(shape: tuple[int, ...]) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(op.nn.softmax(x, -1)))
        builder.emit_func_output(result)
    with target():
        made = relax.transform.LegalizeOps({"relax.nn.softmax": softmax})(builder.get())
    (kernel,) = (f for f in made.functions.values() if isinstance(f, tvm.tirx.PrimFunc))
    return tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})


def check(module: tvm.IRModule, machine: Machine, rows: bool) -> None:
    for number, schedule in enumerate(islice(cpu_schedules(module, machine, 2), 2)):
        script = schedule.mod.script()
        if number == 0:
            assert (script.count("T.parallel") == 1 and "_rf_rf" in script) == rows
        assert verify_kernel(module, trace_to_json(schedule.trace), target(), seed=1).ok


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("norm", [rms_norm, layer_norm, lambda e, x: op.nn.softmax(x, -1)])
def test_a_row_is_read_once(norm: Callable[[Any, Any], Any], machine: str) -> None:
    (module,) = kernels(norm, f32(3, 250, 64))
    check(module, MACHINES[machine], rows=True)


@pytest.mark.parametrize("length", [17, 49, 197, 1500])
def test_a_softmax_of_odd_rows_is_computed_in_whole_vectors(length: int) -> None:
    module = padded_softmax((4, 250, length))
    check(module, MACHINES["avx512"], rows=length > 32)


@pytest.mark.parametrize(
    "shape",
    [(2, 40, 10_000), (64, 6)],
    ids=["rows beyond the near caches", "rows shorter than a vector"],
)
def test_others_are_computed_stage_by_stage(shape: tuple[int, ...]) -> None:
    (module,) = kernels(lambda e, x: op.nn.softmax(x, -1), f32(*shape))
    check(module, MACHINES["avx512"], rows=False)


def test_a_product_is_not_taken_for_a_row() -> None:
    (module,) = kernels(lambda e, x, w: op.nn.relu(e(op.matmul(x, w))), f32(64, 96), f32(96, 64))
    check(module, MACHINES["avx512"], rows=False)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("length", [5, 21, 64])
def test_softmax_as_onnxruntime(axis: int, length: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, length, length)).astype(np.float32)
    x[0, 1] *= 1e4
    x[0, 2, 3:] = -np.inf  # a mask
    x[1, :, 4] = -3e38
    x[1, 1, 1] = np.inf
    x[1, 2, 2] = np.nan
    assert_correct(node_model("Softmax", {"x": x}, {}, [("y", F32)], 18, axis=axis), {"x": x})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_is_nan(dtype: str) -> None:
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 0, 6e4, -1], dtype)
    expected = [np.isnan(x)]
    assert_correct(node_model("IsNaN", {"x": x}, {}, [("y", BOOL)], 18), {"x": x}, expected)
