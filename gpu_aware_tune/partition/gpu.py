"""What the GPU backends have in common: entering through the driver, counting SMs, waiting."""

from __future__ import annotations

from typing import Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.base import Partition
from gpu_aware_tune.partition.driver import (
    call,
    mps_is_on,
    quietly,
    started_driver,
    visible_sms,
)


class GpuPartition(Partition):
    """Holds the driver between `enter_worker` and `close`; a pickled copy starts without it."""

    tvm_device = "cuda"
    _driver: Any = None

    def enter_worker(self) -> None:
        """Start the driver and make the device's primary context current, as TVM's calls do."""
        if self._driver is not None:
            return
        driver = started_driver()
        device = call(driver.cuDeviceGet, self.ordinal)
        context = call(driver.cuDevicePrimaryCtxRetain, device)
        self._driver = driver
        call(driver.cuCtxSetCurrent, context)

    def sync(self) -> None:
        """Wait for the device; raises what a kernel left behind."""
        call(self._entered().cuCtxSynchronize)

    def close(self) -> None:
        """Let go of the primary context; it lives on as long as TVM uses it."""
        driver, self._driver = self._driver, None
        if driver is not None:
            quietly(driver.cuDevicePrimaryCtxRelease, call(driver.cuDeviceGet, self.ordinal))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_driver": None}

    def _entered(self) -> Any:
        if self._driver is None:
            raise SetupError(
                "this process has not entered the partition: call enter_worker() first"
            )
        return self._driver

    def _check_sms(self, what: str) -> None:
        """Refuse when this process sees another number of SMs than the share promises."""
        got = visible_sms(self._entered(), self.ordinal)
        if got != self.share.units:
            raise SetupError(f"{what} gives {got} SMs where {self.share.units} were promised")

    def _check_mps(self, expected: bool, advice: str) -> None:
        if mps_is_on(self._entered(), self.ordinal) != expected:
            state = "does not run" if expected else "runs"
            raise SetupError(f"this process {state} under an MPS server: {advice}")
