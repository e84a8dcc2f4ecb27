"""What this machine's GPUs are, asked in a child process so that this one stays free of CUDA.

`python -m gpu_aware_tune.partition.gpu_query` prints the answer as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.driver import DriverError, attribute, call, started_driver

_QUERY_TIMEOUT_S = (
    60.0  # the first cuInit after boot, without the persistence daemon, takes seconds
)

_GREEN_SINCE = 12040  # CUDA 12.4


@dataclass(frozen=True)
class GpuFacts:
    """One GPU as its driver describes it."""

    index: int
    name: str
    uuid: str
    arch: str
    sm_count: int
    sm_min: int  # smallest group an SM split gives
    sm_step: int  # granularity of that split
    mps: bool  # whether this process already reaches it through an MPS server
    green: bool  # whether driver and bindings know green contexts
    driver_version: int  # 13000 for CUDA 13.0
    max_threads: int = 1024  # of a block
    shared_bytes: int = 49152  # of a block that does not opt in to more
    registers: int = 65536  # of a block
    warp_size: int = 32


@functools.cache
def query_gpus() -> tuple[tuple[GpuFacts, ...], str]:
    """This machine's GPUs, and why there are none where there are none; never raises."""
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "gpu_aware_tune.partition.gpu_query"]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_QUERY_TIMEOUT_S,
            check=False,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return (), f"the driver gave no answer in {_QUERY_TIMEOUT_S:.0f} s"
    except (OSError, ValueError):
        return (), f"asking the driver ended with exit code {done.returncode}"
    gpus = tuple(GpuFacts(**facts) for facts in answer["gpus"])
    return gpus, answer["reason"]


def answer() -> dict[str, Any]:
    """The facts of all GPUs, or the reason for none, in a form that JSON holds."""
    try:
        gpus = read_gpus(started_driver())
    except SetupError as error:
        return {"gpus": [], "reason": str(error)}
    reason = "" if gpus else "the driver lists no GPU"
    return {"gpus": [dataclasses.asdict(gpu) for gpu in gpus], "reason": reason}


def read_gpus(driver: Any) -> list[GpuFacts]:
    """Ask a started driver about every GPU it shows this process."""
    version = int(call(driver.cuDriverGetVersion))
    return [_read(driver, index, version) for index in range(call(driver.cuDeviceGetCount))]


def _read(driver: Any, index: int, version: int) -> GpuFacts:
    device = call(driver.cuDeviceGet, index)
    major = attribute(driver, "COMPUTE_CAPABILITY_MAJOR", device)
    minor = attribute(driver, "COMPUTE_CAPABILITY_MINOR", device)
    least, step = granularity(_sm_resource(driver, device), major)
    name = call(driver.cuDeviceGetName, 128, device).split(b"\0")[0].decode()
    return GpuFacts(
        index=index,
        name=name,
        uuid=_uuid(call(driver.cuDeviceGetUuid, device), name),
        # The "a" variant holds the card's own tensor core instructions; it exists from 9.0 on.
        arch=f"sm_{major}{minor}" + ("a" if major >= 9 else ""),
        sm_count=attribute(driver, "MULTIPROCESSOR_COUNT", device),
        sm_min=least,
        sm_step=step,
        mps=attribute(driver, "MPS_ENABLED", device) == 1,
        green=hasattr(driver, "cuGreenCtxCreate") and version >= _GREEN_SINCE,
        driver_version=version,
        max_threads=attribute(driver, "MAX_THREADS_PER_BLOCK", device),
        shared_bytes=attribute(driver, "MAX_SHARED_MEMORY_PER_BLOCK", device),
        registers=attribute(driver, "MAX_REGISTERS_PER_BLOCK", device),
        warp_size=attribute(driver, "WARP_SIZE", device),
    )


def _sm_resource(driver: Any, device: Any) -> Any:
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    try:
        return call(driver.cuDeviceGetDevResource, device, kind).sm
    except (DriverError, AttributeError):
        return None  # a driver before 12.4 knows no such resources


def granularity(sm: Any, major: int) -> tuple[int, int]:
    """(smallest group, step) of an SM split: as the driver tells, else as cuda.h documents it."""
    documented = (8, 8) if major >= 9 else (4, 2) if major == 8 else (2, 2)
    least = int(getattr(sm, "minSmPartitionSize", 0)) or documented[0]
    step = int(getattr(sm, "smCoscheduledAlignment", 0)) or documented[1]
    return least, step


def _uuid(uuid: Any, name: str) -> str:
    """As CUDA_VISIBLE_DEVICES takes it; of a MIG instance CUDA 13 gives its own, and names it so."""
    digits = bytes(uuid.bytes).hex()
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:32])
    return ("MIG-" if " MIG " in name else "GPU-") + "-".join(parts)


if __name__ == "__main__":
    print(json.dumps(answer()))
