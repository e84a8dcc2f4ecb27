"""The best kernels measured again: longer, in turns, and with nothing else running."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from gpu_aware_tune.codegen.build_pool import BuildPool, remove
from gpu_aware_tune.events import Event, Note
from gpu_aware_tune.measure import RETIME, Contest, Effort
from gpu_aware_tune.model.tasks import Task
from gpu_aware_tune.records.store import Record
from gpu_aware_tune.search.objectives import ONE_SET, one_for_all, usable
from gpu_aware_tune.search.pools import Pools
from gpu_aware_tune.search.stage import Search

_WORTH = 0.002  # tasks below this part of a model's latency are not measured again
_HEAVY = 0.05  # tasks from this part on get all of the time that a comparison may take
_LEAST = 0.2  # the part of that time that any task gets


@dataclass(frozen=True)
class Reorder:
    """Whether measuring again made another kernel the best, and what the first pick would cost."""

    changed: bool
    regret: float


def retime(
    search: Search, pools: Pools, top_k: int
) -> Generator[Event, None, dict[tuple[str, int], Reorder]]:
    """Measure each task's `top_k` schedules again: longer, in turns, with nothing else running.

    The fast measurement of the search, next to builds and to other slices, may rank two close
    schedules the wrong way round; this decides. The untuned schedule takes part, so that before and
    after are told by the same measurement.

    Returns:
        What the second look changed, by task hash and units.
    """
    wanted = {task.hash: _finalists(search, task, top_k) for task in search.tasks}
    artifacts = _build(pools.builders, {task: traces for task, traces in wanted.items() if traces})
    reorders = {}
    for task in search.tasks:
        paths = artifacts.get(task.hash, {})
        for units in search.allocation.units_of(task.hash):
            traces = [trace for trace in wanted[task.hash].get(units, ()) if trace in paths]
            if not traces:
                continue
            files = tuple(paths[trace] for trace in traces)
            contest = Contest(files, task.args, task.hash, _effort(search, task, units))
            seconds = {}
            for trace, measurement in zip(
                traces, pools.measurer_of(units).compare(contest), strict=True
            ):
                if measurement.seconds is not None:
                    seconds[trace] = measurement.seconds
                    key = search.keys[task.hash, units]
                    search.store.set_retimed(key, trace, measurement.seconds)
            if traces[0] in seconds:
                reorders[task.hash, units] = _reorder(traces[0], seconds)
    for paths in artifacts.values():
        for path in paths.values():
            remove(path)
    if artifacts:
        count = sum(len(paths) for paths in artifacts.values())
        yield Note(f"measured the best {count} kernels again, in turns, alone")
    return reorders


def _finalists(search: Search, task: Task, top_k: int) -> dict[int, list[str]]:
    """A task's traces to compare on each of its units, the best so far first.

    None on units where all of them have met before, or where the task is too light to matter.
    """
    finalists: dict[int, list[str]] = {}
    for units in search.allocation.units_of(task.hash):
        if _part(search, task, units) < _WORTH:
            continue
        key = search.keys[task.hash, units]
        untuned = search.store.untuned(key)
        records = [*search.store.best(key, top_k), *([untuned] if untuned else [])]
        if search.settings.objective in ONE_SET:
            records += _best_for_all(search, task, units)[:top_k]
        if any(record.retimed is None for record in records):
            finalists[units] = list(dict.fromkeys(record.trace for record in records))
    return finalists


def _build(
    builders: BuildPool, wanted: Mapping[str, Mapping[int, Sequence[str]]]
) -> dict[str, dict[str, str]]:
    """Build every finalist once; paths by task and trace, without those that did not build."""
    jobs = [
        (task, trace)
        for task, by_units in wanted.items()
        for trace in dict.fromkeys(t for traces in by_units.values() for t in traces)
    ]

    def start(job: tuple[str, str]) -> None:
        task, trace = job
        builders.submit(job, task, trace or None)

    artifacts: dict[str, dict[str, str]] = {}
    for (task, trace), built in builders.work_off(jobs, start):
        if built.failure is None:
            artifacts.setdefault(task, {})[trace] = built.path
    return artifacts


def _reorder(first: str, seconds: Mapping[str, float]) -> Reorder:
    best = min(seconds.values())
    return Reorder(seconds[first] > best, seconds[first] / best - 1)


def _effort(search: Search, task: Task, units: int) -> Effort:
    """How long to look at a task's kernels: less where a wrong pick costs the model little."""
    part = min(1.0, max(_LEAST, _part(search, task, units) / _HEAVY))
    return dataclasses.replace(RETIME, budget_s=part * RETIME.budget_s)


def _part(search: Search, task: Task, units: int) -> float:
    """The part of a model's latency that a task's kernels take, the largest of all models."""
    best_s = search.allocation.best_s(task.hash).get(units, 0.0)
    parts = [
        goal.weights[task.hash] * best_s / (search.allocation.latency_s(goal.model)[units] or 1.0)
        for goal in search.goals
        if goal.units == units and task.hash in goal.weights
    ]
    return max(parts, default=0.0)


def _best_for_all(search: Search, task: Task, units: int) -> list[Record]:
    """Kernels that serve every share of a task, best first, as records on some units."""
    records = {
        count: search.store.all(search.keys[task.hash, count])
        for count in search.allocation.units_of(task.hash)
    }
    here = {record.trace: record for record in records[units]}
    ranked = one_for_all(usable(records), search.settings.objective)
    return [here[trace] for trace, _ in ranked]
