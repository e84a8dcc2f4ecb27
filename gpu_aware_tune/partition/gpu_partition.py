"""What the GPU backends have in common: entering through the driver, a stream, probing, waiting."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, ClassVar

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition import probe
from gpu_aware_tune.partition.base import Partition
from gpu_aware_tune.partition.driver import (
    attribute,
    call,
    mps_is_on,
    quietly,
    started_driver,
    visible_sms,
)
from gpu_aware_tune.partition.shares import Share
from gpu_aware_tune.partition.timer import StreamTimer


class GpuPartition(Partition):
    """Holds the driver between `enter_worker` and `close`; a pickled copy starts without it.

    Everything runs on a non-blocking stream of the partition's own: the default stream cannot be
    captured into a graph, and on it a share of a GPU would not be one.
    """

    tvm_device = "cuda"
    faults_last: ClassVar[bool] = True
    _driver: Any = None
    _own_stream: Any = None
    _sentinel: probe.Sentinel | None = None

    def __init__(self, share: Share) -> None:
        super().__init__(share)
        self._sm_ids: tuple[int, ...] = ()

    @property
    def stream(self) -> int | None:
        """The raw stream that launches must use, for `tvm_ffi.use_raw_stream`."""
        return None if self._own_stream is None else int(self._own_stream)

    def env(self) -> dict[str, str]:
        """Show the worker this GPU alone, whatever its number is."""
        uuid = self.share.device.uuid
        return {"CUDA_VISIBLE_DEVICES": uuid} if uuid else {}

    def enter_worker(self) -> None:
        """Start the driver and make the device's primary context current, as TVM's calls do."""
        if self._driver is not None:
            return
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        alone = bool(shown) and shown == self.env().get("CUDA_VISIBLE_DEVICES")
        self.ordinal = 0 if alone else self.share.device.index
        driver = started_driver()
        device = call(driver.cuDeviceGet, self.ordinal)
        context = call(driver.cuDevicePrimaryCtxRetain, device)
        self._driver = driver
        call(driver.cuCtxSetCurrent, context)
        self._make_stream()

    def timing_context(self) -> contextlib.AbstractContextManager[object]:
        """Launch on this share's stream."""
        import tvm_ffi

        return tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", self.ordinal), self._entered_stream())

    def sync(self) -> None:
        """Wait for this share's stream; raises what a kernel left behind."""
        call(self._entered().cuStreamSynchronize, self._entered_stream())

    def launch_timer(self, launch: Callable[[], object], cold: bool = False) -> StreamTimer:
        """A timer of `launch` on this share's stream; call it within `timing_context()`.

        Args:
            launch: launches once and does not wait.
            cold: empty the L2 before each timed launch.
        """
        driver = self._entered()
        flush = 0
        if cold:
            device = call(driver.cuDeviceGet, self.ordinal)
            flush = 2 * attribute(driver, "L2_CACHE_SIZE", device)
        return StreamTimer(driver, self._entered_stream(), launch, flush)

    def sentinel_s(self) -> float:
        """Seconds of the sentinel kernel on this share now."""
        if self._sentinel is None:
            units = self.share.units
            self._sentinel = probe.Sentinel(self._entered(), self._entered_stream(), units)
        return self._sentinel.seconds()

    def evidence(self) -> dict[str, Any]:
        """What `verify` saw: how many SMs ran the probe kernel, and a hash of which."""
        return {
            "backend": self.backend,
            "units": self.share.units,
            "sms_seen": len(self._sm_ids),
            "sm_hash": probe.ids_hash(self._sm_ids),
        }

    def units_seen(self) -> tuple[int, ...]:
        """The numbers of the SMs that ran the probe kernel."""
        return self._sm_ids

    def close(self) -> None:
        """Let go of the stream and the primary context, which lives on as long as TVM uses it."""
        sentinel, self._sentinel = self._sentinel, None
        if sentinel is not None:
            sentinel.close()
        driver, self._driver = self._driver, None
        stream, self._own_stream = self._own_stream, None
        if driver is None:
            return
        if stream is not None:
            quietly(driver.cuStreamDestroy, stream)
        quietly(driver.cuDevicePrimaryCtxRelease, call(driver.cuDeviceGet, self.ordinal))

    def __getstate__(self) -> dict[str, Any]:
        gone = {"_driver": None, "_own_stream": None, "_sentinel": None}
        return {**super().__getstate__(), **gone}

    def _make_stream(self) -> None:
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        self._own_stream = call(self._driver.cuStreamCreate, flags)

    def _entered(self) -> Any:
        if self._driver is None:
            raise SetupError(
                "this process has not entered the partition: call enter_worker() first"
            )
        return self._driver

    def _entered_stream(self) -> int:
        self._entered()
        stream = self.stream
        if stream is None:
            raise SetupError(f"{self} has no stream: call enter_worker() first")
        return stream

    def _probe_sms(self, what: str) -> None:
        """Refuse when a kernel ran on more SMs than the share promises."""
        total = self.share.device.units_total
        self._sm_ids = probe.sm_ids(self._entered(), self._entered_stream(), total)
        probe.check_ids(self._sm_ids, self.share.units, what)

    def _check_sms(self, what: str) -> None:
        """Refuse when this process sees another number of SMs than the share promises."""
        got = visible_sms(self._entered(), self.ordinal)
        if got != self.share.units:
            raise SetupError(f"{what} gives {got} SMs where {self.share.units} were promised")

    def _check_mps(self, expected: bool, advice: str) -> None:
        if mps_is_on(self._entered(), self.ordinal) != expected:
            state = "does not run" if expected else "runs"
            raise SetupError(f"this process {state} under an MPS server: {advice}")
