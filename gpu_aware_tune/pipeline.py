"""Search, build and measurement at the same time, through bounded queues, without a batch barrier.

One loop in the parent waits for whichever worker answers first. No more workers run than there are
cores; while a kernel is timed on CPU cores, only as many of them as there are cores left over keep
running, the others are stopped (SIGSTOP) for these milliseconds.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpu_aware_tune.builder import BuildPool, Built, remove
from gpu_aware_tune.candidates import Candidate, Drafted, Searcher
from gpu_aware_tune.measure import SEARCH, Effort, Job, Measurer
from gpu_aware_tune.measurement import Measurement
from gpu_aware_tune.tasks import Task
from gpu_aware_tune.workers import Worker

_WAIT_S = 0.1
_WINDOW = 4  # artifacts gathered before the builders are stopped for a measuring window


@dataclass(frozen=True)
class Outcome:
    """One finished trial: a measurement for each share's units."""

    candidate: Candidate
    measurements: Mapping[int, Measurement]

    @property
    def failure(self) -> str | None:
        """The kind of the first failure, if any share has one."""
        for measurement in self.measurements.values():
            if measurement.failure is not None:
                return measurement.failure.kind
        return None


@dataclass
class _Measuring:
    candidate: Candidate
    path: str
    done: dict[int, Measurement] = field(default_factory=dict)


@dataclass
class Demand:
    """What the pipeline asks the search for while it runs.

    Args:
        next_task: the task to draft for, or None for no more.
        accept: how many of a draft's candidates may be built (0 and fewer: none).
        exhausted: told the tasks whose space has nothing new.
        lost: told when the search itself died on a task, with how it ended.
        best_s: the best seconds of a task by units, for stopping early.
        stop: whether to end now, leaving what is under way.
    """

    next_task: Callable[[], str | None] = lambda: None
    accept: Callable[[str, int], int] = lambda task, count: count
    exhausted: Callable[[str], None] = lambda task: None
    lost: Callable[[str, str], None] = lambda task, text: None
    best_s: Callable[[str], Mapping[int, float]] = lambda task: {}
    stop: Callable[[], bool] = lambda: False


