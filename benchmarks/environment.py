"""What the figures of a benchmark depend on beside the code: the machine, the versions, the time.

    python benchmarks/environment.py        # prints it

Every results file has this object under "environment", always with the same keys.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PACKAGES = {  # each by the distributions that can give it
    "tvm": ("apache-tvm",),
    "tvm_ffi": ("apache-tvm-ffi",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime",),
    "xgboost": ("xgboost-cpu", "xgboost"),
    "numpy": ("numpy",),
}


def environment(target: str = "llvm") -> dict[str, Any]:
    """Return the environment of a benchmark as plain JSON values; what is unknown is None.

    Args:
        target: where the kernels ran: "llvm" for this machine's CPU, "cuda" for its GPU.
    """
    from gpu_aware_tune.partition import find_device

    device, _ = find_device(target, 0, None)
    return {
        "device": device.key,
        "device_name": device.name,
        "units": device.units_total,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "gpus": gpus(),
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


def gpus() -> list[dict[str, str | None]]:
    """Name and driver of each GPU as nvidia-smi tells them; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1]
    return [{"name": name.strip(), "driver": driver.strip()} for name, driver in rows]


def write_results(path: Path, about: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write a results file whole or not at all; `about` is what `environment` gave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"environment": about, **facts}, indent=1) + "\n")
    os.replace(partial, path)


def stamp(about: dict[str, Any]) -> dict[str, Any]:
    """When and from which commit one entry of a results file that grows over calls was made."""
    return {"commit": about["commit"], "date": about["date"]}


if __name__ == "__main__":
    print(json.dumps(environment(), indent=1))
