"""The measuring worker: holds one partition or several, and the inputs of the current task."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.measure.quality import Watch
from gpu_aware_tune.measure.timing import Effort, Timer, compare, measure
from gpu_aware_tune.measurement import Measurement

if TYPE_CHECKING:
    from gpu_aware_tune.partition import Partition

_START_TOGETHER_S = 30.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One artifact to measure.

    Args:
        path: the shared library that holds the kernel as function "main".
        args: (shape, dtype) of each buffer the kernel takes, in order.
        task: hash of the task: inputs are allocated anew only when it changes.
        best_s: the best seconds known on this partition, or None.
        effort: when to stop.
    """

    path: str
    args: tuple[tuple[tuple[int, ...], str], ...]
    task: str
    best_s: float | None
    effort: Effort


@dataclasses.dataclass(frozen=True)
class Contest:
    """Several artifacts of one task to measure in turns; fields as of `Job`."""

    paths: tuple[str, ...]
    args: tuple[tuple[tuple[int, ...], str], ...]
    task: str
    effort: Effort


@dataclasses.dataclass(frozen=True)
class Opened:
    """A worker's first answer: what `Partition.evidence` says, or why the partition is refused."""

    evidence: tuple[dict[str, Any], ...] = ()
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answer to a job, to one job for each share, or to a contest: a measurement for each.

    `ends` says that the worker goes now.
    """

    measurements: tuple[Measurement, ...]
    ends: bool = False


def serve(connection: Connection, partition: Partition) -> None:
    """Answer jobs until the connection closes; the first answer says whether the partition stands.

    After an error on a GPU the worker ends, whatever the error was: an illegal access leaves the
    context of the process unusable, and asking it whether it is would not be believed.
    """
    with contextlib.ExitStack() as stack:
        try:
            station = stack.enter_context(_station(partition))
        except Exception as error:  # told to the parent, which names the partition
            connection.send(Opened(refusal=f"{type(error).__name__}: {error}"))
            return
        connection.send(Opened((partition.evidence(),)))
        gc.disable()  # no collection in the middle of a timing
        while True:
            job: Job | Contest = connection.recv()
            reply = station.compare(job) if isinstance(job, Contest) else station.measure(job)
            connection.send(reply)
            if reply.ends:
                return


def serve_together(connection: Connection, partitions: Sequence[Partition]) -> None:
    """Like `serve` for disjoint shares in one process: each message has a job for every share.

    A thread for each share, since TVM's current stream is the thread's; they start together.
    """
    barrier = threading.Barrier(len(partitions))
    threads = [ThreadPoolExecutor(1) for _ in partitions]

    def start(partition: Partition) -> _Station:
        return stack.enter_context(_station(partition))

    def run(station: _Station, job: Job) -> Reply:
        barrier.wait(_START_TOGETHER_S)
        return station.measure(job, "together")

    with contextlib.ExitStack() as stack:
        try:
            # One after the other: a context's first steps wait for all of the device.
            stations = [
                t.submit(start, p).result() for t, p in zip(threads, partitions, strict=True)
            ]
        except Exception as error:  # as in `serve`
            connection.send(Opened(refusal=f"{type(error).__name__}: {error}"))
            return
        connection.send(Opened(tuple(partition.evidence() for partition in partitions)))
        gc.disable()
        while True:
            jobs: Sequence[Job] = connection.recv()
            pending = [
                thread.submit(run, station, job)
                for thread, station, job in zip(threads, stations, jobs, strict=True)
            ]
            replies = [future.result() for future in pending]
            measured = tuple(reply.measurements[0] for reply in replies)
            ends = any(reply.ends for reply in replies)
            connection.send(Reply(measured, ends))
            if ends:
                return


@contextlib.contextmanager
def _station(partition: Partition) -> Iterator[_Station]:
    """Enter and check a partition, and open NVML beside it where it is of a GPU."""
    from gpu_aware_tune.partition import Nvml, own_processes

    partition.enter_worker()
    partition.verify()
    if partition.tvm_device != "cuda":
        yield _Station(partition, measure)
        return
    device = partition.share.device
    with Nvml(device.uuid or device.index, own_processes()) as nvml:
        yield _Station(partition, Watch(nvml.glance, partition.sentinel_s).measure)


class _Station:
    """One partition, ready to measure on."""

    def __init__(
        self,
        partition: Partition,
        policy: Callable[[Timer, float | None, Effort], Measurement],
    ) -> None:
        self._partition = partition
        self._policy = policy
        self._inputs = _Inputs(partition)

    def measure(self, job: Job, *how: str) -> Reply:
        """Measure one artifact; whatever it does short of killing the process is its failure."""
        import tvm

        try:
            buffers = self._inputs.of(job)
            module = tvm.runtime.load_module(job.path)
        except Exception as error:  # whatever a bad artifact makes TVM raise
            return self._failed("load", error)
        try:
            with self._timer(module, buffers, job.effort) as (timer, kind):
                result = self._policy(timer, job.best_s, job.effort)
                how = (*how, *kind())
        except Exception as error:  # as above: a kernel that refuses to run is a value
            return self._failed("run", error)
        return Reply((dataclasses.replace(result, how=how),))

    def compare(self, contest: Contest) -> Reply:
        """Measure several artifacts in turns; one that fails fails them all."""
        import tvm

        kinds: list[Callable[[], tuple[str, ...]]] = []
        timers: list[Timer] = []
        try:
            buffers = self._inputs.of(contest)
            with contextlib.ExitStack() as stack:
                for path in contest.paths:
                    module = tvm.runtime.load_module(path)
                    timer, kind = stack.enter_context(self._timer(module, buffers, contest.effort))
                    timers.append(timer)
                    kinds.append(kind)
                results = compare(timers, contest.effort)
                told = [kind() for kind in kinds]
        except Exception as error:  # as in `measure`
            failed = self._failed("run", error)
            return Reply(failed.measurements * len(contest.paths), failed.ends)
        pairs = zip(results, told, strict=True)
        return Reply(tuple(dataclasses.replace(result, how=how) for result, how in pairs))

    def _failed(self, kind: str, error: Exception) -> Reply:
        text = f"{type(error).__name__}: {error}"
        kind = "memory" if "out of memory" in text.lower() else kind
        return Reply((Measurement.failed(kind, text[:500]),), self._partition.faults_last)

    @contextlib.contextmanager
    def _timer(
        self, module: Any, buffers: Sequence[Any], effort: Effort
    ) -> Iterator[tuple[Timer, Callable[[], tuple[str, ...]]]]:
        """The timer for a loaded kernel, and what tells afterwards how it worked."""
        partition = self._partition
        function = module["main"]
        own = partition.launch_timer(lambda: function(*buffers), effort.cold)
        if own is None:
            yield self._evaluator(module, buffers, effort), lambda: ()
            return
        try:
            with partition.timing_context():
                yield own, lambda: (own.kind, "cold-l2" if effort.cold else "warm-l2")
            partition.sync()
        finally:
            own.close()

    def _evaluator(self, module: Any, buffers: Sequence[Any], effort: Effort) -> Timer:
        """TVM's own timer."""
        if effort.cold:
            raise ValueError("cold caches are measured on GPUs only")

        def timer(number: int, repeat: int) -> list[float]:
            device = self._inputs.device
            evaluator = module.time_evaluator("main", device, number=number, repeat=repeat)
            with self._partition.timing_context():
                results = list(evaluator(*buffers).results)
            self._partition.sync()
            return results

        return timer


