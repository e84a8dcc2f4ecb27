"""Slices that measure at the same time in one worker: a thread and a stream for each.

Workers of their own would not run together on a GPU without MPS: contexts of several processes take
turns there. Each slice has a pipe to its own thread, so that jobs and answers of the slices do not
wait for one another.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import TYPE_CHECKING

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure.base import Answer, BaseMeasurer, opened, reopen
from gpu_aware_tune.measure.measurement import FailureKind, Measurement
from gpu_aware_tune.measure.worker import ComparisonJob, Job, Reply, serve_slices
from gpu_aware_tune.workers import Worker, WorkerHost

if TYPE_CHECKING:
    from gpu_aware_tune.partition import Partition

_EXIT_S = 1.0  # a worker that closed one pipe closes the others within this


class SharedWorker:
    """One process that measures on several slices at once; within a slice its shares take turns.

    A fault, a hang, a crash or too much memory ends the process, and every job under way with it.
    Of several none can be blamed: on a GPU a fault shows in whichever thread asks next, and a hang
    holds up its neighbours. So each of them is measured once more, alone, while new jobs wait, and
    what comes of that counts.

    Args:
        host: where the worker comes from.
        slices: the partitions of each slice, the largest first; slices have no unit in common.
        timeout_s: the most seconds for one job.
        memory_bytes: limit for one slice; the worker may have as much as all of them.
    """

    def __init__(
        self,
        host: WorkerHost,
        slices: Sequence[Sequence[Partition]],
        timeout_s: float,
        memory_bytes: int,
    ) -> None:
        for partition in (partition for own in slices for partition in own):
            if not partition.one_worker:
                raise SetupError(
                    f"backend {partition.backend} needs a process for each share: shares that "
                    "measure at the same time in one process are --partition green"
                )
        self._host = host
        self._memory_bytes = memory_bytes * len(slices)
        self._worker: Worker | None = None
        self._states = [
            _SliceState([SharedMeasurer(self, partition, timeout_s) for partition in own])
            for own in slices
        ]
        self._state_of = {user: state for state in self._states for user in state.measurers}
        self._suspects: list[_SliceState] = []  # to be measured alone, the first one now

    @property
    def slices(self) -> list[list[SharedMeasurer]]:
        """For each slice what measures on its shares."""
        return [state.measurers for state in self._states]

    @property
    def is_open(self) -> bool:
        """Whether the process runs."""
        return self._worker is not None

    def open(self) -> None:
        """Start the process and check every partition, and that the slices are apart.

        Raises:
            SetupError: one is not what it says it is, or two have a unit in common.
        """
        measurers = list(self._state_of)
        env = {k: v for measurer in measurers for k, v in measurer.partition.env().items()}
        partitions = [[m.partition for m in state.measurers] for state in self._states]
        worker = self._host.spawn(serve_slices, partitions, env=env)
        for state in self._states:
            state.connection = _connection_to(worker)
        names = ", ".join(str(measurer.partition) for measurer in measurers)
        try:
            evidence = opened(worker, f"partitions {names}")
        except SetupError:
            self._hang_up()
            raise
        for measurer, seen in zip(measurers, evidence, strict=True):
            measurer.evidence = seen
        self._worker = worker

    def submit(self, user: SharedMeasurer, job: Job | ComparisonJob, limit_s: float) -> None:
        """Give a slice a job; it begins at once unless others have to be measured alone first."""
        state = self._state_of[user]
        assert state.user is None, "a slice has one job at a time"
        state.user, state.job, state.limit_s = user, job, limit_s
        self._send_waiting()

    def works_for(self, user: SharedMeasurer) -> bool:
        """Whether a slice's job is of this one of its shares."""
        return self._state_of[user].user is user

    def answer(self, user: SharedMeasurer, wait_s: float) -> Answer:
        """What came of a job, waiting so long for it."""
        state = self._state_of[user]
        self._send_waiting()
        if state.answer is None:  # a job that waits for its turn helps the one whose turn it is
            self._read(self._suspects[0] if state.since is None else state, wait_s)
        answer, state.answer = state.answer, None
        if answer is not None:
            state.user = None
        return answer

    def abandon(self, user: SharedMeasurer) -> None:
        """Give up a job; the others under way begin anew, since the process has to end for it."""
        state = self._state_of[user]
        began = state.since is not None
        self._finish(state, None)
        state.user = None
        if began:
            self.close_worker()

    def fileno(self, user: SharedMeasurer) -> int:
        """The descriptor of a slice's pipe."""
        state = self._state_of[user]
        self._send_waiting()
        if state.connection is None:  # there is an answer, of a job that ended the process
            self._reopen()
        assert state.connection is not None
        return state.connection.fileno()

    def close_worker(self, died: bool = False) -> str:
        """End the process; the next job starts a new one. Returns how it ended.

        Args:
            died: it ended by itself, which is then what is told.
        """
        self._hang_up()
        worker, self._worker = self._worker, None
        if worker is None:
            return ""
        if died and select.select([worker], [], [], _EXIT_S)[0]:
            with contextlib.suppress(EOFError):
                worker.recv()
        return worker.kill().text

    def _send_waiting(self) -> None:
        """Begin with the jobs that wait, or with one of them where it has to be alone."""
        waiting = [state for state in self._states if state.job is not None and state.since is None]
        if self._suspects:
            waiting = [state for state in waiting if state is self._suspects[0]]
        if waiting and self._worker is None:
            self._reopen()
        for state in waiting:
            state.send()

    def _read(self, state: _SliceState, wait_s: float) -> None:
        """Take the answer to a job that has begun, or end a process that gives none."""
        assert state.connection is not None and state.since is not None and self._worker is not None
        if select.select([state.connection], [], [], wait_s)[0]:
            try:
                reply: Reply = state.connection.recv()
            except (EOFError, OSError):
                self._end(state, None)
                return
            if reply.ends:
                self._end(state, reply.measurements)
            else:
                self._finish(state, reply.measurements)
        elif time.monotonic() - state.since > state.limit_s:
            text = f"no answer in {state.limit_s:.0f} s"
            self._end(state, Measurement.failed(FailureKind.TIMEOUT, text))
        elif self._worker.rss_bytes() > self._memory_bytes:
            text = f"over {self._memory_bytes >> 20} MiB"
            self._end(state, Measurement.failed(FailureKind.MEMORY, text))

    def _end(self, state: _SliceState, answer: Answer) -> None:
        """End the process over a job; None: it crashed. What was under way beside it is suspect too."""
        beside = [other for other in self._states if other is not state and other.since is not None]
        how = self.close_worker(died=answer is None)
        if beside:
            self._suspects = [state, *beside]
        else:
            self._finish(state, answer or Measurement.failed(FailureKind.CRASH, how))

    def _finish(self, state: _SliceState, answer: Answer) -> None:
        state.job, state.since, state.answer = None, None, answer
        if state in self._suspects:
            self._suspects.remove(state)

    def _reopen(self) -> None:
        reopen(self.open, self._states[0].measurers[0].partition)

    def _hang_up(self) -> None:
        for state in self._states:
            state.hang_up()


