"""The search space for GPUs: grids that fit the share's SMs, tensor cores for float16 only."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tvm
from tvm import te

from gpu_aware_tune.space import make_space, whole_waves
from gpu_aware_tune.testing import fake_gpu
from gpu_aware_tune.workers.warm import load_tvm

SMS = 40


@pytest.fixture(scope="module", autouse=True)
def _intrinsics() -> None:
    load_tvm()


def designs(function: Any, units: int) -> list[Any]:
    from tvm.s_tir import meta_schedule as ms

    target = tvm.target.Target(fake_gpu().target(units))
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    context = ms.TuneContext(
        mod=module,
        target=target,
        space_generator=make_space(module, target, units),
        search_strategy="replay-trace",
        rand_state=3,
        num_threads=1,
    ).clone()
    spaces = context.generate_design_space()
    context.pre_tuning(max_trials=4, num_trials_per_iter=4, design_spaces=spaces,
                       database=ms.database.MemoryDatabase(),
                       cost_model=ms.cost_model.RandomModel())  # fmt: skip
    return [candidate.sch.mod for candidate in context.generate_measure_candidates() or []]


def matmul(dtype: str) -> Any:
    a, b = (te.placeholder((256, 256), name=name, dtype=dtype) for name in "ab")
    k = te.reduce_axis((0, 256), name="k")
    product = te.compute((256, 256), lambda i, j: te.sum(a[i, k] * b[k, j], k), name="c")
    return te.create_prim_func([a, b, product])


def test_grids_fill_the_share_s_sms_a_whole_number_of_times() -> None:
    assert [whole_waves(units) for units in (8, 32, 40, 64, 96, 132)] == [
        256,
        256,
        240,
        256,
        192,
        264,
    ]
    a = te.placeholder((1 << 22,), name="a")
    scaled = te.create_prim_func([a, te.compute(a.shape, lambda i: a[i] * 2.0, name="b")])
    found = designs(scaled, SMS)
    binding = r"thread_binding\((\d+), thread=\"blockIdx"
    grids = {int(extent) for module in found for extent in re.findall(binding, module.script())}
    assert found and grids == {whole_waves(SMS)}


def test_tensor_cores_are_for_float16_alone() -> None:
    half = [module.script() for module in designs(matmul("float16"), SMS)]
    single = [module.script() for module in designs(matmul("float32"), SMS)]
    assert any("wmma" in text or "mma" in text for text in half)
    assert single and not any("mma" in text for text in single)
