"""The parent's handle on a worker that measures on one partition: deadline, memory, replacement."""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpu_aware_tune.measure.base import Answer, BaseMeasurer, opened, reopen
from gpu_aware_tune.measure.measurement import FailureKind, Measurement
from gpu_aware_tune.measure.worker import ComparisonJob, Job, Reply, serve
from gpu_aware_tune.workers import Worker, WorkerHost

if TYPE_CHECKING:
    from gpu_aware_tune.partition import Partition


class Measurer(BaseMeasurer):
    """Measures on one partition in a process of its own.

    A worker that dies, hangs past `timeout_s`, grows past `memory_bytes` or had an error on a GPU
    is replaced, and its candidate gets a failure. Where a fault reaches the workers of other
    partitions too (MPS), all of them are replaced.
    """

    def __init__(
        self, host: WorkerHost, partition: Partition, timeout_s: float, memory_bytes: int
    ) -> None:
        super().__init__(partition, timeout_s)
        self._host = host
        self._memory_bytes = memory_bytes
        self._worker: Worker | None = None
        self._until_s = 0.0  # how long the job under way may take
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
        worker = self._host.spawn(serve, self.partition, env=self.partition.env())
        (self.evidence,) = opened(worker, f"partition {self.partition}")
        self._worker = worker

    def submit(self, job: Job | ComparisonJob) -> None:
        """Start measuring one artifact, or several in turns; `collect` gives the result."""
        if self._worker is None:
            reopen(self.open, self.partition)
        assert self._worker is not None
        self._until_s = self._limit_s(job)
        self._worker.send(job)

    def _answer(self, wait_s: float) -> Answer:
        worker = self._worker
        assert worker is not None
        if select.select([worker], [], [], wait_s)[0]:
            try:
                reply: Reply = worker.recv()
            except EOFError:
                return Measurement.failed(FailureKind.CRASH, self._replace_all())
            worker.done()
            if reply.ends:
                self._replace_all()
            return reply.measurements
        if worker.busy_s() > self._until_s:
            self.partition.before_kill(worker.pid)
            self._replace_all()
            return Measurement.failed(FailureKind.TIMEOUT, f"no answer in {self._until_s:.0f} s")
        if worker.rss_bytes() > self._memory_bytes:
            self.partition.before_kill(worker.pid)
            self._replace()
            return Measurement.failed(FailureKind.MEMORY, f"over {self._memory_bytes >> 20} MiB")
        return None

    def abandon(self) -> None:
        """Give up the job under way, if any."""
        if self.busy:
            self._replace()

    def fileno(self) -> int:
        """The worker's descriptor, for `select`; only while busy."""
        assert self._worker is not None
        return self._worker.fileno()

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
        text = self._worker.kill().text
        self._worker = None
        return text


class Slice:
    """A part of the device that shares nothing with the other slices; one measurement at a time.

    Args:
        measurers: one for each number of units that can be had inside the slice.
    """

    def __init__(self, measurers: Sequence[BaseMeasurer]) -> None:
        self._of = {measurer.units: measurer for measurer in measurers}
        widest = max(measurers, key=lambda measurer: measurer.units)
        self.name = widest.partition.share.describe().rpartition("= ")[2]

    def serves(self, units: int) -> bool:
        """Whether a share of so many units can be measured here."""
        return units in self._of

    def of(self, units: int) -> BaseMeasurer:
        """What measures on so many units."""
        return self._of[units]