@dataclass(eq=False)
class _SliceState:
    """A slice: the pipe to its thread, and the job it has."""

    measurers: list[SharedMeasurer]
    connection: Connection | None = None
    user: SharedMeasurer | None = None  # whose job it is, until its answer is taken
    job: Job | ComparisonJob | None = None
    limit_s: float = 0.0
    since: float | None = None  # when it began; None: it waits
    answer: Answer = None

    def send(self) -> None:
        """Begin with the job; a worker that died meanwhile is noticed when it is read from."""
        assert self.connection is not None and self.user is not None
        self.since = time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.send((self.measurers.index(self.user), self.job))

    def hang_up(self) -> None:
        """Close the pipe; a job that had begun waits again."""
        self.since = None
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class SharedMeasurer(BaseMeasurer):
    """Measures on one share of one slice, in a worker that all slices have in common."""

    def __init__(self, worker: SharedWorker, partition: Partition, timeout_s: float) -> None:
        super().__init__(partition, timeout_s)
        self._shared = worker

    @property
    def busy(self) -> bool:
        """Whether a job is under way, or waits for others to be measured alone."""
        return self._shared.works_for(self)

    def open(self) -> None:
        """Start the worker unless it runs, and check the partitions of all slices.

        Raises:
            SetupError: one is not what it says it is, or two slices have a unit in common.
        """
        if not self._shared.is_open:
            self._shared.open()

    def submit(self, job: Job | ComparisonJob) -> None:
        """Start measuring one artifact, or several in turns; `collect` gives the result."""
        self._shared.submit(self, job, self._limit_s(job))

    def abandon(self) -> None:
        """Give up the job under way, if any."""
        if self.busy:
            self._shared.abandon(self)

    def fileno(self) -> int:
        """The descriptor of the slice's pipe, for `select`; only while busy."""
        return self._shared.fileno(self)

    def close(self) -> None:
        """End the worker, with whatever is under way in it, and give the partition back."""
        self.abandon()
        self._shared.close_worker()
        self.partition.close()

    def _answer(self, wait_s: float) -> Answer:
        return self._shared.answer(self, wait_s)


def _connection_to(worker: Worker) -> Connection:
    """A pipe of its own to one thread of a worker, whose other end is sent there."""
    mine, theirs = socket.socketpair()
    with theirs, contextlib.suppress(OSError):  # a worker that died is noticed when it is asked
        send_handle(worker, theirs.fileno(), worker.pid)
    return Connection(mine.detach())
