"""The parent's handle on one measuring worker: deadlines, memory limit, replacement."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure.worker import Contest, Job, Opened, Reply
from gpu_aware_tune.measurement import Measurement
from gpu_aware_tune.workers import Worker, WorkerHost

if TYPE_CHECKING:
    from gpu_aware_tune.partition import Partition

_ENTRY = "gpu_aware_tune.measure.worker:serve"
_OPEN_TIMEOUT_S = 60.0
_SLICE_S = 0.1
# After a fault a GPU may need a moment: an MPS server takes clients again when all of the faulting
# ones have left.
_REOPEN_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)


class Measurer:
    """Measures artifacts on one partition, one at a time.

    A worker that dies, hangs past `timeout_s`, grows past `memory_bytes` or had an error on a GPU
    is replaced, and its candidate gets a failure. Where a fault reaches the workers of other
    partitions too (MPS), all of them are replaced.
    """

    def __init__(
        self, host: WorkerHost, partition: Partition, timeout_s: float, memory_bytes: int
    ) -> None:
        self.partition = partition
        self.units = partition.share.units
        self._host = host
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._worker: Worker | None = None
        self._retired_cpu_s = 0.0
        self.evidence: dict[str, Any] = {}  # what the partition's check saw
        self._fault_group: list[Measurer] = partition.fault_group
        self._fault_group.append(self)

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._worker is not None and self._worker.busy_since is not None

    def open(self) -> None:
        """Start the worker and check its partition.

        Raises:
            SetupError: the partition is not what it says it is.
        """
        worker = self._host.spawn(_ENTRY, self.partition, env=self.partition.env())
        (self.evidence,) = opened(worker, f"partition {self.partition}")
        self._worker = worker

    def submit(self, job: Job | Contest) -> None:
        """Start measuring one artifact, or several in turns; `collect` gives the result."""
        if self._worker is None:
            reopen(self.open, self.partition)
        assert self._worker is not None
        self._worker.send(job)

    def collect(self, wait_s: float = 0.0) -> Measurement | None:
        """The result of the job under way, or None when there is none yet."""
        answer = self._collect(wait_s, self._timeout_s)
        return answer[0] if isinstance(answer, tuple) else answer

    def compare(self, contest: Contest) -> tuple[Measurement, ...]:
        """Measure several artifacts in turns and wait; a fault of one is the failure of all."""
        self.submit(contest)
        count = len(contest.paths)
        while (answer := self._collect(_SLICE_S, self._timeout_s * count)) is None:
            pass
        return answer if isinstance(answer, tuple) else (answer,) * count

    def _collect(
        self, wait_s: float, timeout_s: float
    ) -> tuple[Measurement, ...] | Measurement | None:
        """What the worker answered, how it failed, or None while it is at work."""
        worker = self._worker
        assert worker is not None
        if select.select([worker], [], [], wait_s)[0]:
            try:
                reply: Reply = worker.recv()
            except EOFError:
                return Measurement.failed("crash", self._replace_all())
            worker.done()
            if reply.ends:
                self._replace_all()
            return reply.measurements
        if worker.busy_s() > timeout_s:
            self.partition.before_kill(worker.pid)
            self._replace_all()
            return Measurement.failed("timeout", f"no answer in {timeout_s:.0f} s")
        if worker.rss_bytes() > self._memory_bytes:
            self._replace()
            return Measurement.failed("memory", f"over {self._memory_bytes >> 20} MiB")
        return None

    def measure(self, job: Job) -> Measurement:
        """Measure one artifact and wait; always returns, whatever the artifact does."""
        self.submit(job)
        while (result := self.collect(_SLICE_S)) is None:
            pass
        return result

    def abandon(self) -> None:
        """Give up the job under way, if any."""
        if self.busy:
            self._replace()

    def fileno(self) -> int:
        """The worker's descriptor, for `select`; only while busy."""
        assert self._worker is not None
        return self._worker.fileno()

    def cpu_s(self) -> float:
        """CPU seconds of this measurer's workers so far."""
        return self._retired_cpu_s + (self._worker.cpu_s() if self._worker else 0.0)

    def close(self) -> None:
        """End the worker and give the partition back."""
        if self._worker is not None:
            self._replace()
        if self in self._fault_group:
            self._fault_group.remove(self)
        self.partition.close()

    def _replace_all(self) -> str:
        """Replace this worker and the idle ones that its fault reached; a busy one reports itself."""
        for other in self._fault_group:
            if other is not self and other._worker is not None and not other.busy:
                other._replace()
        return self._replace()

    def _replace(self) -> str:
        """Kill the worker; the next job starts a new one. Returns how it ended."""
        assert self._worker is not None
        self._retired_cpu_s += self._worker.cpu_s()
        text = self._worker.kill().text
        self._worker = None
        return text


class Slice:
    """A part of the device that shares nothing with the other slices; one measurement at a time.

    Args:
        measurers: one for each number of units that can be had inside the slice.
    """

    def __init__(self, measurers: Sequence[Measurer]) -> None:
        self._of = {measurer.units: measurer for measurer in measurers}
        widest = max(measurers, key=lambda measurer: measurer.units)
        self.name = widest.partition.share.describe().rpartition("= ")[2]

    def serves(self, units: int) -> bool:
        """Whether a share of so many units can be measured here."""
        return units in self._of

    def of(self, units: int) -> Measurer:
        """The worker that measures on so many units."""
        return self._of[units]


def opened(worker: Worker, what: str) -> tuple[dict[str, Any], ...]:
    """Wait for a worker's first answer; gives what it saw.

    Raises:
        SetupError: it refuses, died, or says nothing.
    """
    if not select.select([worker], [], [], _OPEN_TIMEOUT_S)[0]:
        worker.kill()
        raise SetupError(f"{what} did not open in {_OPEN_TIMEOUT_S:.0f} s")
    try:
        answer: Opened = worker.recv()
    except EOFError:
        answer = Opened(refusal=worker.kill().text)
    else:
        if answer.refusal is not None:
            worker.kill()
    if answer.refusal is not None:
        raise SetupError(f"{what} failed its check: {answer.refusal}")
    return answer.evidence


def reopen(
    open_worker: Callable[[], None],
    partition: Partition,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Start a worker in place of one that is gone; on a GPU a few times where that fails at first."""
    for pause_s in _REOPEN_PAUSES_S if partition.faults_last else ():
        try:
            return open_worker()
        except SetupError:
            pause(pause_s)
    open_worker()
