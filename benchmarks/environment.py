"""What the figures of a benchmark depend on beside the code: the machine, the versions, the time.

    python -m benchmarks.environment        # prints it

Every results file has this object under "environment", always with the same keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# TVM builds an extension for torch at its import, where torch is older: a minute in each process.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NO_GPU = 3  # exit code where there is none
PACKAGES = {  # each by the distributions that can give it
    "tvm": ("apache-tvm",),
    "tvm_ffi": ("apache-tvm-ffi",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime",),
    "xgboost": ("xgboost-cpu", "xgboost"),
    "numpy": ("numpy",),
    "cuda_bindings": ("cuda-bindings",),
    "nvrtc": ("nvidia-cuda-nvrtc",),
    "torch": ("torch",),
}


def environment(target: str = "llvm") -> dict[str, Any]:
    """Return the environment of a benchmark as plain JSON values; what is unknown is None.

    Args:
        target: where the kernels ran: "llvm" for this machine's CPU, "cuda" for its GPU.
    """
    from gpu_aware_tune.partition import Nvml, find_device

    device, _ = find_device(target, 0, None)
    with Nvml(0) as nvml:
        now = nvml.snapshot()
    return {
        "device": device.key,
        "device_name": device.name,
        "units": device.units_total,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "gpus": gpus(),
        "gpu_now": dataclasses.asdict(now),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(*names) for name, names in PACKAGES.items()},
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's name as the kernel gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found.group(1).strip() if found else None


def version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def commit(folder: Path = ROOT) -> str | None:
    """The commit of a checkout, with "+changes" where tracked files differ from it."""
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", ":!benchmarks/results"], check=False
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.returncode else "")


def gpus() -> list[dict[str, str]]:
    """Name and driver of each GPU as NVML tells them; none where there is no driver."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError), contextlib.ExitStack() as undo:
        pynvml.nvmlInit()
        undo.callback(pynvml.nvmlShutdown)
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [{"name": str(pynvml.nvmlDeviceGetName(h)), "driver": driver} for h in handles]
    return []


def write_results(path: Path, about: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write a results file whole or not at all; `about` is what `environment` gave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"environment": about, **facts}, indent=1) + "\n")
    os.replace(partial, path)


def gpu_results(name: str, folder: Path = RESULTS, null: bool = False) -> Path:
    """The results file of a GPU benchmark, named by benchmark, device and date."""
    found = gpus()
    device = "null" if null else found[0]["name"].lower() if found else "none"
    device = re.sub(r"[^a-z0-9]+", "-", device).strip("-")
    return folder / f"{name}-{device}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"


def stamp(about: dict[str, Any]) -> dict[str, Any]:
    """When and from which commit one entry of a results file that grows over calls was made."""
    return {"commit": about["commit"], "date": about["date"]}


if __name__ == "__main__":
    print(json.dumps(environment(), indent=1))
