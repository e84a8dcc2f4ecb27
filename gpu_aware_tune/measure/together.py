"""Shares that measure at the same time: one worker process, a thread and a stream for each share.

Processes of their own would not run together on a GPU without MPS: they take turns. What is
measured so includes what the neighbours cost; each sample says so (`how` has "together").
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure.measurer import opened, reopen
from gpu_aware_tune.measure.worker import Job, Reply
from gpu_aware_tune.measurement import Measurement
from gpu_aware_tune.workers import Worker, WorkerHost

if TYPE_CHECKING:
    from gpu_aware_tune.partition import Partition

_ENTRY = "gpu_aware_tune.measure.worker:serve_together"


class Together:
    """Measures a candidate on each of several disjoint shares at the same time.

    The shares are one process: a fault, a hang or a crash of one candidate fails all that were
    under way with it, and the worker is replaced.

    Args:
        host: where the worker comes from.
        partitions: opened with `disjoint=True`, of a backend that has `one_worker`.
        timeout_s: the most seconds for one round.
    """

    def __init__(self, host: WorkerHost, partitions: Sequence[Partition], timeout_s: float) -> None:
        if not all(partition.one_worker for partition in partitions):
            raise SetupError(
                f"backend {partitions[0].backend} needs a process for each share: shares that "
                "measure at the same time in one process are --partition green"
            )
        self.partitions = list(partitions)
        self.evidence: tuple[dict[str, Any], ...] = ()
        self._host = host
        self._timeout_s = timeout_s
        self._worker: Worker | None = None

    def open(self) -> None:
        """Start the worker and check every partition.

        Raises:
            SetupError: one is not what it says it is.
        """
        env = {k: v for partition in self.partitions for k, v in partition.env().items()}
        worker = self._host.spawn(_ENTRY, self.partitions, env=env)
        names = ", ".join(str(partition) for partition in self.partitions)
        self.evidence = opened(worker, f"partitions {names}")
        self._worker = worker

    def measure(self, jobs: Sequence[Job]) -> tuple[Measurement, ...]:
        """Measure one job on each share, all at once; always returns a result for each."""
        if self._worker is None:
            reopen(self.open, self.partitions[0])
        worker = self._worker
        assert worker is not None
        worker.send(list(jobs))
        if not select.select([worker], [], [], self._timeout_s)[0]:
            self.close_worker()
            return self._failed("timeout", f"no answer in {self._timeout_s:.0f} s")
        try:
            reply: Reply = worker.recv()
        except EOFError:
            return self._failed("crash", self.close_worker())
        worker.done()
        if reply.ends:
            self.close_worker()
            lost = Measurement.failed("crash", "lost with another share's candidate")
            return tuple(m if m.failure is not None else lost for m in reply.measurements)
        return reply.measurements

    def close_worker(self) -> str:
        """End the worker; the next round starts a new one. Returns how it ended."""
        worker, self._worker = self._worker, None
        return worker.kill().text if worker is not None else ""

    def close(self) -> None:
        """End the worker and give the partitions back."""
        self.close_worker()
        for partition in self.partitions:
            partition.close()

    def _failed(self, kind: str, text: str) -> tuple[Measurement, ...]:
        return tuple(Measurement.failed(kind, text) for _ in self.partitions)
