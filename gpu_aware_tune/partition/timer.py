"""Timing launches on one stream with events; as a CUDA graph where the kernel is short.

Between two events around one launch lies the time the host takes to launch, some microseconds, and
a loop of launches of a shorter kernel measures the host and not the GPU. A graph of many launches
is handed over at once. It must be captured on the partition's own stream: its kernels stay in the
context that they were captured in, wherever it is replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from gpu_aware_tune.partition.driver import DriverError, call, quietly

GRAPH_BELOW_S = 20e-6  # kernels shorter than this are timed as graphs
_GRAPH_LAUNCHES = 100  # kernel nodes of a graph


class StreamTimer:
    """Times what `launch` puts on a stream: `timer(number, repeat)` gives seconds of one launch.

    Args:
        driver: started, with the primary context current.
        stream: the raw stream; must not be the default one, which cannot be captured.
        launch: launches once on that stream and returns without waiting.
        flush_bytes: write so many bytes before each timed launch, so that it finds a cold L2; 0
            leaves the cache as the launch before left it. Cold launches are timed one by one.
    """

    def __init__(
        self, driver: Any, stream: int, launch: Callable[[], object], flush_bytes: int = 0
    ) -> None:
        self._driver = driver
        self._stream = stream
        self._launch = launch
        self._flush_bytes = flush_bytes
        self._undo = contextlib.ExitStack()
        self._events: tuple[Any, Any] | None = None
        self._graph: Any = None
        self._capture_failed = False
        self._seconds: float | None = None  # of one launch, as last seen
        self._scratch: Any = None

    @property
    def kind(self) -> str:
        """How the last samples came about: "events" or "graph"."""
        return "events" if self._graph is None else "graph"

    def __call__(self, number: int, repeat: int) -> list[float]:
        """Time `number` launches, `repeat` times over; the first call of all warms up first."""
        if self._events is None:
            self._prepare()
        short = self._seconds is not None and self._seconds < GRAPH_BELOW_S
        if short and number > 1 and not self._flush_bytes:
            self._capture()
        run = self._cold if self._flush_bytes else self._warm
        samples = [run(number) for _ in range(repeat)]
        self._seconds = min(samples)
        return samples

    def close(self) -> None:
        """Give events, graph and scratch memory back; safe to call twice."""
        self._undo.close()
        self._events = self._graph = self._scratch = None

    def _prepare(self) -> None:
        driver = self._driver
        if self._flush_bytes:
            self._scratch = call(driver.cuMemAlloc, self._flush_bytes)
            self._undo.callback(quietly, driver.cuMemFree, self._scratch)
        start, stop = (call(driver.cuEventCreate, 0) for _ in range(2))
        for event in (start, stop):
            self._undo.callback(quietly, driver.cuEventDestroy, event)
        self._launch()  # loads the kernel, which must not happen while capturing or timing
        call(driver.cuStreamSynchronize, self._stream)
        self._events = start, stop

    def _warm(self, number: int) -> float:
        if self._graph is None:
            return self._between(self._launch, number) / number
        rounds = -(-number // _GRAPH_LAUNCHES)
        spent = self._between(
            lambda: call(self._driver.cuGraphLaunch, self._graph, self._stream), rounds
        )
        return spent / (rounds * _GRAPH_LAUNCHES)

    def _cold(self, number: int) -> float:
        spent = 0.0
        for _ in range(number):
            call(self._driver.cuMemsetD8Async, self._scratch, 0, self._flush_bytes, self._stream)
            spent += self._between(self._launch, 1)
        return spent / number

    def _between(self, launch: Callable[[], object], times: int) -> float:
        """Seconds on the GPU from before the first launch to after the last."""
        assert self._events is not None
        driver, (start, stop) = self._driver, self._events
        call(driver.cuEventRecord, start, self._stream)
        for _ in range(times):
            launch()
        call(driver.cuEventRecord, stop, self._stream)
        call(driver.cuEventSynchronize, stop)
        return float(call(driver.cuEventElapsedTime, start, stop)) / 1e3

    def _capture(self) -> None:
        """Make the graph, once; what cannot be captured stays with plain events."""
        if self._graph is not None or self._capture_failed:
            return
        driver = self._driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        call(driver.cuStreamBeginCapture, self._stream, mode)
        try:
            for _ in range(_GRAPH_LAUNCHES):
                self._launch()
        except Exception:  # a kernel that does what capturing forbids, such as waiting
            self._capture_failed = True
        try:
            graph = call(driver.cuStreamEndCapture, self._stream)
            self._undo.callback(quietly, driver.cuGraphDestroy, graph)
            if self._capture_failed:
                return
            self._graph = call(driver.cuGraphInstantiate, graph, 0)
            self._undo.callback(quietly, driver.cuGraphExecDestroy, self._graph)
            call(driver.cuGraphLaunch, self._graph, self._stream)  # uploads it
            call(driver.cuStreamSynchronize, self._stream)
        except DriverError:
            self._graph, self._capture_failed = None, True
