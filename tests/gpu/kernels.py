"""Artifacts as the build workers make them: kernels that are right, illegal, endless or too large."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tvm
from tvm import te

from gpu_aware_tune.codegen import cuda_toolchain
from gpu_aware_tune.measure import Job
from gpu_aware_tune.measure.timing import SEARCH
from gpu_aware_tune.partition import Device

ELEMENTS = 1 << 20
_REPLACED = {
    "good": None,
    "illegal": "*(volatile float *)16 = 1.0f;",
    "hang": "while (*(volatile float *)p > -1.0f) { }",
}


def artifact(folder: Path, device: Device, kind: str) -> str:
    """A library whose "main" doubles its input, or does what `kind` says instead."""
    os.environ.update(cuda_toolchain.environment())
    x = te.placeholder((ELEMENTS,), name="x")
    function = te.create_prim_func([x, te.compute((ELEMENTS,), lambda i: x[i] * 2.0, name="y")])
    schedule = tvm.s_tir.Schedule(function)
    outer, inner = schedule.split(schedule.get_loops("y")[0], [None, 256])
    schedule.bind(outer, "blockIdx.x")
    schedule.bind(inner, "threadIdx.x")
    built = tvm.tirx.build(schedule.mod, target=tvm.target.Target(device.target(8)))
    path = folder / f"{kind}.so"
    compile_cubin = cuda_toolchain.compile_cubin

    def spoiled(source: str, arch: str) -> bytes:
        body = _REPLACED[kind]
        if body is not None:
            source = _with_body(source, body)
        return compile_cubin(source, arch)

    cuda_toolchain.compile_cubin = spoiled
    try:
        cuda_toolchain.export_module(built, path, device.arch)
    finally:
        cuda_toolchain.compile_cubin = compile_cubin
    return str(path)


def _with_body(source: str, body: str) -> str:
    """The last kernel of a source with another body; `p` is its first buffer."""
    head, brace, _ = source.rpartition("main_kernel(")[0], "main_kernel(", None
    tail = source[len(head) + len(brace) :]
    arguments, _, _rest = tail.partition("{")
    first = arguments.split(",")[0].split()[-1].strip(") ")
    return f"{head}{brace}{arguments}{{ float *p = (float *){first}; {body} }}\n"


def job(path: str, elements: int = ELEMENTS, **changes: Any) -> Job:
    """What measures an artifact; `elements` other than its own only for inputs that do not fit."""
    shape = ((elements,), "float32")
    return Job(path, (shape, shape), f"task-{elements}", None, changes.get("timing", SEARCH))
