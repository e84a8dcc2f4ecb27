"""The search space for GPUs: grids that fit the share's SMs, tensor cores for float16 only."""

from __future__ import annotations

import re
from typing import Any

import tvm
from mock_gpu.devices import fake_gpu
from tf32_kernels import matmul, module_of
from tvm import te

from benchmarks.draws import random_schedules
from gpu_aware_tune.kernels.space import make_space, whole_waves

SMS = 40


def designs(function: Any, units: int) -> list[Any]:
    target = tvm.target.Target(fake_gpu().target(units))
    module = module_of(function, marked=False)
    space = make_space(module, target, units)
    return [schedule.mod for schedule in random_schedules(module, target, space, 4, seed=3)]


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
    half = [module.script() for module in designs(matmul(256, 256, 256, "float16"), SMS)]
    single = [module.script() for module in designs(matmul(256, 256, 256, "float32"), SMS)]
    assert any("wmma" in text or "mma" in text for text in half)
    assert single and not any("mma" in text for text in single)
