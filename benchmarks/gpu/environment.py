"""What the figures of a GPU benchmark depend on, for its results file."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_aware_tune.partition import Nvml
from gpu_aware_tune.partition.gpus import query_gpus

# TVM builds an extension for torch at its import, where torch is older: a minute in each process.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

RESULTS = Path(__file__).resolve().parents[1] / "results"
NO_GPU = 3  # exit code where there is none
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "cuda-bindings", "nvidia-cuda-nvrtc", "torch",
             "onnxruntime", "onnxruntime-gpu", "numpy", "gpu-aware-tune")  # fmt: skip


def environment() -> dict[str, Any]:
    """Device, driver, versions, date and load."""
    gpus, reason = query_gpus()
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "gpus": [dataclasses.asdict(gpu) for gpu in gpus],
        "no_gpu_because": reason,
    }
    if gpus:
        with Nvml(0) as nvml:
            about["gpu_now"] = dataclasses.asdict(nvml.snapshot())
    return about


def gpu_name() -> str | None:
    """The first GPU's name as a part of a file name; None without a GPU."""
    gpus, _ = query_gpus()
    return re.sub(r"[^a-z0-9]+", "-", gpus[0].name.lower()).strip("-") if gpus else None


def require_gpu(null: bool) -> bool:
    """Whether to go on; says so in one line where there is no GPU and the null device is not meant."""
    if null or gpu_name() is not None:
        return True
    _, reason = query_gpus()
    print(f"skipped: this benchmark needs an NVIDIA GPU ({reason}); --null tries it without")
    return False


def write_results(name: str, figures: dict[str, Any], null: bool, folder: Path = RESULTS) -> Path:
    """Write a results file named by benchmark, device and date; again after each further figure."""
    device = "null" if null else gpu_name() or "none"
    path = folder / f"{name}-{device}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")  # what is there stays whole, whenever this process is ended
    fresh.write_text(json.dumps({"about": environment(), **figures}, indent=1) + "\n")
    fresh.replace(path)
    return path


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
