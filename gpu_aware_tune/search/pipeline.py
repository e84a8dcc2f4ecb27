"""Search, build and measurement at the same time, through bounded queues, without a batch barrier.

One loop in the parent waits for whichever worker answers first. No more workers run than there are
cores; while a kernel is timed on CPU cores, only as many of them as there are cores left over keep
running, the others are stopped (SIGSTOP) for these milliseconds.
"""

from __future__ import annotations

import dataclasses
import os
import select
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpu_aware_tune.codegen.build_pool import BuildPool, Built, remove
from gpu_aware_tune.measure import SEARCH, BaseMeasurer, Job, Slice, TimingPolicy
from gpu_aware_tune.measure.measurement import FailureKind, Measurement
from gpu_aware_tune.search.best_artifacts import BestArtifacts
from gpu_aware_tune.search.candidates import Candidate, Drafted, NewTask, Searcher
from gpu_aware_tune.search.sources import ArtifactSink, CandidateSource
from gpu_aware_tune.workers import Worker

_WAIT_S = 0.1
_WINDOW = 4  # artifacts gathered before the builders are stopped for a measuring window

Args = tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Outcome:
    """One finished trial: a measurement for each of the units its task is measured on."""

    candidate: Candidate
    measurements: Mapping[int, Measurement]

    @property
    def failure(self) -> str | None:
        """The kind of the first failure, if any share has one."""
        for measurement in self.measurements.values():
            if measurement.failure is not None:
                return measurement.failure.kind
        return None


@dataclass(eq=False)
class _Artifact:
    """A built candidate and what is known of it; `todo` are the units nobody has begun with."""

    candidate: Candidate
    path: str
    todo: list[int]
    wanted: int
    done: dict[int, Measurement] = field(default_factory=dict)
    twins: list[Candidate] = field(default_factory=list)  # other schedules, the same machine code


@dataclass
class _UnderWay:
    """A measurement that has begun; `together`: another slice measured meanwhile."""

    artifact: _Artifact
    units: int
    since: float
    together: bool


@dataclass(frozen=True)
class TaskSpec:
    """What the workers need of a task: its buffers, and the units to measure it on."""

    args: Args
    units: tuple[int, ...]


