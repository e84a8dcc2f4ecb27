"""The best kernels measured again: longer, in turns, and with nothing else running."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from gpu_aware_tune.codegen.build_pool import remove
from gpu_aware_tune.events import Event, Note, Origin
from gpu_aware_tune.measure import RETIME, SEARCH, ComparisonJob, TimingPolicy
from gpu_aware_tune.model.tasks import Task
from gpu_aware_tune.records.task_records import TaskRecords
from gpu_aware_tune.search.budget import StopRequest
from gpu_aware_tune.search.candidates import Candidate
from gpu_aware_tune.search.objectives import one_for_all, usable
from gpu_aware_tune.search.pools import Pools
from gpu_aware_tune.search.sources import CandidatePipeline
from gpu_aware_tune.search.stage import SearchResult
from gpu_aware_tune.search.task_set import TaskSet, latency_s
from gpu_aware_tune.settings import RunSettings

_LEAST_PART = 0.002  # tasks below this part of a model's latency are not measured again
_HEAVY = 0.05  # tasks from this part on get all of the time that a comparison may take
_LEAST = 0.2  # the part of that time that any task gets
_STOPPING_S = 10.0  # left to measure the heaviest tasks' kernels again after a wish to stop
_DRIFT_TASKS = 3  # the heaviest tasks of a model, for the drift of the machine


@dataclass(frozen=True)
class Reorder:
    """Whether measuring again made another kernel the best, and what the first pick would cost."""

    changed: bool
    regret: float


def retime(
    work: TaskSet,
    found: SearchResult,
    records: TaskRecords,
    settings: RunSettings,
    pools: Pools,
    time_s: float | None = None,
    stop: StopRequest | None = None,
) -> Generator[Event, None, dict[tuple[str, int], Reorder]]:
    """Measure each task's best schedules again: longer, in turns, with nothing else running.

    The fast measurement of the search, next to builds and to other slices, may rank two close
    schedules the wrong way round; this decides. The baseline schedule takes part, so that before and
    after come from the same measurement.

    Args:
        work: what was searched.
        found: what the search came to.
        records: where the schedules are, and where the new seconds go.
        settings: of the run; `top_k` schedules of each task take part.
        pools: to build and measure with.
        time_s: the time this may take; the heaviest tasks come first. None: all of them.
        stop: once it is requested, before or meanwhile, a few seconds are left.

    Returns:
        What the second look changed, by task hash and units.
    """
    limit = _Limit(time_s, stop or StopRequest())
    parts = _Parts(work, found)
    wanted = {t.hash: _finalists(work, t, records, settings, parts) for t in work.tasks}
    wanted = {task: by_units for task, by_units in wanted.items() if by_units}
    artifacts: dict[str, dict[str, str]] = {}
    if not limit.reached():
        artifacts = _build(pools, wanted)
    reorders = {}
    for task in work.tasks:
        paths = artifacts.get(task.hash, {})
        for units in work.units_of(task.hash):
            traces = [t for t in wanted.get(task.hash, {}).get(units, ()) if t in paths]
            if not traces or limit.reached():
                continue
            files = tuple(paths[trace] for trace in traces)
            comparison = ComparisonJob(files, task.args, task.hash, parts.timing(task.hash, units))
            seconds = {}
            for trace, measurement in zip(
                traces, pools.measurer_of(units).compare(comparison), strict=True
            ):
                if measurement.seconds is not None:
                    seconds[trace] = measurement.seconds
                    records.set_retimed(task.hash, units, trace, measurement.seconds)
            if traces[0] in seconds:
                reorders[task.hash, units] = _reorder(traces[0], seconds)
    for paths in artifacts.values():
        for path in paths.values():
            remove(path)
    pools.best.clear()
    if artifacts:
        count = sum(len(paths) for paths in artifacts.values())
        yield Note(f"measured the best {count} kernels again, in turns, alone")
    return reorders


def measure_drift(
    work: TaskSet, records: TaskRecords, pipeline: CandidatePipeline, measure_s: float
) -> dict[str, dict[str, float]]:
    """Measure the heaviest baseline schedules of each model once more, as the search did.

    Returns:
        Last over first by "task-units", by model: how much slower or faster the machine has become.
    """
    timing = dataclasses.replace(SEARCH, budget_s=measure_s)
    drift = {}
    for model in work.models:
        first: dict[str, dict[int, float]] = {}
        names, candidates = {}, []
        for task in work.tasks_of(model)[:_DRIFT_TASKS]:
            units = work.units_of(task.hash)
            record = records.baseline(task.hash, units[0])
            if record is not None:
                names[task.hash] = task.name
                candidates.append(Candidate(task.hash, record.trace, Origin.BASELINE))
                same = {u: records.baseline(task.hash, u) for u in units}
                first[task.hash] = {
                    u: r.seconds for u, r in same.items()
                    if r is not None and r.trace == record.trace and r.seconds
                }  # fmt: skip
        drift[model] = {
            f"{names[outcome.candidate.task]}-{units}": measurement.seconds / before
            for outcome in pipeline.run(candidates, timing=timing)
            for units, measurement in outcome.measurements.items()
            if measurement.seconds is not None
            and (before := first[outcome.candidate.task].get(units))
        }
    return drift


class _Limit:
    """How long the best are measured again; a wish to stop shortens it."""

    def __init__(self, time_s: float | None, stop: StopRequest) -> None:
        self._until = math.inf if time_s is None else time.monotonic() + time_s
        self._stop = stop
        self._stopping = False

    def reached(self) -> bool:
        """Whether the time is over."""
        now = time.monotonic()
        if self._stop.requested and not self._stopping:
            self._stopping, self._until = True, min(self._until, now + _STOPPING_S)
        return now > self._until


@dataclass(frozen=True)
class _Parts:
    """How much of a model's latency each task's kernels take."""

    work: TaskSet
    found: SearchResult

    def of(self, task: str, units: int) -> float:
        """The part on some units, the largest of all models."""
        best_s = self.found.best_s
        parts = [
            goal.weights[task] * best_s.get((task, units), 0.0)
            / (latency_s(goal.weights, units, best_s) or 1.0)
            for goal in self.work.goals
            if goal.units == units and task in goal.weights
        ]  # fmt: skip
        return max(parts, default=0.0)

    def timing(self, task: str, units: int) -> TimingPolicy:
        """How long to look at a task's kernels: less where a wrong pick costs the model little."""
        part = min(1.0, max(_LEAST, self.of(task, units) / _HEAVY))
        return dataclasses.replace(RETIME, budget_s=part * RETIME.budget_s)