class _Inputs:
    """The buffers of one task on the partition's device, made once."""

    def __init__(self, partition: Partition) -> None:
        import tvm

        self.device = tvm.device(partition.tvm_device, partition.ordinal)
        self._task = ""
        self._buffers: list[Any] = []

    def of(self, job: Job | Contest) -> list[Any]:
        """Random floats in [0, 1); zeros for integers, so that an index is always valid."""
        if job.task != self._task:
            import numpy as np
            import tvm

            self._buffers.clear()
            self._task = ""
            rng = np.random.default_rng(0)
            for shape, dtype in job.args:
                if dtype.startswith("float"):
                    host = rng.random(shape, dtype=np.float32).astype(dtype)
                else:
                    host = np.zeros(shape, dtype=dtype)
                self._buffers.append(tvm.runtime.tensor(host, self.device))
            self.device.sync()  # copies go through the default stream, launches do not
            self._task = job.task
        return self._buffers


def call(
    connection: Connection, partition: Partition, function: str, args: tuple[Any, ...]
) -> None:
    """Run "module:function"(*args) once inside a partition and send what it returns."""
    partition.enter_worker()
    partition.verify()
    module, _, name = function.partition(":")
    with partition.timing_context():
        connection.send(getattr(importlib.import_module(module), name)(*args))
