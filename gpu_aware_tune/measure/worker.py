"""The measuring worker: holds one partition or several, and the inputs of the current task."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure.measurement import FailureKind, Measurement
from gpu_aware_tune.measure.quality import DisturbanceMonitor
from gpu_aware_tune.measure.timing import Timer, TimingPolicy, compare, measure

if TYPE_CHECKING:
    from gpu_aware_tune.partition import Partition

# How long a thread may keep Python to itself while another one, in the middle of a timing loop,
# waits to launch: at Python's 5 ms a stream would run dry.
_SWITCH_S = 1e-4


@dataclasses.dataclass(frozen=True)
class Job:
    """One artifact to measure.

    Args:
        path: the shared library that holds the kernel as function "main".
        args: (shape, dtype) of each buffer the kernel takes, in order.
        task: hash of the task: inputs are allocated anew only when it changes.
        best_s: the best seconds known on this partition, or None.
        timing: when to stop.
    """

    path: str
    args: tuple[tuple[tuple[int, ...], str], ...]
    task: str
    best_s: float | None
    timing: TimingPolicy


@dataclasses.dataclass(frozen=True)
class ComparisonJob:
    """Several artifacts of one task to measure in turns; fields as of `Job`."""

    paths: tuple[str, ...]
    args: tuple[tuple[tuple[int, ...], str], ...]
    task: str
    timing: TimingPolicy


@dataclasses.dataclass(frozen=True)
class Opened:
    """A worker's first answer: what `Partition.evidence` says, or why the partition is refused."""

    evidence: tuple[dict[str, Any], ...] = ()
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answer to a job or to a comparison: a measurement for each artifact.

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
            station = stack.enter_context(_measuring(partition))
        except Exception as error:  # told to the parent, which names the partition
            connection.send(Opened(refusal=f"{type(error).__name__}: {error}"))
            return
        connection.send(Opened((partition.evidence(),)))
        gc.disable()  # no collection in the middle of a timing
        while True:
            reply = station.answer(connection.recv())
            connection.send(reply)
            if reply.ends:
                return


def serve_slices(connection: Connection, slices: Sequence[Sequence[Partition]]) -> None:
    """Answer jobs for several disjoint slices at the same time, each on a line of its own.

    The lines' ends come first, over `connection`; the one answer there says whether all stands.
    A thread for each slice, since TVM's current stream is the thread's. When one of them ends, the
    process does.
    """
    from gpu_aware_tune.partition import check_disjoint

    lines = [Connection(recv_handle(connection)) for _ in slices]
    opened: SimpleQueue[Opened] = SimpleQueue()
    over = threading.Event()
    evidence: list[dict[str, Any]] = []
    for line, partitions in zip(lines, slices, strict=True):
        # One after the other: a context's first steps wait for all of the device.
        args = (line, partitions, opened, over)
        threading.Thread(target=_serve_slice, args=args, daemon=True).start()
        answer = opened.get()
        if answer.refusal is not None:
            connection.send(answer)
            return
        evidence += answer.evidence
    try:
        apart = check_disjoint(slices)
    except SetupError as error:
        connection.send(Opened(refusal=str(error)))
        return
    connection.send(Opened(tuple({**seen, "apart": apart} for seen in evidence)))
    gc.disable()  # no collection in the middle of a timing
    sys.setswitchinterval(_SWITCH_S)
    over.wait()


def _serve_slice(
    line: Connection, partitions: Sequence[Partition], opened: SimpleQueue[Opened], over: Event
) -> None:
    """One slice's thread: messages are the place of a share in the slice, and a job for it."""
    try:
        with contextlib.ExitStack() as stack:
            try:
                stations = [stack.enter_context(_measuring(each)) for each in partitions]
            except Exception as error:  # as in `serve`
                opened.put(Opened(refusal=f"{type(error).__name__}: {error}"))
                return
            opened.put(Opened(tuple(partition.evidence() for partition in partitions)))
            ends = False
            while not ends:
                place, job = line.recv()
                reply = stations[place].answer(job)
                line.send(reply)
                ends = reply.ends
    except (EOFError, OSError):
        pass  # the parent closed the line
    finally:
        over.set()


