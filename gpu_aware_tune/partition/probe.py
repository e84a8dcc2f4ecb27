"""Which SMs a stream's kernels really run on, and a steady kernel that shows drift.

A count that the driver reports is a promise; the numbers that `%smid` gives are what happened. Both
kernels are launched the way TVM launches its own: loaded in the primary context, on the partition's
stream, with no context switched.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import statistics
from collections.abc import Collection, Iterator
from typing import Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.driver import call, quietly
from gpu_aware_tune.partition.kernels import PTX
from gpu_aware_tune.partition.timer import StreamTimer

_BLOCKS_PER_SM = 4  # of all SMs: twice what fits at once, so that an SM left out would be noticed
_THREADS = 1024
_CYCLES = 40_000  # about 20 microseconds a block: far longer than handing out all blocks takes
_UNWRITTEN = 0xFFFFFFFF

_SENTINEL_BLOCKS_PER_SM = 2
_SENTINEL_THREADS = 256
_SENTINEL_FLOATS = 1 << 21  # 8 MiB: within the L2 of any card since Ampere, beyond one SM's L1
_SENTINEL_ROUNDS = 400
_SENTINEL_RUNS = 5


def sm_ids(driver: Any, stream: int, total_sms: int) -> tuple[int, ...]:
    """The numbers of the SMs that kernels on `stream` run on, sorted.

    Args:
        driver: started, with the primary context current.
        stream: the raw stream.
        total_sms: of the whole GPU: there are blocks for every one of them.
    """
    blocks = _BLOCKS_PER_SM * total_sms
    with _loaded(driver) as module, _memory(driver, 4 * blocks) as buffer:
        probe = call(driver.cuModuleGetFunction, module, b"sm_probe")
        call(driver.cuMemsetD32Async, buffer, _UNWRITTEN, blocks, stream)
        values = ((int(buffer), _CYCLES), (ctypes.c_void_p, ctypes.c_uint))
        call(driver.cuLaunchKernel, probe, blocks, 1, 1, _THREADS, 1, 1, 0, stream, values, 0)
        call(driver.cuStreamSynchronize, stream)
        found = (ctypes.c_uint32 * blocks)()
        call(driver.cuMemcpyDtoH, ctypes.addressof(found), buffer, 4 * blocks)
    return tuple(sorted(set(found)))


def check_ids(ids: Collection[int], units: int, what: str) -> None:
    """Raise `SetupError` where the probe ran on more SMs than promised, or did not run."""
    if not ids or _UNWRITTEN in ids:
        raise SetupError(f"the probe kernel did not run to its end on {what}: restart the run")
    if len(ids) > units:
        raise SetupError(
            f"kernels on {what} ran on {len(ids)} SMs where {units} were promised: this driver does "
            "not confine them; choose another --partition"
        )


def ids_hash(ids: Collection[int]) -> str:
    """A short name for a set of SMs, the same in every run."""
    text = ",".join(str(number) for number in sorted(ids))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Sentinel:
    """A fixed load on a stream: its time changes only when clocks or neighbours do."""

    def __init__(self, driver: Any, stream: int, units: int) -> None:
        """Load the kernel and its data; `units` SMs are kept busy."""
        self._driver = driver
        with contextlib.ExitStack() as undo:
            module = undo.enter_context(_loaded(driver))
            data = undo.enter_context(_memory(driver, 4 * _SENTINEL_FLOATS))
            kernel = call(driver.cuModuleGetFunction, module, b"sentinel")
            call(driver.cuMemsetD32Async, data, 0, _SENTINEL_FLOATS, stream)
            values = (
                (int(data), _SENTINEL_FLOATS - 1, _SENTINEL_ROUNDS),
                (ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint),
            )
            blocks = _SENTINEL_BLOCKS_PER_SM * units

            def launch() -> None:
                call(driver.cuLaunchKernel, kernel, blocks, 1, 1, _SENTINEL_THREADS, 1, 1, 0,
                     stream, values, 0)  # fmt: skip

            self._timer = StreamTimer(driver, stream, launch)
            undo.callback(self._timer.close)
            self._undo = undo.pop_all()

    def seconds(self) -> float:
        """Median seconds of a few runs."""
        return statistics.median(self._timer(1, _SENTINEL_RUNS))

    def close(self) -> None:
        """Free the data; safe to call twice."""
        self._undo.close()


@contextlib.contextmanager
def _loaded(driver: Any) -> Iterator[Any]:
    module = call(driver.cuModuleLoadData, PTX.encode() + b"\0")
    try:
        yield module
    finally:
        quietly(driver.cuModuleUnload, module)


@contextlib.contextmanager
def _memory(driver: Any, size: int) -> Iterator[Any]:
    buffer = call(driver.cuMemAlloc, size)
    try:
        yield buffer
    finally:
        quietly(driver.cuMemFree, buffer)