class Pipeline:
    """Runs candidates through build and measurement, drafting new ones as the queue runs low.

    Args:
        tasks: every task a candidate may belong to, by hash.
        searchers: may be empty when only given candidates are run.
        builders: the build pool.
        slices: disjoint parts of the device, each with the workers that measure there; whichever
            is free takes the next artifact that it can measure. None: artifacts go to an `ArtifactSink`.
        cores: how many workers may run at once.
        low_water: a draft is asked for when fewer candidates than this wait to be built.
        best: takes what has been measured; by default its files are removed.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskSpec],
        searchers: Sequence[Searcher],
        builders: BuildPool,
        slices: Sequence[Slice],
        cores: int,
        low_water: int,
        best: BestArtifacts | None = None,
    ) -> None:
        self._tasks = dict(tasks)
        self._searchers = list(searchers)
        self._builders = builders
        self._slices = list(slices)
        self.cores = cores
        self._low_water = low_water
        self._best = best
        self._to_build: deque[Candidate] = deque()
        self._ready: deque[_Artifact] = deque()
        self._under_way: dict[int, _UnderWay] = {}  # by the slice's number
        self._alone = False
        self._sink = ArtifactSink()
        self._seen: dict[tuple[str, str], _Artifact] = {}  # by task and digest
        self.measure_core_s = 0.0

    @property
    def capacity(self) -> int:
        """How many candidates at a time keep every worker at work."""
        return self._low_water + len(self._builders.workers) + len(self._slices)

    @property
    def builds_in_flight(self) -> int:
        """Builds under way."""
        return len(self._builders.busy)

    @property
    def waiting_to_measure(self) -> int:
        """Artifacts that wait for a measuring worker."""
        return len(self._ready)

    @property
    def slices(self) -> list[tuple[str, str | None]]:
        """Each slice's name and the hash of the task that it measures now, if any."""
        working = {n: begun.artifact.candidate.task for n, begun in self._under_way.items()}
        return [(slice_.name, working.get(n)) for n, slice_ in enumerate(self._slices)]

    def add_task(self, task: NewTask) -> None:
        """Give a task to the searcher that looks after it."""
        self._searcher_of(task.task).add(task)

    def tell(self, candidate: Candidate, seconds: float | None) -> None:
        """Let the search learn what a candidate came to; None: it failed."""
        self._searcher_of(candidate.task).tell(candidate, seconds)

    def run(
        self,
        candidates: Iterable[Candidate],
        source: CandidateSource | None = None,
        timing: TimingPolicy = SEARCH,
        alone: bool = False,
        sink: ArtifactSink | None = None,
    ) -> Iterator[Outcome]:
        """Give an outcome for each candidate, the given ones first and then the drafted ones.

        Ends when nothing is left to do or `source.stop` says so; what is under way then is dropped.

        Args:
            candidates: to be built and measured before anything is drafted.
            source: gives further candidates; none by default.
            timing: how long to measure.
            alone: one measurement at a time, with nothing else running.
            sink: the connection to other machines; none by default.
        """
        source, self._sink = source or CandidateSource(), sink or ArtifactSink()
        self._alone = alone
        self._seen.clear()
        self._to_build.extend(candidates)
        try:
            while not source.stop():
                self._to_build.extend(self._sink.candidates())
                for candidate, built in self._sink.artifacts():
                    yield from self._built(candidate, built, source)
                self._draft(source)
                self._build()
                yield from self._finish_measurements()
                self._start_measurements(source, timing)
                if not self._wait_list() and not self._ready and not self._to_build:
                    if not self._sink.wait():
                        return
                    continue
                yield from self._collect(source)
        finally:
            self._drop()

    def core_seconds(self) -> dict[str, float]:
        """What the workers have used so far, in core seconds."""
        return {
            "search": sum(searcher.cpu_s() for searcher in self._searchers),
            "build": self._builders.cpu_s(),
            "measure": self.measure_core_s,
        }

    def _searcher_of(self, task: str) -> Searcher:
        return self._searchers[int(task) % len(self._searchers)]

    def _draft(self, source: CandidateSource) -> None:
        if len(self._to_build) >= self._low_water or self._running() >= self.cores:
            return
        if all(searcher.worker.busy_since is not None for searcher in self._searchers):
            return
        task = source.next_task([task for task in self._tasks if self._searches(task)])
        if task is not None:
            self._searcher_of(task).ask(task)

    def _searches(self, task: str) -> bool:
        return self._searcher_of(task).worker.busy_since is not None

    def _build(self) -> None:
        while self._to_build and self._builders.idle and self._running() < self.cores:
            if len(self._ready) >= 4 * _WINDOW * max(1, len(self._slices)):
                return  # bounded: measuring has to catch up
            candidate = self._to_build.popleft()
            self._builders.submit(candidate, candidate.task, candidate.trace)

    def _finish_measurements(self) -> Iterator[Outcome]:
        """Take what the slices have measured; an artifact is through when all its units are."""
        for number, begun in list(self._under_way.items()):
            artifact, units = begun.artifact, begun.units
            result = self._slices[number].of(units).collect()
            if result is None:
                continue
            del self._under_way[number]
            self.measure_core_s += (time.monotonic() - begun.since) * units
            if begun.together:
                result = dataclasses.replace(result, how=(*result.how, "together"))
            artifact.done[units] = result
            if result.failure is not None and result.failure.kind != FailureKind.RUN:
                for other in artifact.todo:  # it would crash or hang there too
                    artifact.done[other] = result
                artifact.todo.clear()
                if artifact in self._ready:
                    self._ready.remove(artifact)
            if len(artifact.done) == artifact.wanted:
                self._let_go(artifact)
                for candidate in (artifact.candidate, *artifact.twins):
                    yield Outcome(candidate, artifact.done)

    def _let_go(self, artifact: _Artifact) -> None:
        """Hand a measured artifact on, or remove it."""
        if self._best is None:
            remove(artifact.path)
            return
        seconds = {units: result.seconds for units, result in artifact.done.items()}
        traces = [each.trace for each in (artifact.candidate, *artifact.twins)]
        self._best.offer(artifact.candidate.task, traces, artifact.path, seconds)

    def _start_measurements(self, source: CandidateSource, timing: TimingPolicy) -> None:
        """Give every free slice an artifact, once enough have gathered for a measuring window."""
        if self._ready and (self._window_open() or self._gathered()):
            for number, slice_ in enumerate(self._slices):
                if number not in self._under_way and not (self._alone and self._under_way):
                    self._start_measuring(number, slice_, source, timing)
        if not self._under_way:
            self._resume()

    def _gathered(self) -> bool:
        return len(self._ready) >= _WINDOW or not self._working()

    def _start_measuring(
        self, number: int, slice_: Slice, source: CandidateSource, timing: TimingPolicy
    ) -> None:
        for artifact in self._ready:
            units = next((count for count in artifact.todo if slice_.serves(count)), None)
            if units is not None:
                break
        else:
            return
        artifact.todo.remove(units)
        if not artifact.todo:
            self._ready.remove(artifact)
        for other in self._under_way.values():
            other.together = True
        together = bool(self._under_way)
        self._under_way[number] = _UnderWay(artifact, units, time.monotonic(), together)
        self._quiet()
        task = artifact.candidate.task
        best_s = source.best_s(task).get(units)
        job = Job(artifact.path, self._tasks[task].args, task, best_s, timing)
        slice_.of(units).submit(job)

    def _quiet(self) -> None:
        """Stop as many workers as leave the measured cores free; the rest stay off them."""
        measured = {
            core
            for number, begun in self._under_way.items()
            for core in self._slices[number].of(begun.units).partition.cores
        }
        if not measured:
            return
        others = [] if self._alone else sorted(os.sched_getaffinity(0) - measured)
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

    def _wait_list(self) -> list[Worker | BaseMeasurer]:
        waiting: list[Worker | BaseMeasurer] = [w for w in self._working() if not w.paused]
        waiting += [self._slices[n].of(begun.units) for n, begun in self._under_way.items()]
        return waiting

    def _collect(self, source: CandidateSource) -> Iterator[Outcome]:
        waiting = self._wait_list()
        ready = select.select(waiting, [], [], _WAIT_S)[0] if waiting else []
        for candidate, built in self._builders.collect(ready):
            yield from self._built(candidate, built, source)
        for searcher in self._searchers:
            if searcher.worker in ready:
                self._drafted(searcher, source)

    def _built(
        self, candidate: Candidate, built: Built, source: CandidateSource
    ) -> Iterator[Outcome]:
        units = self._tasks[candidate.task].units
        if built.failure is not None:
            remove(built.path)
            failed = Measurement(None, failure=built.failure)
            yield Outcome(candidate, dict.fromkeys(units, failed))
            return
        if not self._slices:
            self._sink.take(candidate, built)
            return
        code = candidate.task, built.digest
        seen = self._seen.get(code)
        if seen is None:
            seen = self._seen[code] = _Artifact(candidate, built.path, list(units), len(units))
            self._ready.append(seen)
            return
        remove(built.path)
        if len(seen.done) == seen.wanted:
            yield Outcome(candidate, seen.done)
        else:
            seen.twins.append(candidate)

    def _drafted(self, searcher: Searcher, source: CandidateSource) -> None:
        task = searcher.worker.job
        try:
            answer: Drafted = searcher.worker.recv()
        except EOFError:
            source.lost(task, searcher.restart())
            return
        searcher.worker.done()
        if not answer.candidates:
            source.exhausted(task)
            return
        self._to_build.extend(source.accept(task, answer.candidates))

    def _drop(self) -> None:
        """Forget what waits and let go of what is under way (after a stop)."""
        self._resume()
        self._to_build.clear()
        for number, begun in self._under_way.items():
            self._slices[number].of(begun.units).abandon()
            remove(begun.artifact.path)
        self._under_way.clear()
        for waiting in self._ready:
            remove(waiting.path)
        self._ready.clear()
        self._builders.abandon()
        for searcher in self._searchers:
            if searcher.worker.busy_since is not None:
                searcher.restart()
