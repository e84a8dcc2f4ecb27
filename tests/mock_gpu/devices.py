"""Devices and partitions of tests that touch no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from gpu_aware_tune.partition import Device, NullPartition, Share
from gpu_aware_tune.partition.driver import DriverError

H200_SMS = 132
MOCK_UUID = "GPU-07070707-0707-0707-0707-070707070707"  # of the mock GPU, which NVML is asked for


def null_device(units_total: int = 10) -> Device:
    """The device of `NullPartition`."""
    return Device("null", 0, "null", "null", units_total, "core")


def fake_gpu(sms: int = H200_SMS) -> Device:
    """A GPU as `find_device` describes a real one."""
    return Device(
        "cuda", 0, "NVIDIA H200", "sm_90a", sms, "SM", uuid=MOCK_UUID, unit_min=8, unit_step=8
    )


class FaultyPartition(NullPartition):
    """Kernels run on the CPU; while the file `fault` exists, the next launch fails as it says.

    The file holds a result code and its name ("700 CUDA_ERROR_ILLEGAL_ADDRESS") and is removed.
    """

    faults_last: ClassVar[bool] = True

    def __init__(self, share: Share, fault: Path) -> None:
        super().__init__(share)
        self._fault = fault

    def launch_timer(self, launch: Callable[[], object], cold: bool = False) -> None:
        """No timer of its own, but the fault."""
        if self._fault.exists():
            code, name = self._fault.read_text().split(maxsplit=1)
            self._fault.unlink()
            raise DriverError("cuStreamSynchronize", int(code), name)
