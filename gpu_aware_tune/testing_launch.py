"""The part of the fake CUDA driver that holds memory, modules, events and graphs, and "launches".

A launch of the probe kernel writes the numbers of the SMs that the stream's context has; any other
launch adds to the clock of its stream, which the events read.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from gpu_aware_tune.partition import NullPartition, Share
from gpu_aware_tune.partition.driver import DriverError


class _CaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class FakeLaunches:
    """Memory, modules, kernels, events and graphs; `FakeDriver` adds devices and contexts."""

    CUstreamCaptureMode = _CaptureMode

    def __init__(self) -> None:
        self.alive: dict[int, str] = {}  # what was made here and not given back yet
        self.launch_s: list[float] = [50e-6]  # seconds of the next launches; the last one stays
        self.probe_ids: list[int] | None = None  # what the probe kernel finds instead of the truth
        self._kernels: dict[int, bytes] = {}
        self._memory: dict[int, Any] = {}
        self._clocks: dict[int, float] = {}
        self._events: dict[int, float] = {}
        self._captured: dict[int, int] = {}  # launches recorded by stream
        self._graphs: dict[int, int] = {}

    def _answer(self, function: str, *values: Any) -> tuple[Any, ...]:
        raise NotImplementedError

    def _handle(self) -> int:
        raise NotImplementedError

    def _ids_of(self, stream: int) -> Sequence[int]:
        raise NotImplementedError

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        """Take PTX that ends with a zero byte."""
        assert image.startswith(b".version") and image.endswith(b"\0")
        return self._made("cuModuleLoadData", "module")

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, ...]:
        """One of the kernels."""
        answer = self._answer("cuModuleGetFunction", self._handle())
        self._kernels[answer[1]] = name
        return answer

    def cuModuleUnload(self, module: int) -> tuple[Any, ...]:
        """Forget the module."""
        return self._gone("cuModuleUnload", module)

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:
        """Host memory in place of the GPU's."""
        answer = self._made("cuMemAlloc", f"{size} bytes")
        if answer[1] is not None:
            self._memory[answer[1]] = (ctypes.c_uint32 * (size // 4))()
        return answer

    def cuMemFree(self, buffer: int) -> tuple[Any, ...]:
        """Forget the memory."""
        return self._gone("cuMemFree", buffer)

    def cuMemsetD32Async(self, buffer: int, value: int, count: int, stream: int) -> tuple[Any, ...]:
        """Fill the words."""
        self._memory[buffer][:count] = [value] * count
        return self._answer("cuMemsetD32Async")

    def cuMemsetD8Async(self, buffer: int, value: int, count: int, stream: int) -> tuple[Any, ...]:
        """A write that empties the cache."""
        return self._answer("cuMemsetD8Async")

    def cuMemcpyDtoH(self, target: int, buffer: int, size: int) -> tuple[Any, ...]:
        """Copy out."""
        ctypes.memmove(target, self._memory[buffer], size)
        return self._answer("cuMemcpyDtoH")

    def cuLaunchKernel(self, kernel: int, *rest: Any) -> tuple[Any, ...]:
        """Run a kernel, or note it where the stream is being captured."""
        blocks, stream, (values, types) = rest[0], rest[7], rest[8]
        assert len(values) == len(types)
        if self._kernels[kernel] == b"sm_probe":
            ids = self._ids_of(stream) if self.probe_ids is None else self.probe_ids
            words = self._memory[values[0]]
            for block in range(blocks if ids else 0):
                words[block] = ids[block % len(ids)]
        else:
            self.run(stream)
        return self._answer("cuLaunchKernel")

    def run(self, stream: int) -> None:
        """One launch of a kernel of `launch_s` seconds."""
        if stream in self._captured:
            self._captured[stream] += 1
            return
        seconds = self.launch_s.pop(0) if len(self.launch_s) > 1 else self.launch_s[0]
        self._clocks[stream] = self._clocks.get(stream, 0.0) + seconds

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        """An event."""
        return self._made("cuEventCreate", "event")

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        """Note the stream's clock."""
        self._events[event] = self._clocks.get(stream, 0.0)
        return self._answer("cuEventRecord")

    def cuEventSynchronize(self, event: int) -> tuple[Any, ...]:
        """Nothing runs."""
        return self._answer("cuEventSynchronize")

    def cuEventElapsedTime(self, start: int, stop: int) -> tuple[Any, ...]:
        """Milliseconds between two events."""
        return self._answer("cuEventElapsedTime", 1e3 * (self._events[stop] - self._events[start]))

    def cuEventDestroy(self, event: int) -> tuple[Any, ...]:
        """Forget the event."""
        return self._gone("cuEventDestroy", event)

    def cuStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:
        """From now on launches are noted."""
        assert stream, "the default stream cannot be captured"
        self._captured[stream] = 0
        return self._answer("cuStreamBeginCapture")

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        """The graph of what was noted."""
        count = self._captured.pop(stream)
        answer = self._made("cuStreamEndCapture", "graph")
        self._graphs[answer[1]] = count
        return answer

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        """A graph that can be launched."""
        answer = self._made("cuGraphInstantiate", "executable graph")
        self._graphs[answer[1]] = self._graphs[graph]
        return answer

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        """Run what was noted."""
        for _ in range(self._graphs[graph]):
            self.run(stream)
        return self._answer("cuGraphLaunch")

    def cuGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        """Forget the executable graph."""
        return self._gone("cuGraphExecDestroy", graph)

    def cuGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        """Forget the graph."""
        return self._gone("cuGraphDestroy", graph)

    def launcher(self, stream: int) -> Callable[[], None]:
        """What a `StreamTimer` is given to launch."""
        return lambda: self.run(stream)

    def _made(self, function: str, what: str) -> tuple[Any, ...]:
        answer = self._answer(function, self._handle())
        if answer[1] is not None:
            self.alive[answer[1]] = what
        return answer

    def _gone(self, function: str, handle: int) -> tuple[Any, ...]:
        del self.alive[handle]
        return self._answer(function)


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