def _finalists(
    work: TaskSet, task: Task, records: TaskRecords, settings: RunSettings, parts: _Parts
) -> dict[int, list[str]]:
    """A task's traces to compare on each of its units, the best so far first.

    None on units where all of them have met before, or where the task is too light to matter.
    """
    finalists: dict[int, list[str]] = {}
    every = {units: records.all(task.hash, units) for units in work.units_of(task.hash)}
    for units, here in every.items():
        if parts.of(task.hash, units) < _LEAST_PART:
            continue
        best = records.best(task.hash, units, settings.top_k)
        baseline = records.baseline(task.hash, units)
        chosen = [*best, *([baseline] if baseline else [])]
        if settings.objective.one_set:
            by_trace = {record.trace: record for record in here}
            ranked = one_for_all(usable(every), settings.objective)
            chosen += [by_trace[trace] for trace, _ in ranked[: settings.top_k]]
        if any(record.retimed is None for record in chosen):
            finalists[units] = list(dict.fromkeys(record.trace for record in chosen))
    return finalists


def _build(
    pools: Pools, wanted: Mapping[str, Mapping[int, Sequence[str]]]
) -> dict[str, dict[str, str]]:
    """The artifact of every finalist, built where the search has not left it.

    Returns:
        Paths by task and trace, without those that did not build.
    """
    artifacts: dict[str, dict[str, str]] = {}
    missing = []
    for task, by_units in wanted.items():
        for trace in dict.fromkeys(t for traces in by_units.values() for t in traces):
            path = pools.best.path_of(task, trace)
            if path is None:
                missing.append((task, trace))
            else:
                artifacts.setdefault(task, {})[trace] = path

    def start(job: tuple[str, str]) -> None:
        task, trace = job
        pools.builders.submit(job, task, trace)

    for (task, trace), built in pools.builders.work_off(missing, start):
        if built.failure is None:
            artifacts.setdefault(task, {})[trace] = built.path
    return artifacts


def _reorder(first: str, seconds: Mapping[str, float]) -> Reorder:
    best = min(seconds.values())
    return Reorder(seconds[first] > best, seconds[first] / best - 1)