@contextlib.contextmanager
def _measuring(partition: Partition) -> Iterator[MeasurementSession]:
    """Enter and check a partition, and open NVML beside it where it is of a GPU."""
    from gpu_aware_tune.partition import Nvml, own_processes

    partition.enter_worker()
    partition.verify()
    if partition.tvm_device != "cuda":
        yield MeasurementSession(partition, measure)
        return
    device = partition.share.device
    with Nvml(device.uuid or device.index, own_processes()) as nvml:
        monitor = DisturbanceMonitor(nvml.quick_snapshot, partition.sentinel_s)
        yield MeasurementSession(partition, monitor.measure)


class MeasurementSession:
    """One partition, ready to measure on."""

    def __init__(
        self,
        partition: Partition,
        policy: Callable[[Timer, float | None, TimingPolicy], Measurement],
    ) -> None:
        self._partition = partition
        self._policy = policy
        self._inputs = _Inputs(partition)

    def answer(self, job: Job | ComparisonJob) -> Reply:
        """Do what is asked for."""
        return self.compare(job) if isinstance(job, ComparisonJob) else self.measure(job)

    def measure(self, job: Job) -> Reply:
        """Measure one artifact; whatever it does short of killing the process is its failure."""
        try:
            buffers = self._inputs.of(job)
            module = self._loaded(job.path)
        except Exception as error:  # whatever a bad artifact makes TVM raise
            return self._failed(FailureKind.LOAD, error)
        try:
            with self._timer(module, buffers, job.timing) as (timer, kind):
                result = self._policy(timer, job.best_s, job.timing)
                how = kind()
        except Exception as error:  # as above: a kernel that refuses to run is a value
            return self._failed(FailureKind.RUN, error)
        return Reply((dataclasses.replace(result, how=how),))

    def compare(self, comparison: ComparisonJob) -> Reply:
        """Measure several artifacts in turns; one that fails fails them all."""
        kinds: list[Callable[[], tuple[str, ...]]] = []
        timers: list[Timer] = []
        try:
            buffers = self._inputs.of(comparison)
            with contextlib.ExitStack() as stack:
                for path in comparison.paths:
                    module = self._loaded(path)
                    timer, kind = stack.enter_context(
                        self._timer(module, buffers, comparison.timing)
                    )
                    timers.append(timer)
                    kinds.append(kind)
                results = compare(timers, comparison.timing)
                told = [kind() for kind in kinds]
        except Exception as error:  # as in `measure`
            failed = self._failed(FailureKind.RUN, error)
            return Reply(failed.measurements * len(comparison.paths), failed.ends)
        pairs = zip(results, told, strict=True)
        return Reply(tuple(dataclasses.replace(result, how=how) for result, how in pairs))

    def _loaded(self, path: str) -> Any:
        import tvm_ffi

        from gpu_aware_tune.partition.thread_pool import adopt

        # On a GPU the context that a module's end needs may be closed before it.
        cuda = self._partition.tvm_device == "cuda"
        module = tvm_ffi.load_module(path, keep_module_alive=cuda)
        if not cuda:
            adopt(path)
        return module

    def _failed(self, kind: FailureKind, error: Exception) -> Reply:
        text = f"{type(error).__name__}: {error}"
        kind = FailureKind.MEMORY if "out of memory" in text.lower() else kind
        return Reply((Measurement.failed(kind, text[:500]),), self._partition.faults_last)

    @contextlib.contextmanager
    def _timer(
        self, module: Any, buffers: Sequence[Any], timing: TimingPolicy
    ) -> Iterator[tuple[Timer, Callable[[], tuple[str, ...]]]]:
        """The timer for a loaded kernel, and what tells afterwards how it worked."""
        partition = self._partition
        function = module["main"]
        own = partition.launch_timer(lambda: function(*buffers), timing.cold)
        if own is None:
            yield self._evaluator(module, buffers, timing), lambda: ()
            return
        try:
            with partition.timing_context():
                yield own, lambda: (own.kind, "cold-l2" if timing.cold else "warm-l2")
            partition.sync()
        finally:
            own.close()

    def _evaluator(self, module: Any, buffers: Sequence[Any], timing: TimingPolicy) -> Timer:
        """TVM's own timer."""
        if timing.cold:
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

    def of(self, job: Job | ComparisonJob) -> list[Any]:
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
    connection: Connection,
    partition: Partition,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Run function(*args) once inside a partition and send what it returns."""
    partition.enter_worker()
    partition.verify()
    with partition.timing_context():
        connection.send(function(*args))
