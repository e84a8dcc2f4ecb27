"""Stand-ins for what a machine may lack: a device, the CUDA driver, NVML, the MPS control program.

They keep the shape of the real thing (result codes first in a tuple, handles, error classes), so
that the code above them runs unchanged. None of them computes anything on a GPU.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gpu_aware_tune.partition import Device, NullPartition
from gpu_aware_tune.testing_launch import FakeLaunches

__all__ = ["FakeDriver", "FakeNvml", "NullPartition", "fake_gpu", "null_device", "write_fake_mps"]

H200_SMS = 132


def null_device(units_total: int = 10) -> Device:
    """The device of `NullPartition`."""
    return Device("null", 0, "null", "null", units_total, "core")


def fake_gpu(sms: int = H200_SMS) -> Device:
    """A GPU as `find_device` describes a real one."""
    return Device(
        "cuda", 0, "NVIDIA H200", "sm_90a", sms, "SM", uuid="GPU-fake", unit_min=8, unit_step=8
    )


class Code(enum.IntEnum):
    """Result codes that the fake driver knows."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_MPS_SERVER_NOT_READY = 807
    CUDA_ERROR_INVALID_RESOURCE_TYPE = 914
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 915


class _Attribute(enum.IntEnum):
    CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 1
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK = 8
    CU_DEVICE_ATTRIBUTE_WARP_SIZE = 10
    CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK = 12
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_MPS_ENABLED = 133


class _ResourceType(enum.IntEnum):
    CU_DEV_RESOURCE_TYPE_SM = 1


class _GreenFlags(enum.IntEnum):
    CU_GREEN_CTX_DEFAULT_STREAM = 1


class _StreamFlags(enum.IntEnum):
    CU_STREAM_NON_BLOCKING = 1


