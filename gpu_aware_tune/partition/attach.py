"""The share of a GPU that a finished library runs in, opened in the process that uses it.

A green context can be opened at any time. An MPS limit and a MIG instance are decided before a
process uses CUDA, so where a library wants one of those this process either is in it already, or is
told how to be started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.partition.base import Partition
from gpu_aware_tune.partition.device import from_facts
from gpu_aware_tune.partition.driver import started_driver
from gpu_aware_tune.partition.full import FullPartition
from gpu_aware_tune.partition.gpu_query import GpuFacts, read_gpus
from gpu_aware_tune.partition.green import plan_partitions
from gpu_aware_tune.partition.shares import Share, mps_percentage

IN_PROCESS = ("green", "full")  # what a running process can open, one beside the other


def partition_for(
    manifest: Mapping[str, Any],
    units: int | None = None,
    backend: str | None = None,
    index: int = 0,
) -> Partition | None:
    """Open the partition that a library should run in, entered and verified, in this thread.

    The caller runs the library inside `partition.timing_context()`, waits with `partition.sync()`
    before it reads results, and calls `partition.close()` at the end, all in one thread.

    Args:
        manifest: of the library's folder; its "device" and "backend" count.
        units: the SMs wanted; by default the ones this process sees.
        backend: in place of the manifest's: "green", "full", "mps" or "mig".
        index: which of the GPUs this process sees.

    Returns:
        The partition, or None for a library that runs on CPU cores.

    Raises:
        UserError: another backend, or more SMs than there are.
        SetupError: no GPU is here, it is not the one that the library is for, or this process would
            have to be started differently; the text says how.
    """
    if not str(manifest.get("device", "llvm")).startswith("cuda"):
        return None
    backend = backend or str(manifest.get("backend", "full"))
    gpu = _gpu(index)
    wanted = gpu.sm_count if units is None else units
    if backend not in (*IN_PROCESS, "mps", "mig"):
        raise UserError(f"partition {backend!r} is not known; allowed: green, full, mps, mig")
    if not 1 <= wanted <= gpu.sm_count:
        raise UserError(f"{wanted} SMs were asked for; this process sees {gpu.sm_count}")
    partition = _partition(gpu, wanted, backend)
    try:
        partition.enter_worker()
        partition.verify()
    except BaseException:
        partition.close()
        raise
    return partition


def visible_sm_count(index: int = 0) -> int:
    """SMs this process may use on a GPU, within its MPS limit or MIG instance; 0 without a GPU."""
    try:
        return _gpu(index).sm_count
    except SetupError:
        return 0


def _gpu(index: int) -> GpuFacts:
    gpus = read_gpus(started_driver())
    if not 0 <= index < len(gpus):
        raise SetupError(f"there is no GPU {index}: this process sees {len(gpus)}")
    return gpus[index]


def _partition(gpu: GpuFacts, units: int, backend: str) -> Partition:
    """Not entered yet."""
    device = from_facts(gpu)
    if units == gpu.sm_count:  # the whole of what is visible, whatever has limited it
        return FullPartition(Share(100, units, device))
    percent = max(1, 100 * units // gpu.sm_count)
    step = gpu.sm_step
    fits_green = units % step == 0 and units >= gpu.sm_min
    if backend == "mps":
        advice = f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE={mps_percentage(units, gpu.sm_count)}"
        raise SetupError(
            f"{units} of {gpu.sm_count} SMs under MPS are given to a process before it starts: start"
            f" it with an MPS daemon and {advice}, or take partition"
            f" {'green' if fits_green else 'full'}"
        )
    if backend == "mig":
        raise SetupError(
            f"no MIG instance of {units} SMs is visible: start the process with"
            " CUDA_VISIBLE_DEVICES=MIG-... (nvidia-smi -L lists them)"
        )
    if backend == "full":
        raise UserError(f"partition full is all {gpu.sm_count} SMs, not {units}: take green")
    if not fits_green:
        raise UserError(
            f"a green context of {units} SMs cannot be had here: multiples of {step} from"
            f" {gpu.sm_min} on, or partition full"
        )
    (partition,) = plan_partitions([Share(percent, units, device)], False)
    return partition
