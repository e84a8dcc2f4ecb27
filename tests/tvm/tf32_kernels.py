"""Kernels whose products may be in TF32, and candidates of their search space.

`python tf32_kernels.py NAME COUNT` runs candidates on the GPU of its environment and prints, for each
on the tensor cores, how far its result is from float32's on rounded factors.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gpu_aware_tune.codegen import cuda_toolchain
from gpu_aware_tune.workers.warm import load_tvm

if __name__ == "__main__":
    cuda_toolchain.preload_runtime()
    os.environ.update(cuda_toolchain.environment())
load_tvm()

import tvm  # noqa: E402
from mock_gpu.devices import fake_gpu  # noqa: E402
from tvm import te, topi  # noqa: E402
from tvm.s_tir.schedule import Schedule  # noqa: E402

from benchmarks.draws import random_schedules  # noqa: E402
from gpu_aware_tune.finalize.kernel_check import difference, kernel_inputs  # noqa: E402
from gpu_aware_tune.kernels.space import make_space  # noqa: E402
from gpu_aware_tune.kernels.tf32 import MARK, TF32_INTRINSICS  # noqa: E402
from gpu_aware_tune.kernels.traces import trace_to_json  # noqa: E402

CUDA = tvm.target.Target(fake_gpu().target(40))
ARCH = str(CUDA.attrs["arch"])


def matmul(rows: int, columns: int, terms: int, dtype: str = "float32") -> Any:
    a = te.placeholder((rows, terms), name="a", dtype=dtype)
    b = te.placeholder((terms, columns), name="b", dtype=dtype)
    k = te.reduce_axis((0, terms), name="k")
    c = te.compute((rows, columns), lambda i, j: te.sum(a[i, k] * b[k, j], k), name="c")
    return te.create_prim_func([a, b, c])


def convolution(channels: int, size: int, filters: int, kernel: int, stride: int) -> Any:
    """With padding, a bias and ReLU behind it."""
    x = te.placeholder((1, channels, size, size), name="x")
    w = te.placeholder((filters, channels, kernel, kernel), name="w")
    bias = te.placeholder((1, filters, 1, 1), name="bias")
    y = topi.nn.relu(topi.add(topi.nn.conv2d_nchw(x, w, stride, kernel // 2, 1), bias))
    return te.create_prim_func([x, w, bias, y])


FUNCTIONS = {
    "matmul": lambda: matmul(64, 48, 64),
    "shapes that tiles do not divide": lambda: matmul(5, 36, 44),
    "convolution": lambda: convolution(12, 9, 20, 3, 2),
}


def module_of(function: Any, marked: bool = True) -> tvm.IRModule:
    """The kernel as a task."""
    function = function.with_attr("global_symbol", "main")
    return tvm.IRModule({"main": function.with_attr(MARK, 1) if marked else function})


def on_tensor_cores(module: tvm.IRModule, count: int) -> list[tuple[str, Schedule]]:
    """Of so many random candidates those whose products are in TF32."""
    drawn = random_schedules(module, CUDA, make_space(module, CUDA, 40), count, seed=3)
    found = [(trace_to_json(schedule.trace), schedule) for schedule in drawn]
    return [(trace, schedule) for trace, schedule in found if TF32_INTRINSICS in trace]


def rounded(values: np.ndarray) -> np.ndarray:
    """To TF32: to nearest, ties away from zero, 13 bits of the mantissa gone."""
    bits = (values.view(np.uint32).astype(np.uint64) + 0x1000) & 0xFFFFE000
    return bits.astype(np.uint32).view(np.float32)


def run(module: Any, arrays: list[np.ndarray], device: Any) -> np.ndarray:
    """The result of a built kernel."""
    placed = [tvm.runtime.tensor(array, device) for array in arrays]
    module["main"](*placed)
    return placed[-1].numpy()


def differences(module: tvm.IRModule, count: int) -> dict[str, Any]:
    """How far TF32 kernels are from float32's on rounded factors, and those from exact ones."""
    arrays = kernel_inputs(module, seed=1)
    plain = tvm.tirx.build(module, target="llvm")
    exact = run(plain, arrays, tvm.cpu())
    wanted = run(plain, [*map(rounded, arrays[:2]), *arrays[2:]], tvm.cpu())
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (trace, schedule) in enumerate(on_tensor_cores(module, count)):
            path = Path(folder) / f"{number}.so"
            cuda_toolchain.export_module(tvm.tirx.build(schedule.mod, target=CUDA), path, ARCH)
            got = run(tvm.runtime.load_module(str(path)), arrays, tvm.cuda())
            ahead = "software_pipeline_stage" in trace
            kernels.append({"ahead": ahead, "difference": difference(got, wanted)})
    return {"rounding": difference(wanted, exact), "kernels": kernels}


if __name__ == "__main__":
    print(json.dumps(differences(module_of(FUNCTIONS[sys.argv[1]]()), int(sys.argv[2]))))
