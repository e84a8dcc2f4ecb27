"""The search stage: default schedules first, then drafts where they pay, each result kept at once."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_aware_tune.allocation import Allocation
from gpu_aware_tune.budget import Budget
from gpu_aware_tune.candidates import Candidate, NewTask
from gpu_aware_tune.events import Event, Note, Progress, Trial
from gpu_aware_tune.measure import SEARCH, Effort
from gpu_aware_tune.partition import usable_cores
from gpu_aware_tune.pipeline import Demand, Outcome, Pipeline
from gpu_aware_tune.records import Record, RecordKey, Store
from gpu_aware_tune.settings import Settings
from gpu_aware_tune.tasks import Task

_PROGRESS_S = 0.5
_FLUSH_S = 0.8  # a finished trial is on disk within a second
_KNOWN = 64  # measured schedules that a search starts from
_DRIFT_TASKS = 3  # the heaviest tasks, for the drift of the machine
_SEEDS = 4  # schedules of other units or devices that are tried first


@dataclass
class Search:
    """One run's search over all tasks.

    Args:
        settings: of the run.
        tasks: heaviest first.
        units: the units of each share.
        keys: (task hash, units) -> the key of its records.
        store: where records go.
        backend: the partition backend, kept with each record.
        budget: when to stop.
    """

    settings: Settings
    tasks: Sequence[Task]
    units: Sequence[int]
    keys: Mapping[tuple[str, int], RecordKey]
    store: Store
    backend: str
    budget: Budget
    allocation: Allocation = field(init=False)
    _effort: Effort = field(init=False)
    failures: Counter[str] = field(default_factory=Counter, init=False)
    interrupted: bool = field(default=False, init=False)
    _pipeline: Pipeline | None = field(default=None, init=False)
    _run_id: int = field(default=0, init=False)
    _defaults: Mapping[str, Sequence[str]] = field(default_factory=dict, init=False)
    _names: dict[str, str] = field(init=False)
    _notes: list[Note] = field(default_factory=list, init=False)
    _unsaved: list[Record] = field(default_factory=list, init=False)
    _saved_at: float = field(default=0.0, init=False)
    _told_at: float = field(default=0.0, init=False)
    _resumed: int = field(default=0, init=False)
    _search_from_s: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._names = {task.hash: task.name for task in self.tasks}
        self._effort = dataclasses.replace(SEARCH, budget_s=self.settings.measure_s)
        self.allocation = Allocation(
            self.tasks,
            self.units,
            self.settings.trials_per_iteration,
            self.settings.max_trials_per_task,
        )

    def recall(self) -> None:
        """Take in what the records hold for these units; it counts as trials already spent."""
        for task in self.tasks:
            known = self._known(task) if self.settings.resume else []
            searched = len(self._tried(task)) if self.settings.resume else 0
            for _, seconds, origin in known:
                for units, value in seconds.items():
                    self.allocation.note(task.hash, units, value, origin)
            self.allocation.resume(task.hash, searched)
            self._resumed += searched
        if self.budget.trials is not None:
            self.budget.done = min(self._resumed, self.budget.trials)
        self._resumed = self.budget.done

    def start(self, pipeline: Pipeline, run_id: int, defaults: Mapping[str, Sequence[str]]) -> None:
        """Take the workers, and give every task with its best known schedules to its searcher.

        Args:
            pipeline: the workers.
            run_id: the run's row.
            defaults: traces of each task's default schedules; "" stands for the plain loops.
        """
        from gpu_aware_tune.traces import module_to_json

        self._pipeline, self._run_id, self._defaults = pipeline, run_id, defaults
        self.budget.start()
        for task in self.tasks:
            known = self._known(task) if self.settings.resume else []
            scored = sorted(
                (self._objective(task.hash, s), trace) for trace, s, _ in known if trace
            )
            pairs = tuple((trace, score) for score, trace in scored[:_KNOWN])
            pipeline.searcher_of(task.hash).add(
                NewTask(
                    task.hash,
                    module_to_json(task.module),
                    pairs,
                    (*defaults[task.hash], *(self._tried(task) if self.settings.resume else ())),
                )
            )

    @property
    def pipeline(self) -> Pipeline:
        """The workers; only after `start`."""
        assert self._pipeline is not None
        return self._pipeline

    @property
    def stopped_by(self) -> str:
        """Why the search ended."""
        if self.interrupted:
            return "interrupt"
        return self.budget.stopped_by() or "space"

    def drift(self) -> dict[str, float]:
        """Measure the heaviest tasks' untuned schedules once more: last over first, by task and units."""
        first = {}
        candidates = []
        for task in self.tasks[:_DRIFT_TASKS]:
            trace = self.untuned_trace(task, self.units[0])
            if trace is not None:
                candidates.append(Candidate(task.hash, trace, "default"))
                first[task.hash] = dict(self.allocation.untuned_s(task.hash))
        found = {}
        for outcome in self.pipeline.run(candidates, effort=self._effort):
            task_hash = outcome.candidate.task
            for units, measurement in outcome.measurements.items():
                before = first[task_hash].get(units)
                if measurement.seconds is not None and before:
                    found[f"{self._names[task_hash]}-{units}"] = measurement.seconds / before
        return found

    def _untuned(self, task: Task, units: int) -> Record | None:
        ran = [r for r in self.store.all(self.keys[task.hash, units]) if is_untuned(r)]
        return min(ran, key=lambda r: r.best_s or 0.0, default=None)

    def untuned_trace(self, task: Task, units: int) -> str | None:
        """The fastest default schedule of a task, "" for the plain loops; None where none ran."""
        record = self._untuned(task, units)
        return record.trace if record else None

    def untuned_s(self, task: Task, units: int) -> float | None:
        """Seconds of a task's fastest default schedule; None where none ran."""
        record = self._untuned(task, units)
        return record.best_s if record else None

    def untuned_traces(self, units: int) -> dict[str, str]:
        """The untuned library's kernels: each task's fastest default schedule."""
        pairs = ((task.hash, self.untuned_trace(task, units)) for task in self.tasks)
        return {task: trace for task, trace in pairs if trace}

    def baseline(self) -> Iterator[Event]:
        """Measure the default schedules that no record holds yet, and seeds from other units."""
        candidates = []
        for task in self.tasks:
            known = {trace for trace, _, _ in self._known(task)} if self.settings.resume else set()
            for trace in self._defaults[task.hash]:
                if trace not in known:
                    candidates.append(Candidate(task.hash, trace, "default"))
            candidates.extend(self._seeds(task, known))
        demand = Demand(stop=lambda: self.interrupted)
        for outcome in self.pipeline.run(candidates, demand, self._effort):
            yield from self._keep(outcome)
        yield from self._flush(force=True)
        yield self.progress()

    def trials(self) -> Iterator[Event]:
        """Spend the budget."""
        self._search_from_s = self.budget.elapsed_s()
        demand = Demand(
            next_task=lambda: self.allocation.next(self.budget.left()),
            accept=self._accept,
            exhausted=self.allocation.exhaust,
            lost=self._lost,
            best_s=self.allocation.best_s,
            stop=lambda: self.interrupted or self.budget.stopped_by() is not None,
        )
        for outcome in self.pipeline.run((), demand, self._effort):
            yield from self._keep(outcome)
        yield from self._flush(force=True)
        yield self.progress()

    def progress(self) -> Progress:
        """Where the run stands."""
        elapsed = self.budget.elapsed_s()
        done = self.budget.done - self._resumed
        searched_s = elapsed - self._search_from_s if self._search_from_s is not None else 0.0
        return Progress(
            elapsed_s=elapsed,
            trials_done=self.budget.done,
            trials_total=self.budget.trials or 0,
            trials_per_min=60 * done / searched_s if searched_s > 0 else 0.0,
            untuned_s=self.allocation.latency_s(untuned=True),
            best_s=self.allocation.latency_s(),
            failures=dict(self.failures),
            eta_s=self.budget.eta_s(self._resumed, self._search_from_s or 0.0),
            builds_in_flight=self._pipeline.builds_in_flight if self._pipeline else 0,
            waiting_to_measure=self._pipeline.waiting_to_measure if self._pipeline else 0,
        )

    def _lost(self, task: str, text: str) -> None:
        """The search died on a task: leave the task, and say so with the next event."""
        self.allocation.exhaust(task)
        self._notes.append(Note(f"search of {self._names[task]} ended: {text}", "warning"))

    def _accept(self, task: str, count: int) -> int:
        return self.allocation.start(
            task, min(count, self.budget.left() - self.allocation.in_flight())
        )

    def _keep(self, outcome: Outcome) -> Iterator[Event]:
        """Record one outcome and pass it on to the allocation, the search and the caller."""
        candidate = outcome.candidate
        seconds = {units: m.seconds for units, m in outcome.measurements.items()}
        for units, measurement in outcome.measurements.items():
            self._unsaved.append(self._record(candidate, units, measurement))
            if measurement.seconds is not None:
                self.allocation.note(candidate.task, units, measurement.seconds, candidate.origin)
        if outcome.failure is not None:
            self.failures[outcome.failure] += 1
        if candidate.origin == "search":
            self.allocation.finish(candidate.task)
            self.budget.spend(statistics.fmean(self.allocation.latency_s().values()))
            whole = {u: s for u, s in seconds.items() if s is not None}
            score = self._objective(candidate.task, whole) if len(whole) == len(seconds) else None
            self.pipeline.searcher_of(candidate.task).tell(candidate, score)
        yield Trial(self._names[candidate.task], candidate.origin, seconds, outcome.failure)
        yield from self._flush()

    def _objective(self, task: str, seconds: Mapping[int, float]) -> float:
        """What the search minimises: the mean over the shares of latency relative to the best there.

        Scaled by the best latency, so that with one share it is simply the seconds.
        """
        best = self.allocation.best_s(task)
        ratios = [value / best.get(units, value) for units, value in seconds.items()]
        scale = best.get(self.units[0], seconds.get(self.units[0], 1.0))
        return statistics.fmean(ratios) * scale if ratios else float("inf")

    def _record(self, candidate: Candidate, units: int, measurement: Any) -> Record:
        failure = measurement.failure
        return Record(
            key=self.keys[candidate.task, units],
            trace=candidate.trace,
            seconds=measurement.seconds,
            failure=failure.kind if failure else None,
            failure_text=failure.text if failure else None,
            origin=candidate.origin,
            spread=measurement.spread if measurement.seconds is not None else None,
            repeats=measurement.repeats or None,
            run_id=self._run_id,
            created=time.time(),
            partition=self.backend,
            flags="coarse" if measurement.coarse else "",
        )

    def _flush(self, force: bool = False) -> Iterator[Event]:
        now = time.monotonic()
        yield from self._notes
        self._notes.clear()
        if self._unsaved and (force or now - self._saved_at > _FLUSH_S):
            self.store.add(self._unsaved)
            self._unsaved = []
            self._saved_at = now
        if force or now - self._told_at > _PROGRESS_S:
            self._told_at = now
            yield self.progress()

    def _known(self, task: Task) -> list[tuple[str, dict[int, float], str]]:
        """Schedules that have a number on every one of this run's units: (trace, seconds, origin)."""
        found: dict[str, dict[int, float]] = {}
        origins: dict[str, str] = {}
        for units in self.units:
            for record in self.store.all(self.keys[task.hash, units]):
                if record.seconds is not None and not record.wrong:
                    found.setdefault(record.trace, {})[units] = record.retimed or record.seconds
                    origins[record.trace] = record.origin
        whole = {t: s for t, s in found.items() if len(s) == len(self.units)}
        return [(trace, seconds, origins[trace]) for trace, seconds in whole.items()]

    def _tried(self, task: Task) -> list[str]:
        """Schedules that a search measured or failed to measure on every one of this run's units."""
        per_units = [
            {r.trace for r in self.store.all(self.keys[task.hash, units]) if r.origin == "search"}
            for units in self.units
        ]
        return sorted(set.intersection(*per_units))

    def _seeds(self, task: Task, known: set[str]) -> list[Candidate]:
        """The best schedules that other units or devices of the same kind have for this task."""
        if not self.settings.resume:
            return []
        traces: dict[str, None] = {}
        for units in self.units:
            for record in self.store.seeds(self.keys[task.hash, units], _SEEDS):
                if record.origin != "default" and record.trace not in known:
                    traces[record.trace] = None
        return [Candidate(task.hash, trace, "seed") for trace in list(traces)[:_SEEDS]]


def is_untuned(record: Record) -> bool:
    """Whether a record is a default schedule that ran and is right."""
    return record.origin == "default" and record.best_s is not None and not record.wrong


def worker_counts(cores: int) -> tuple[int, int]:
    """How many searchers and builders to start: every core can build, a quarter can search."""
    return max(1, cores // 4), max(1, cores)


def available_cores() -> int:
    """The cores this process may run on: its affinity and its group's quota."""
    return len(usable_cores())
