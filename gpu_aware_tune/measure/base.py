"""What the pipeline knows of a measuring worker, whichever way it is run; and starting one."""

from __future__ import annotations

import select
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure.measurement import Measurement
from gpu_aware_tune.measure.worker import ComparisonJob, Job, Opened
from gpu_aware_tune.workers import Worker

if TYPE_CHECKING:
    from gpu_aware_tune.partition import Partition

_OPEN_TIMEOUT_S = 60.0
_POLL_S = 0.1
# After a fault a GPU may need a moment: an MPS server takes clients again when all of the faulting
# ones have left.
_REOPEN_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)

# What came of a job or of each artifact of a comparison, how all of it failed, or None for not yet.
Answer = tuple[Measurement, ...] | Measurement | None


class BaseMeasurer(ABC):
    """Measures artifacts on one partition, one at a time."""

    def __init__(self, partition: Partition, timeout_s: float) -> None:
        self.partition = partition
        self.units = partition.share.units
        self.evidence: dict[str, Any] = {}  # what the partition's check saw
        self._timeout_s = timeout_s

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a job is under way."""

    @abstractmethod
    def open(self) -> None:
        """Start the worker and check its partition.

        Raises:
            SetupError: the partition is not what it says it is.
        """

    @abstractmethod
    def submit(self, job: Job | ComparisonJob) -> None:
        """Start measuring one artifact, or several in turns; `collect` gives the result."""

    @abstractmethod
    def abandon(self) -> None:
        """Give up the job under way, if any."""

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor for `select`, readable when the worker answers; only while busy."""

    @abstractmethod
    def close(self) -> None:
        """End the worker and give the partition back."""

    @abstractmethod
    def _answer(self, wait_s: float) -> Answer:
        """What came of the job under way, waiting so long for it."""

    def collect(self, wait_s: float = 0.0) -> Measurement | None:
        """The result of the job under way, or None when there is none yet."""
        answer = self._answer(wait_s)
        return answer[0] if isinstance(answer, tuple) else answer

    def measure(self, job: Job) -> Measurement:
        """Measure one artifact and wait; always returns, whatever the artifact does."""
        self.submit(job)
        while (result := self.collect(_POLL_S)) is None:
            pass
        return result

    def compare(self, comparison: ComparisonJob) -> tuple[Measurement, ...]:
        """Measure several artifacts in turns and wait; a fault of one is the failure of all."""
        self.submit(comparison)
        while (answer := self._answer(_POLL_S)) is None:
            pass
        return answer if isinstance(answer, tuple) else (answer,) * len(comparison.paths)

    def _limit_s(self, job: Job | ComparisonJob) -> float:
        """How long a job may take."""
        return self._timeout_s * (len(job.paths) if isinstance(job, ComparisonJob) else 1)


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
