"""What the GPU was doing around a measurement: clocks, throttling, power, heat, and who else was on
it.

Everything here is for the record. Drivers, containers and MIG each hide some of it, so whatever
cannot be read is None and nothing raises.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpu_aware_tune.errors import SetupError

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a kernel down. Idle (0x1), locked
# application clocks (0x2) and sync boost (0x10) are no disturbance.
THROTTLE_BITS: Mapping[int, str] = MappingProxyType(
    {
        0x4: "power-cap",
        0x8: "hw-slowdown",
        0x20: "heat",
        0x40: "hw-heat",
        0x80: "power-brake",
    }
)
_IDLE = 0x1
CLOCK_DRIFT = 0.05  # SM clocks before and after that differ by more make a sample doubtful


@dataclass(frozen=True)
class Snapshot:
    """One look at a GPU; None is "this machine does not tell"."""

    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_mhz: int | None = None
    performance_state: int | None = None
    idle: bool | None = None  # nothing ran: the clocks say nothing about a kernel
    throttle: tuple[str, ...] | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    temperature_c: int | None = None
    busy_percent: int | None = None
    neighbours: tuple[int, ...] | None = None  # process ids, ours left out


class Nvml:
    """NVML opened for one GPU; a context manager. Where NVML is missing every snapshot is empty."""

    def __init__(self, gpu: int | str = 0, own_pids: Collection[int] = ()) -> None:
        """Look at a GPU by index or UUID.

        Processes in `own_pids`, and those that the last of them started, are not neighbours. Where
        they are given and none of them is on NVML's list, its numbers are of another PID namespace:
        neighbours are then unknown.
        """
        self._own = tuple(own_pids)
        self._gpu = gpu
        self._nvml: Any = None
        self._handle: Any = None

    def __enter__(self) -> Nvml:
        with contextlib.suppress(SetupError):
            nvml = load_nvml()
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlInit()
                self._nvml = nvml
                by_index = isinstance(self._gpu, int)
                find = (
                    nvml.nvmlDeviceGetHandleByIndex if by_index else nvml.nvmlDeviceGetHandleByUUID
                )
                self._handle = find(self._gpu)
        return self

    def __exit__(self, *_: object) -> None:
        nvml, self._nvml, self._handle = self._nvml, None, None
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def snapshot(self) -> Snapshot:
        """Read everything that can be read."""
        nvml = self._nvml
        if self._handle is None:
            return Snapshot()
        sm, memory = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM
        utilization = self._ask("nvmlDeviceGetUtilizationRates")
        return Snapshot(
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", sm),
            sm_clock_max_mhz=self._ask("nvmlDeviceGetMaxClockInfo", sm),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", memory),
            performance_state=self._ask("nvmlDeviceGetPerformanceState"),
            **self._reasons(),
            power_w=_then(self._ask("nvmlDeviceGetPowerUsage"), _from_milli),
            power_limit_w=_then(self._ask("nvmlDeviceGetEnforcedPowerLimit"), _from_milli),
            energy_j=_then(self._ask("nvmlDeviceGetTotalEnergyConsumption"), _from_milli),
            temperature_c=self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            busy_percent=_then(utilization, lambda rates: int(rates.gpu)),
            neighbours=self._neighbours(),
        )

    def quick_snapshot(self) -> Snapshot:
        """Read only what `disturbances` looks at: a fraction of a millisecond, fit for every sample."""
        if self._handle is None:
            return Snapshot()
        return Snapshot(
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            **self._reasons(),
            neighbours=self._neighbours(),
        )

    def _reasons(self) -> dict[str, Any]:
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            return {}
        return {"throttle": throttle_names(bits), "idle": bool(bits & _IDLE)}

    def _neighbours(self) -> tuple[int, ...] | None:
        names = (
            "nvmlDeviceGetComputeRunningProcesses",
            "nvmlDeviceGetMPSComputeRunningProcesses_v3",
        )
        lists = [found for name in names if (found := self._ask(name)) is not None]
        if not lists:
            return None
        pids = {int(process.pid) for found in lists for process in found}
        others = pids - set(self._own)
        if self._own and pids and others == pids:
            return None
        return tuple(sorted(pid for pid in others if not _started_by(self._own[-1:], pid)))

    def _ask(self, function: str, *args: Any) -> Any:
        call = getattr(self._nvml, function, None)
        if call is None:
            return None
        try:
            return call(self._handle, *args)
        except self._nvml.NVMLError:
            return None


def own_processes() -> tuple[int, ...]:
    """This process and those above it up to the tuner: worker, host, tuner."""
    host = os.getppid()
    return tuple(pid for pid in (os.getpid(), host, _parent(host)) if pid > 1)


def _started_by(ancestors: Collection[int], pid: int) -> bool:
    """Whether a process, such as another worker or our MPS server, descends from one of ours."""
    while pid > 1:
        if pid in ancestors:
            return True
        pid = _parent(pid)
    return False


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def load_nvml() -> Any:
    """The module pynvml; raises `SetupError` where it is not installed."""
    try:
        import pynvml
    except ImportError as error:
        raise SetupError("pynvml is missing: pip install nvidia-ml-py") from error
    return pynvml


def throttle_names(bits: int) -> tuple[str, ...]:
    """The names of the slowing reasons among NVML's clock event bits."""
    return tuple(name for bit, name in THROTTLE_BITS.items() if bits & bit)


def disturbances(before: Snapshot, after: Snapshot) -> tuple[str, ...]:
    """Why samples between two snapshots should be repeated, as flags; empty where all was quiet."""
    flags = [
        f"throttled:{name}" for name in THROTTLE_BITS.values() if _in_either(name, before, after)
    ]
    if before.neighbours or after.neighbours:
        flags.append("neighbour")
    clocks = (before.sm_clock_mhz, after.sm_clock_mhz)
    if (
        clocks[0]
        and clocks[1]
        and not (before.idle or after.idle)
        and abs(clocks[0] - clocks[1]) > CLOCK_DRIFT * max(clocks[0], clocks[1])
    ):
        flags.append("clock-drift")
    return tuple(flags)


def _in_either(name: str, before: Snapshot, after: Snapshot) -> bool:
    return name in (before.throttle or ()) or name in (after.throttle or ())


def _then(value: Any, convert: Callable[[Any], Any]) -> Any:
    return None if value is None else convert(value)


def _from_milli(value: int) -> float:
    return value / 1000
