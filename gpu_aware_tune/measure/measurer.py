"""The parent's handle on one measuring worker: deadlines, memory limit, replacement."""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure.worker import Job
from gpu_aware_tune.measurement import Measurement
from gpu_aware_tune.workers import Worker, WorkerHost

if TYPE_CHECKING:
    from gpu_aware_tune.partition import Partition

_ENTRY = "gpu_aware_tune.measure.worker:serve"
_OPEN_TIMEOUT_S = 60.0
_SLICE_S = 0.1


class Measurer:
    """Measures artifacts on one partition, one at a time.

    A worker that dies, hangs past `timeout_s` or grows past `memory_bytes` is replaced, and its
    candidate gets a failure.
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
        if not select.select([worker], [], [], _OPEN_TIMEOUT_S)[0]:
            worker.kill()
            raise SetupError(f"partition {self.partition} did not open in {_OPEN_TIMEOUT_S:.0f} s")
        try:
            refusal = worker.recv()
        except EOFError:
            refusal = worker.kill().text
        if refusal is not None:
            raise SetupError(f"partition {self.partition} failed its check: {refusal}")
        self._worker = worker

    def submit(self, job: Job) -> None:
        """Start measuring one artifact; `collect` gives the result."""
        if self._worker is None:
            self.open()
        assert self._worker is not None
        self._worker.send(job)

    def collect(self, wait_s: float = 0.0) -> Measurement | None:
        """The result of the job under way, or None when there is none yet."""
        worker = self._worker
        assert worker is not None
        if select.select([worker], [], [], wait_s)[0]:
            try:
                result: Measurement = worker.recv()
            except EOFError:
                return Measurement.failed("crash", self._replace())
            worker.done()
            return result
        if worker.busy_s() > self._timeout_s:
            self._replace()
            return Measurement.failed("timeout", f"no answer in {self._timeout_s:.0f} s")
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
        self.partition.close()

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
        self.name = widest.partition.share.describe()

    def serves(self, units: int) -> bool:
        """Whether a share of so many units can be measured here."""
        return units in self._of

    def of(self, units: int) -> Measurer:
        """The worker that measures on so many units."""
        return self._of[units]