class Pipeline:
    """Runs candidates through build and measurement, drafting new ones as the queue runs low.

    Args:
        tasks: every task a candidate may belong to.
        searchers: may be empty when only given candidates are run.
        builders: the build pool.
        measurers: one for each share; each candidate is measured on all of them.
        cores: how many workers may run at once.
        low_water: a draft is asked for when fewer candidates than this wait to be built.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        searchers: Sequence[Searcher],
        builders: BuildPool,
        measurers: Sequence[Measurer],
        cores: int,
        low_water: int,
    ) -> None:
        self._tasks = {task.hash: task for task in tasks}
        self._searchers = list(searchers)
        self._builders = builders
        self._measurers = list(measurers)
        self._cores = cores
        self._low_water = low_water
        self._to_build: deque[Candidate] = deque()
        self._ready: deque[_Measuring] = deque()
        self._measuring: _Measuring | None = None
        self._measuring_since = 0.0
        self.measure_core_s = 0.0

    @property
    def builds_in_flight(self) -> int:
        """Builds under way."""
        return len(self._builders.busy)

    @property
    def waiting_to_measure(self) -> int:
        """Artifacts that wait for a measuring worker."""
        return len(self._ready)

    def searcher_of(self, task: str) -> Searcher:
        """The searcher that looks after a task; the same one throughout a run."""
        return self._searchers[int(task) % len(self._searchers)]

    def run(
        self, candidates: Iterable[Candidate], demand: Demand | None = None, effort: Effort = SEARCH
    ) -> Iterator[Outcome]:
        """Give an outcome for each candidate, the given ones first and then the drafted ones.

        Ends when nothing is left to do or `demand.stop` says so; what is under way then is dropped.
        """
        demand = demand or Demand()
        self._to_build.extend(candidates)
        try:
            while not demand.stop():
                self._draft(demand)
                self._build()
                yield from self._measure(demand, effort)
                if not self._wait_list() and not self._ready and not self._to_build:
                    return
                yield from self._collect(demand)
        finally:
            self._drop()

    def _draft(self, demand: Demand) -> None:
        if len(self._to_build) >= self._low_water or self._running() >= self._cores:
            return
        idle = [s for s in self._searchers if s.worker.busy_since is None]
        if not idle:
            return
        task = demand.next_task()
        if task is None:
            return
        searcher = self.searcher_of(task)
        if searcher.worker.busy_since is None:
            searcher.ask(task)

    def _build(self) -> None:
        while self._to_build and self._builders.idle and self._running() < self._cores:
            if len(self._ready) >= 4 * _WINDOW * max(1, len(self._measurers)):
                return  # bounded: measuring has to catch up
            candidate = self._to_build.popleft()
            self._builders.submit(candidate, candidate.task, candidate.trace or None)

    def _measure(self, demand: Demand, effort: Effort) -> Iterator[Outcome]:
        """Start a measurement when one can be; finish the candidate when every share is done."""
        current = self._measuring
        if current is not None:
            measurer = self._measurers[len(current.done)]
            if not measurer.busy:
                return
            result = measurer.collect()
            if result is None:
                return
            self.measure_core_s += (time.monotonic() - self._measuring_since) * measurer.units
            current.done[measurer.units] = result
            if result.failure is not None and result.failure.kind != "run":
                for other in self._measurers:  # it would crash or hang there too
                    current.done.setdefault(other.units, result)
            if len(current.done) == len(self._measurers):
                self._measuring = None
                remove(current.path)
                yield Outcome(current.candidate, current.done)
                current = None
        if current is None:
            if not self._ready or not (self._window_open() or self._gathered()):
                self._resume()
                return
            current = self._measuring = self._ready.popleft()
        self._start_measuring(current, demand, effort)

    def _gathered(self) -> bool:
        return len(self._ready) >= _WINDOW or not self._working()

    def _start_measuring(self, current: _Measuring, demand: Demand, effort: Effort) -> None:
        measurer = self._measurers[len(current.done)]
        self._quiet(measurer.partition.cores)
        task = self._tasks[current.candidate.task]
        best_s = demand.best_s(task.hash).get(measurer.units)
        self._measuring_since = time.monotonic()
        measurer.submit(Job(current.path, task.args, task.hash, best_s, effort))

    def _quiet(self, cores: Sequence[int]) -> None:
        """Stop as many workers as leave the partition's cores free; the rest stay off them."""
        if not cores:
            return
        others = sorted(os.sched_getaffinity(0) - set(cores))
        for number, worker in enumerate(self._working()):
            if number < len(others):
                worker.confine(others)
            else:
                worker.pause()

    def _resume(self) -> None:
        for worker in self._working():
            worker.confine(None)
            worker.resume()

    def _window_open(self) -> bool:
        return any(worker.paused for worker in self._working())

    def _working(self) -> list[Worker]:
        busy = [s.worker for s in self._searchers if s.worker.busy_since is not None]
        return self._builders.busy + busy

    def _running(self) -> int:
        return len(self._working())

    def _wait_list(self) -> list[Worker | Measurer]:
        waiting: list[Worker | Measurer] = [w for w in self._working() if not w.paused]
        if self._measuring is not None:
            waiting.append(self._measurers[len(self._measuring.done)])
        return waiting

    def _collect(self, demand: Demand) -> Iterator[Outcome]:
        waiting = self._wait_list()
        ready = select.select(waiting, [], [], _WAIT_S)[0] if waiting else []
        for candidate, built in self._builders.collect(ready):
            yield from self._built(candidate, built)
        for searcher in self._searchers:
            if searcher.worker in ready:
                self._drafted(searcher, demand)

    def _built(self, candidate: Candidate, built: Built) -> Iterator[Outcome]:
        if built.failure is None:
            self._ready.append(_Measuring(candidate, built.path))
            return
        remove(built.path)
        failed = Measurement(None, failure=built.failure)
        yield Outcome(candidate, {measurer.units: failed for measurer in self._measurers})

    def _drafted(self, searcher: Searcher, demand: Demand) -> None:
        task = searcher.worker.job
        try:
            answer: Drafted = searcher.worker.recv()
        except EOFError:
            demand.lost(task, searcher.restart())
            return
        searcher.worker.done()
        if not answer.candidates:
            demand.exhausted(task)
            return
        accepted = demand.accept(task, len(answer.candidates))
        self._to_build.extend(answer.candidates[: max(0, accepted)])

    def _drop(self) -> None:
        """Forget what waits and let go of what is under way (after a stop)."""
        self._resume()
        self._to_build.clear()
        if self._measuring is not None:
            self._measurers[len(self._measuring.done)].abandon()
            remove(self._measuring.path)
            self._measuring = None
        for waiting in self._ready:
            remove(waiting.path)
        self._ready.clear()
        self._builders.abandon()
        for searcher in self._searchers:
            if searcher.worker.busy_since is not None:
                searcher.restart()
