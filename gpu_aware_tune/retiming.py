"""The best kernels measured again: longer, and with nothing else running."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from gpu_aware_tune.candidates import Candidate
from gpu_aware_tune.events import Event, Note
from gpu_aware_tune.measure import RETIME
from gpu_aware_tune.objectives import ONE_SET, one_for_all
from gpu_aware_tune.records import Record
from gpu_aware_tune.search import Search
from gpu_aware_tune.selection import usable
from gpu_aware_tune.tasks import Task

_WORTH = 0.002  # tasks below this part of a model's latency are not measured again


@dataclass(frozen=True)
class Reorder:
    """Whether measuring again made another kernel the best, and what the first pick would cost."""

    changed: bool
    regret: float


def retime(search: Search, top_k: int) -> Generator[Event, None, dict[tuple[str, int], Reorder]]:
    """Measure each task's `top_k` schedules again, longer and with nothing else running.

    The fast measurement of the search, next to builds and to other slices, may rank two close
    schedules the wrong way round; this decides.

    Returns:
        What the second look changed, by task hash and units.
    """
    candidates: list[Candidate] = []
    before: dict[tuple[str, int], str] = {}  # the best by the first measurement
    for task in search.tasks:
        units = [u for u in search.allocation.units_of(task.hash) if _worth(search, task, u)]
        wanted: dict[str, Record] = {}
        for count in units:
            key = search.keys[task.hash, count]
            best = search.store.best(key, top_k)
            # With the untuned one, so that before and after are told by the same measurement.
            untuned = search.store.untuned(key)
            wanted |= {r.trace: r for r in (*best, *([untuned] if untuned else []))}
            if best:
                before[task.hash, count] = best[0].trace
        if len(units) > 1 and search.settings.objective in ONE_SET:
            wanted |= dict(_best_for_all(search, task, units)[:top_k])
        fresh = {trace: record for trace, record in wanted.items() if record.retimed is None}
        candidates.extend(Candidate(task.hash, t, r.origin) for t, r in fresh.items())
    again: dict[tuple[str, int], dict[str, float]] = {}
    for outcome in search.pipeline.run(candidates, effort=RETIME, alone=True):
        for count, measurement in outcome.measurements.items():
            if measurement.seconds is not None:
                place = outcome.candidate.task, count
                again.setdefault(place, {})[outcome.candidate.trace] = measurement.seconds
                key = search.keys[place]
                search.store.set_retimed(key, outcome.candidate.trace, measurement.seconds)
    if candidates:
        yield Note(f"measured the best {len(candidates)} kernels again, alone")
    return {
        place: Reorder(before[place] != min(seconds, key=lambda t: seconds[t]),
                       seconds[before[place]] / min(seconds.values()) - 1)
        for place, seconds in again.items()
        if before.get(place) in seconds
    }  # fmt: skip


def _worth(search: Search, task: Task, units: int) -> bool:
    """Whether a task is a part of some model's latency that one can notice."""
    best_s = search.allocation.best_s(task.hash).get(units, 0.0)
    for goal in search.goals:
        if goal.units == units and task.hash in goal.weights:
            latency_s = search.allocation.latency_s(goal.model)[units]
            if goal.weights[task.hash] * best_s > _WORTH * latency_s:
                return True
    return False


def _best_for_all(search: Search, task: Task, units: Sequence[int]) -> list[tuple[str, Record]]:
    """Kernels that serve every share, best first."""
    records = {u: search.store.all(search.keys[task.hash, u]) for u in units}
    known = usable(records)
    first = {record.trace: record for record in records[units[0]]}
    ranked = one_for_all(known, search.settings.objective)
    return [(trace, first[trace]) for trace, _ in ranked]
