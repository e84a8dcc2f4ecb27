"""Products of extents that no tile divides: computed a little larger, with the same results."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tvm
import tvm_ffi
from test_schedules import CASES, f32, kernels
from tiny_library import target
from tvm.relax import op

from gpu_aware_tune.finalize.kernel_check import verify_kernel
from gpu_aware_tune.kernels.packing import PACKING, without_packing
from gpu_aware_tune.kernels.schedules import baseline_schedules
from gpu_aware_tune.kernels.schedules.blocks import block_of, inline_elementwise
from gpu_aware_tune.kernels.schedules.padding import pad_product
from gpu_aware_tune.kernels.schedules.reductions import Reduction
from gpu_aware_tune.kernels.schedules.tile_cost import Machine
from gpu_aware_tune.kernels.traces import apply_trace, trace_to_json

MACHINE = Machine(16, 32, 2)


def product(e: Any, x: Any, w: Any, *bias: Any) -> Any:
    result = op.matmul(x, w)
    return op.add(e(result), bias[0]) if bias else result


def scores(e: Any, q: Any, k: Any) -> Any:
    return op.divide(e(op.matmul(q, k)), tvm.relax.const(8.0))


ODD: dict[str, tuple[Any, ...]] = {
    "rows": (product, f32(197, 64), f32(64, 96), f32(96)),
    "rows, no reader": (product, f32(197, 64), f32(64, 96)),
    "rows and columns": (scores, f32(2, 197, 32), f32(2, 32, 197)),
    "windows": (scores, f32(6, 49, 32), f32(6, 32, 49)),
    "with a costly reader": (
        lambda e, x, w: op.tanh(e(op.matmul(x, w))),
        f32(37, 64),
        f32(64, 96),
    ),
    "what is made in the kernel": (
        lambda e, x, w: op.matmul(e(op.multiply(x, x)), w),
        f32(61, 64),
        f32(64, 48),
    ),
}


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("name", ODD)
def test_a_padded_product_computes_the_same(name: str, inputs: int) -> None:
    make, *specs = ODD[name]
    for module in kernels(make, *specs, inputs=inputs):
        for schedule in baseline_schedules(module, target(), most=3):
            trace = trace_to_json(schedule.trace)
            assert tvm_ffi.structural_equal(apply_trace(trace, module).mod, schedule.mod)
            check = verify_kernel(module, trace, target(), seed=1)
            assert check.ok, check
            tvm.tirx.build(without_packing(schedule.mod), target=target())


def padding(*case: Any, inputs: int | None = None) -> list[list[int]]:
    """The extents that products get where TVM is asked for tiles of 16 lanes."""
    make, *specs = case
    found = []
    for module in kernels(make, *specs, inputs=inputs):
        schedule = tvm.s_tir.Schedule(module)
        inline_elementwise(schedule)
        padded = pad_product(schedule, "matmul", MACHINE)
        found += [[axis.extent for axis in Reduction(padded, "matmul", MACHINE).axes]]
    return found


def test_primes_become_multiples_of_a_tile() -> None:
    ((rows, columns, terms),) = padding(*ODD["rows"])
    assert 197 < rows <= 208
    assert (columns, terms) == (96, 64)
    ((_, rows, columns, _),) = padding(*ODD["rows and columns"])
    assert 197 < rows <= 208 and columns in (200, 208)


def test_what_tiles_divide_stays_as_it_is() -> None:
    assert padding(product, f32(192, 64), f32(64, 96)) == [[192, 96, 64]]


def test_terms_and_weights_are_never_padded() -> None:
    ((rows, columns, terms),) = padding(product, f32(197, 37), f32(37, 150), inputs=1)
    assert rows > 197
    assert (columns, terms) == (150, 37)


def test_weights_of_a_padded_product_are_packed_at_load() -> None:
    make, *specs = ODD["rows"]
    (module,) = kernels(make, *specs, inputs=1)
    wide = tvm.target.Target({"kind": "llvm", "mcpu": "skylake-avx512", "num-cores": 2})
    (schedule,) = baseline_schedules(module, wide, most=1)  # 8 lanes leave less to gain
    trace = trace_to_json(schedule.trace)
    assert "PadEinsum" in [name for name, *_ in json.loads(trace)[0]]
    assert PACKING in trace


def test_a_convolution_is_left_alone() -> None:
    make, specs = CASES["conv of prime width, batch 2"]
    (module,) = kernels(make, *specs)
    schedule = tvm.s_tir.Schedule(module)
    inline_elementwise(schedule)
    assert pad_product(schedule, "conv2d_nchw", MACHINE) is schedule
    assert block_of(schedule, "conv2d_nchw") is not None
