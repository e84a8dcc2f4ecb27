"""What a run searches: its models' tasks, each once, the goals they serve, and what is known of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpu_aware_tune.model.tasks import Task
from gpu_aware_tune.records.task_records import TaskRecords
from gpu_aware_tune.search.allocation import Allocation, Goal
from gpu_aware_tune.settings import RunSettings

_LIGHT_PART = 0.2  # of a model's latency at one batch size: what is not measured again at another


@dataclass(frozen=True)
class TaskSet:
    """The tasks of all models, heaviest first, and each model on each of its shares as a goal."""

    tasks: tuple[Task, ...]
    goals: tuple[Goal, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names, in order."""
        return tuple(dict.fromkeys(goal.model for goal in self.goals))

    def units_of(self, task: str) -> tuple[int, ...]:
        """The units that a task is measured on."""
        return tuple(dict.fromkeys(goal.units for goal in self.goals if task in goal.weights))

    def tasks_of(self, model: str) -> tuple[Task, ...]:
        """A model's tasks, heaviest first."""
        goal = next(goal for goal in self.goals if goal.model == model)
        return tuple(task for task in self.tasks if task.hash in goal.weights)


@dataclass(frozen=True)
class Past:
    """What the records hold of a task.

    Args:
        known: (trace, seconds by units, origin) of schedules with a number on each of its units.
        tried: traces that a search measured, or failed to measure, on each of its units.
    """

    known: tuple[tuple[str, Mapping[int, float], str], ...] = ()
    tried: tuple[str, ...] = ()


@dataclass(frozen=True)
class Known:
    """What the records say before anything is measured.

    Args:
        records: the store, seen through the keys of this run.
        past: of each task, by hash.
        spent: trials that earlier runs spent on each model.
        seeds: traces of each task's counterpart at another batch size, by hash.
        light: tasks whose counterparts take so little time that they keep their baseline schedule.
    """

    records: TaskRecords
    past: Mapping[str, Past] = field(default_factory=dict)
    spent: Mapping[str, int] = field(default_factory=dict)
    seeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    light: frozenset[str] = frozenset()


def recall(work: TaskSet, records: TaskRecords, resume: bool) -> Known:
    """Read what the records hold of a workload; with `resume` unset, as if they held nothing."""
    past = {t.hash: _past(t.hash, work, records) if resume else Past() for t in work.tasks}
    spent: Counter[str] = Counter()
    for goal_model in work.models:
        spent[goal_model] = sum(len(past[t.hash].tried) for t in work.tasks_of(goal_model))
    return Known(records, past, spent)


def with_relatives(known: Known, work: TaskSet, relatives: Mapping[str, str]) -> Known:
    """Add what the records hold of the same model at another batch size.

    Args:
        known: what they hold of the model itself.
        work: one model.
        relatives: hashes of its kernels at the other batch size, by name.
    """
    seeds: dict[str, dict[str, None]] = {}
    heavy: set[str] = set()
    for goal in work.goals if relatives else ():
        spent_s = {}
        for task in work.tasks:
            hash_ = relatives.get(task.name)
            found = known.records.relative(task.hash, goal.units, hash_) if hash_ else []
            if found:
                seeds.setdefault(task.hash, {})[found[0].trace] = None
                spent_s[task.hash] = goal.weights[task.hash] * (found[0].best_s or 0.0)
        heavy |= {task.hash for task in work.tasks} - _lightest(spent_s)
    light = frozenset(seeds) - heavy
    traces = {task: tuple(trace for trace in found if trace) for task, found in seeds.items()}
    return dataclasses.replace(known, seeds=traces, light=light)


def _lightest(spent_s: Mapping[str, float]) -> set[str]:
    """The tasks that together take less than `_LIGHT_PART` of the time."""
    left = _LIGHT_PART * sum(spent_s.values())
    light = set()
    for task in sorted(spent_s, key=lambda task: spent_s[task]):
        left -= spent_s[task]
        if left < 0:
            break
        light.add(task)
    return light


def allocation_of(work: TaskSet, known: Known, settings: RunSettings) -> Allocation:
    """An allocation that has taken in what is known; it counts as trials already spent."""
    allocation = Allocation(
        work.tasks, work.goals, settings.trials_per_iteration, settings.max_trials_per_task
    )
    for task in work.tasks:
        past = known.past[task.hash]
        for _, seconds, origin in past.known:
            for units, value in seconds.items():
                allocation.note(task.hash, units, value, origin)
        allocation.resume(task.hash, len(past.tried))
        if task.hash in known.light:
            allocation.exhaust(task.hash)
    return allocation


def _past(task: str, work: TaskSet, records: TaskRecords) -> Past:
    units = work.units_of(task)
    found: dict[str, dict[int, float]] = {}
    origins: dict[str, str] = {}
    tried: list[set[str]] = []
    for count in units:
        of_units = records.all(task, count)
        tried.append({r.trace for r in of_units if r.origin == "search"})
        for record in of_units:
            if record.usable and record.best_s is not None:
                found.setdefault(record.trace, {})[count] = record.best_s
                origins[record.trace] = record.origin
    known = [(t, s, origins[t]) for t, s in found.items() if len(s) == len(units)]
    return Past(tuple(known), tuple(sorted(set.intersection(*tried))) if tried else ())


def latency_s(
    weights: Mapping[str, int], units: int, best_s: Mapping[tuple[str, int], float]
) -> float:
    """A model's latency on some units: the sum of weight x best kernel over the measured tasks."""
    return sum(weight * best_s.get((task, units), 0.0) for task, weight in weights.items())


def heaviest_first(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Tasks of all models, each once, by the work that one inference gives it."""
    unique = {task.hash: task for task in reversed(tasks)}
    return tuple(sorted(unique.values(), key=lambda task: -task.flops * task.weight))
