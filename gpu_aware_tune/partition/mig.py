"""A share of a GPU as a MIG instance that is already there: its own SMs, L2 slice, memory and fault
domain.

Making instances needs root and is the administrator's business; the tuner only uses what it finds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.gpu_partition import GpuPartition
from gpu_aware_tune.partition.nvml import load_nvml
from gpu_aware_tune.partition.shares import Share


@dataclass(frozen=True)
class MigInstance:
    """One MIG instance, as CUDA_VISIBLE_DEVICES names it."""

    uuid: str
    name: str
    sm_count: int
    memory_mib: int


class MigPartition(GpuPartition):
    """One MIG instance; each needs a worker process of its own."""

    backend: ClassVar[str] = "mig"
    one_worker: ClassVar[bool] = False

    def __init__(self, share: Share, instance: MigInstance) -> None:
        super().__init__(share)
        self.instance = instance

    def env(self) -> dict[str, str]:
        """Show the worker this instance only."""
        return {"CUDA_VISIBLE_DEVICES": self.instance.uuid}

    def enter_worker(self) -> None:
        """Start the driver; `env()` must have been set before this process uses CUDA."""
        if os.environ.get("CUDA_VISIBLE_DEVICES") != self.instance.uuid:
            raise SetupError(
                "a MIG worker must be started with CUDA_VISIBLE_DEVICES set: see env()"
            )
        super().enter_worker()

    def verify(self) -> None:
        """Check that the one device this process sees has the instance's SMs."""
        self._check_sms(f"MIG instance {self.instance.name}")
        self._probe_sms(f"MIG instance {self.instance.name}")


def find_instances(index: int) -> list[MigInstance]:
    """The MIG instances of a GPU, smallest first; raises `SetupError` where there are none."""
    nvml = load_nvml()
    try:
        with _started(nvml):
            gpu = nvml.nvmlDeviceGetHandleByIndex(index)
            current, _pending = nvml.nvmlDeviceGetMigMode(gpu)
            found = list(_instances(nvml, gpu)) if current else []
    except nvml.NVMLError as error:
        raise SetupError(f"MIG is not available: {error}") from error
    if not found:
        raise SetupError(
            f"GPU {index} has no MIG instances: an administrator makes them (nvidia-smi mig -cgi)"
        )
    return sorted(found, key=lambda instance: (instance.sm_count, instance.uuid))


def choose_instance(instances: Sequence[MigInstance], wanted_sms: int) -> MigInstance:
    """The largest instance within `wanted_sms`, or the smallest one where all are larger."""
    fitting = [instance for instance in instances if instance.sm_count <= wanted_sms]
    return (
        max(fitting, key=lambda i: i.sm_count)
        if fitting
        else min(instances, key=lambda i: i.sm_count)
    )


def place(shares: Sequence[Share], disjoint: bool) -> list[MigPartition]:
    """Give each share an instance of exactly its size; side by side, no instance serves two."""
    free = find_instances(shares[0].device.index)
    partitions = []
    for share in shares:
        fitting = [instance for instance in free if instance.sm_count == share.units]
        if not fitting:
            sizes = ", ".join(str(instance.sm_count) for instance in free) or "none"
            raise SetupError(f"no free MIG instance has {share.units} SMs; free ones have: {sizes}")
        if disjoint:
            free.remove(fitting[0])
        partitions.append(MigPartition(share, fitting[0]))
    return partitions


def _instances(nvml: Any, gpu: Any) -> Iterator[MigInstance]:
    for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, slot)
        except nvml.NVMLError:
            continue  # an empty slot
        facts = nvml.nvmlDeviceGetAttributes_v2(handle)
        yield MigInstance(
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            sm_count=int(facts.multiprocessorCount),
            memory_mib=int(facts.memorySizeMB),
        )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextlib.contextmanager
def _started(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()
