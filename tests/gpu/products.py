"""float16 matrix products by TVM and by cuBLAS, compared with float64 on the CPU."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_ALLOWED = 2.0**-10 * 40  # of the largest value: float16 results of float16 sums


def errors_of(lab: Any, lane: Any, sizes: list[int]) -> dict[str, Any]:
    """The worst relative error of each way over square products of `sizes`."""
    found: dict[str, Any] = {"units": lane.units}
    tvm_errors, cublas_errors = {}, {}
    for size in sizes if not lab.mock else [64]:
        rng = np.random.default_rng(size)
        a, b = (rng.standard_normal((size, size)).astype("float16") for _ in range(2))
        wanted = a.astype("float64") @ b.astype("float64")
        scale = np.abs(wanted).max()
        tvm_errors[size] = float(np.abs(_by_tvm(lane, a, b) - wanted).max() / scale)
        by_cublas = _by_cublas(lane, a, b) if not lab.mock else None
        if by_cublas is not None:
            cublas_errors[size] = float(np.abs(by_cublas - wanted).max() / scale)
    found["tvm"] = _judged(tvm_errors)
    if cublas_errors:
        found["cublas"] = _judged(cublas_errors)
    return found


def _judged(errors: dict[int, float]) -> dict[str, Any]:
    return {"right": max(errors.values()) < _ALLOWED, "errors": errors}


def _by_tvm(lane: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    from gpu_aware_tune.workers.warm import load_tvm

    load_tvm()
    import tvm
    from tvm import te

    from gpu_aware_tune.codegen.cuda_toolchain import environment, export_module
    from gpu_aware_tune.kernels.schedules import baseline_schedules

    size = a.shape[0]
    x, y = (te.placeholder((size, size), name=name, dtype="float16") for name in "xy")
    k = te.reduce_axis((0, size), name="k")
    function = te.create_prim_func(
        [x, y, te.compute((size, size), lambda i, j: te.sum(x[i, k] * y[k, j], k), name="z")]
    )
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    partition = lane.partition
    device = partition.share.device
    target = tvm.target.Target(device.target(lane.units))
    scheduled = [schedule.mod for schedule in baseline_schedules(module, target, most=1)]
    os.environ.update(environment())
    built = tvm.tirx.build(*scheduled or [module], target=target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.so"
        export_module(built, path, device.arch)
        built = tvm.runtime.load_module(str(path))
    where = tvm.device(partition.tvm_device, partition.ordinal)
    args = [tvm.runtime.tensor(each, where) for each in (a, b, np.zeros_like(a))]
    where.sync()
    with partition.timing_context():
        built["main"](*args)
    partition.sync()
    result: np.ndarray = args[2].numpy().astype("float64")
    return result


def _by_cublas(lane: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """None where torch, which brings cuBLAS, is not installed with CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    left, right = (torch.from_numpy(each).cuda() for each in (a, b))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.ExternalStream(lane.partition.stream)):
        product = left @ right
    lane.wait()
    result: np.ndarray = product.cpu().numpy().astype("float64")
    return result