class FakeDriver(FakeLaunches):
    """The calls of cuda.bindings.driver that this package makes, with the rules they keep.

    Args:
        sms: SMs of the one GPU.
        visible: SMs the process sees, fewer under MPS or in a MIG instance; None: all.
        mps: whether the process is an MPS client.
        step: granularity of a split.
        short_by: SMs that every green context gets fewer than it should, to test that this is seen.
        fail: the code that a function answers, by function name.
    """

    CUdevice_attribute = _Attribute
    CUdevResourceType = _ResourceType
    CUgreenCtxCreate_flags = _GreenFlags
    CUstream_flags = _StreamFlags

    def __init__(
        self,
        sms: int = H200_SMS,
        visible: int | None = None,
        mps: bool = False,
        step: int = 8,
        short_by: int = 0,
        fail: Mapping[str, Code] | None = None,
    ) -> None:
        super().__init__()
        self.name = "NVIDIA H200"
        self.sms = sms
        self.visible = sms if visible is None else visible
        self.mps = mps
        self.step = step
        self.short_by = short_by
        self.fail = dict(fail or {})
        self.calls: list[str] = []
        self.primary = 0  # how often the primary context is retained
        self.contexts: dict[int, list[Any]] = {}  # green contexts alive, and their SM groups
        self.streams: dict[int, int] = {}  # streams alive, and their green contexts (0: none)
        self._next = 1000

    def leaks(self) -> list[str]:
        """What is still alive: empty after a proper clean-up."""
        found = [f"context {handle}" for handle in self.contexts]
        found += [f"stream {handle}" for handle in self.streams]
        found += [f"{what} {handle}" for handle, what in self.alive.items()]
        return found + ([f"primary context x{self.primary}"] if self.primary else [])

    def sm_ids(self, context: int) -> set[int]:
        """Which SMs a green context runs on."""
        return {sm for group in self.contexts[context] for sm in group.ids}

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        """Start."""
        return self._answer("cuInit")

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        """CUDA 13.0."""
        return self._answer("cuDriverGetVersion", 13000)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        """One GPU."""
        return self._answer("cuDeviceGetCount", 1)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        """The GPU's handle."""
        if ordinal != 0:
            return (Code.CUDA_ERROR_INVALID_VALUE, None)
        return self._answer("cuDeviceGet", 7)

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Any, ...]:
        """A name with the padding that the driver adds."""
        return self._answer("cuDeviceGetName", self.name.encode().ljust(length, b"\0"))

    def cuDeviceGetUuid(self, device: int) -> tuple[Any, ...]:
        """Sixteen bytes."""
        return self._answer("cuDeviceGetUuid", SimpleNamespace(bytes=bytes(range(16))))

    def cuDeviceGetAttribute(self, name: _Attribute, device: int) -> tuple[Any, ...]:
        """Attributes as a Hopper card gives them."""
        values = {
            _Attribute.CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: 1024,
            _Attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: 49152,
            _Attribute.CU_DEVICE_ATTRIBUTE_WARP_SIZE: 32,
            _Attribute.CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: 65536,
            _Attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: 50 << 20,
            _Attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: self.visible,
            _Attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 9,
            _Attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: 0,
            _Attribute.CU_DEVICE_ATTRIBUTE_MPS_ENABLED: int(self.mps),
        }
        return self._answer("cuDeviceGetAttribute", values[name])

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        """Count one more user."""
        answer = self._answer("cuDevicePrimaryCtxRetain", 1)
        self.primary += answer[0] == Code.CUDA_SUCCESS
        return answer

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:
        """Count one user less."""
        self.primary -= 1
        return self._answer("cuDevicePrimaryCtxRelease")

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        """Nothing to do here."""
        return self._answer("cuCtxSetCurrent")

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        """Nothing runs."""
        return self._answer("cuCtxSynchronize")

    def cuDeviceGetDevResource(self, device: int, kind: Any) -> tuple[Any, ...]:
        """All SMs."""
        return self._answer("cuDeviceGetDevResource", self._group(range(self.sms)))

    def cuDevSmResourceSplitByCount(
        self, count: int, whole: Any, flags: int, least: int
    ) -> tuple[Any, ...]:
        """Equal groups from the lowest SMs up, each rounded up to the granularity."""
        size = -(-least // self.step) * self.step
        made = min(count, whole.sm.smCount // size)
        groups = [self._group(whole.ids[i * size : (i + 1) * size]) for i in range(made)]
        rest = self._group(whole.ids[made * size :])
        return self._answer("cuDevSmResourceSplitByCount", groups, made, rest)

    def cuDevResourceGenerateDesc(self, groups: list[Any], count: int) -> tuple[Any, ...]:
        """Groups of one split joined; the same SM twice is refused, as the driver does."""
        ids = [sm for group in groups for sm in group.ids]
        if len(groups) != count or len(set(ids)) != len(ids):
            return (Code.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION, None)
        return self._answer("cuDevResourceGenerateDesc", list(groups))

    def cuGreenCtxCreate(self, groups: list[Any], device: int, flags: int) -> tuple[Any, ...]:
        """A context on the groups; the flag is obligatory."""
        if flags != _GreenFlags.CU_GREEN_CTX_DEFAULT_STREAM:
            return (Code.CUDA_ERROR_INVALID_VALUE, None)
        answer = self._answer("cuGreenCtxCreate", self._handle())
        if answer[0] == Code.CUDA_SUCCESS:
            self.contexts[answer[1]] = groups
        return answer

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        """A stream of the primary context."""
        answer = self._answer("cuStreamCreate", self._handle())
        if answer[0] == Code.CUDA_SUCCESS:
            self.streams[answer[1]] = 0
        return answer

    def cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> tuple[Any, ...]:
        """A stream of the context; it must be non-blocking."""
        if flags != _StreamFlags.CU_STREAM_NON_BLOCKING:
            return (Code.CUDA_ERROR_INVALID_VALUE, None)
        answer = self._answer("cuGreenCtxStreamCreate", self._handle())
        if answer[0] == Code.CUDA_SUCCESS:
            self.streams[answer[1]] = context
        return answer

    def cuGreenCtxGetDevResource(self, context: int, kind: Any) -> tuple[Any, ...]:
        """What the context really has."""
        count = len(self.sm_ids(context)) - self.short_by
        return self._answer("cuGreenCtxGetDevResource", self._group(range(count)))

    def cuStreamGetGreenCtx(self, stream: int) -> tuple[Any, ...]:
        """The stream's context."""
        return self._answer("cuStreamGetGreenCtx", self.streams[stream])

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        """Nothing runs; an unknown stream is an error."""
        if stream not in self.streams:
            return (Code.CUDA_ERROR_INVALID_VALUE,)
        return self._answer("cuStreamSynchronize")

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        """Forget the stream."""
        del self.streams[stream]
        return self._answer("cuStreamDestroy")

    def cuGreenCtxDestroy(self, context: int) -> tuple[Any, ...]:
        """Forget the context; its streams must be gone."""
        assert context not in self.streams.values(), "destroy the streams first"
        del self.contexts[context]
        return self._answer("cuGreenCtxDestroy")

    def _answer(self, function: str, *values: Any) -> tuple[Any, ...]:
        self.calls.append(function)
        code = self.fail.get(function, Code.CUDA_SUCCESS)
        return (code, *(values if code == Code.CUDA_SUCCESS else [None] * len(values)))

    def _ids_of(self, stream: int) -> list[int]:
        context = self.streams[stream]
        return sorted(self.sm_ids(context)) if context else list(range(self.visible))

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def _group(self, ids: Any) -> Any:
        facts = {"minSmPartitionSize": self.step, "smCoscheduledAlignment": self.step}
        return SimpleNamespace(sm=SimpleNamespace(smCount=len(ids), **facts), ids=list(ids))


class FakeNvml:
    """The calls of pynvml that this package makes; `missing` ones raise as an old driver's do."""

    class NVMLError(Exception):
        """What every refused call raises."""

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0

    def __init__(
        self,
        instances: Mapping[str, int] | None = None,
        pids: tuple[int, ...] = (),
        throttle: int = 0,
        sm_clock_mhz: int = 1980,
        missing: tuple[str, ...] = (),
    ) -> None:
        """One GPU with MIG `instances` (UUID to SM count) and processes `pids` on it."""
        self.instances = list((instances or {}).items())
        self.pids = pids
        self.throttle = throttle
        self.sm_clock_mhz = sm_clock_mhz
        self.missing = missing
        self.started = 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        if name in self.missing or not hasattr(type(self), f"_{name}"):
            return self._refuse
        return getattr(self, f"_{name}")

    def _refuse(self, *_: Any) -> Any:
        raise self.NVMLError("Not Supported")

    def _nvmlInit(self) -> None:
        self.started += 1

    def _nvmlShutdown(self) -> None:
        self.started -= 1

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return "gpu"

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return "gpu"

    def _nvmlDeviceGetMigMode(self, gpu: str) -> tuple[int, int]:
        return (1, 1) if self.instances else (0, 0)

    def _nvmlDeviceGetMaxMigDeviceCount(self, gpu: str) -> int:
        return 7

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: str, slot: int) -> tuple[str, int]:
        if slot >= len(self.instances):
            raise self.NVMLError("Not Found")
        return self.instances[slot]

    def _nvmlDeviceGetAttributes_v2(self, handle: tuple[str, int]) -> Any:
        return SimpleNamespace(multiprocessorCount=handle[1], memorySizeMB=16384)

    def _nvmlDeviceGetUUID(self, handle: tuple[str, int]) -> str:
        return handle[0]

    def _nvmlDeviceGetName(self, handle: tuple[str, int]) -> bytes:
        return b"NVIDIA H200 MIG"

    def _nvmlDeviceGetClockInfo(self, gpu: str, clock: int) -> int:
        return self.sm_clock_mhz if clock == self.NVML_CLOCK_SM else 3201

    def _nvmlDeviceGetCurrentClocksEventReasons(self, gpu: str) -> int:
        return self.throttle

    def _nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return 350_500

    def _nvmlDeviceGetComputeRunningProcesses(self, gpu: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]


_FAKE_MPS = """#!{python}
import os, sys, time
pipe = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
log = os.environ["CUDA_MPS_LOG_DIRECTORY"]
state = os.path.join(pipe, "nvidia-cuda-mps-control.pid")
if "-f" in sys.argv:
    open(os.path.join(log, "control.log"), "w").write("{log}\\n")
    if {broken}:
        sys.exit(1)
    open(state, "w").write(str(os.getpid()))
    while os.path.exists(state):
        time.sleep(0.01)
    sys.exit(0)
command = sys.stdin.read().strip()
if not os.path.exists(state):
    print("Cannot find MPS control daemon process", file=sys.stderr)
    sys.exit(1)
if command == "quit":
    os.unlink(state)
else:
    print("100.0")
"""


def write_fake_mps(folder: Path, broken: bool = False) -> Path:
    """Write a program that starts, answers and quits like nvidia-cuda-mps-control."""
    program = folder / "nvidia-cuda-mps-control"
    text = _FAKE_MPS.replace("{python}", sys.executable).replace("{broken}", str(broken))
    program.write_text(text.replace("{log}", "no GPU found" if broken else "started"))
    program.chmod(0o755)
    return program
