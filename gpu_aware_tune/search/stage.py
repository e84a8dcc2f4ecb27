"""The search stage: default schedules first, then drafts where they pay, each result kept at once."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gpu_aware_tune.events import Event, Note, Progress, Trial
from gpu_aware_tune.measure import SEARCH, Effort
from gpu_aware_tune.measure.measurement import Measurement
from gpu_aware_tune.model.tasks import Task
from gpu_aware_tune.records.rows import UNFIT
from gpu_aware_tune.records.store import Record, RecordKey, Store
from gpu_aware_tune.search.allocation import Allocation, Goal
from gpu_aware_tune.search.budget import Budget
from gpu_aware_tune.search.candidates import Candidate, NewTask
from gpu_aware_tune.search.objectives import combined
from gpu_aware_tune.search.pipeline import Demand, Outcome
from gpu_aware_tune.settings import Settings

_PROGRESS_S = 0.5
_FLUSH_S = 0.8  # a finished trial is on disk within a second
_KNOWN = 64  # measured schedules that a search starts from
_DRIFT_TASKS = 3  # the heaviest tasks of a model, for the drift of the machine
_SEEDS = 4  # schedules of other units or devices that are tried first


class Workers(Protocol):
    """What a search needs of a pipeline: one machine's, or that of a cluster."""

    def add_task(self, task: NewTask) -> None:
        """Make a task known to the search."""

    def tell(self, candidate: Candidate, seconds: float | None) -> None:
        """Let the search learn what a candidate came to."""

    def run(
        self,
        candidates: Iterable[Candidate],
        demand: Demand | None = None,
        effort: Effort = SEARCH,
        alone: bool = False,
    ) -> Iterator[Outcome]:
        """Give an outcome for each candidate, the given ones first and then the drafted ones."""

    def core_seconds(self) -> dict[str, float]:
        """What the workers have used so far."""

    @property
    def cores(self) -> int:
        """How many cores they use."""

    @property
    def builds_in_flight(self) -> int:
        """Builds under way."""

    @property
    def waiting_to_measure(self) -> int:
        """Artifacts that wait for a measuring worker."""

    @property
    def slices(self) -> Sequence[tuple[str, str | None]]:
        """Each slice's name and the task that it measures now, if any."""


@dataclass(frozen=True)
class _Past:
    """What the records hold of a task: schedules with a number on each of its units, and tries."""

    known: Sequence[tuple[str, Mapping[int, float], str]]  # trace, seconds by units, origin
    tried: Sequence[str]  # traces that a search measured or failed to measure on each of its units


@dataclass
class Search:
    """One run's search over all tasks of all models; a task that several models have is searched once.

    Args:
        settings: of the run.
        tasks: each once, heaviest first.
        goals: each model on each of its shares.
        keys: (task hash, units) -> the key of its records.
        store: where records go.
        backend: the partition backend, kept with each record.
        budgets: when to stop, by model.
    """

    settings: Settings
    tasks: Sequence[Task]
    goals: Sequence[Goal]
    keys: Mapping[tuple[str, int], RecordKey]
    store: Store
    backend: str
    budgets: Mapping[str, Budget]
    allocation: Allocation = field(init=False)
    failures: Counter[str] = field(default_factory=Counter, init=False)
    interrupted: bool = field(default=False, init=False)
    _effort: Effort = field(init=False)
    _past: dict[str, _Past] = field(default_factory=dict, init=False)
    _pipeline: Workers | None = field(default=None, init=False)
    _run_ids: Mapping[str, int] = field(default_factory=dict, init=False)
    _defaults: Mapping[str, Sequence[str]] = field(default_factory=dict, init=False)
    _names: dict[str, str] = field(init=False)
    _notes: list[Note] = field(default_factory=list, init=False)
    _unsaved: list[Record] = field(default_factory=list, init=False)
    _saved_at: float = field(default=0.0, init=False)
    _told_at: float = field(default=0.0, init=False)
    _resumed: dict[str, int] = field(default_factory=dict, init=False)
    _search_from_s: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._names = {task.hash: task.name for task in self.tasks}
        self._effort = dataclasses.replace(SEARCH, budget_s=self.settings.measure_s)
        self.allocation = Allocation(
            self.tasks,
            self.goals,
            self.settings.trials_per_iteration,
            self.settings.max_trials_per_task,
        )

    def recall(self) -> None:
        """Take in what the records hold for these units; it counts as trials already spent."""
        spent: Counter[str] = Counter()
        for task in self.tasks:
            past = self._past[task.hash] = self._recalled(task)
            for _, seconds, origin in past.known:
                for units, value in seconds.items():
                    self.allocation.note(task.hash, units, value, origin)
            self.allocation.resume(task.hash, len(past.tried))
            spent.update(dict.fromkeys(self.allocation.models_of(task.hash), len(past.tried)))
        for model, budget in self.budgets.items():
            limit = spent[model] if budget.trials is None else budget.trials
            budget.done = self._resumed[model] = min(spent[model], limit)

    def start(
        self,
        pipeline: Workers,
        run_ids: Mapping[str, int],
        defaults: Mapping[str, Sequence[str]],
    ) -> None:
        """Take the workers, and give every task with its best known schedules to its searcher.

        Args:
            pipeline: the workers.
            run_ids: each model's run row.
            defaults: traces of each task's default schedules; "" stands for the plain loops.
        """
        from gpu_aware_tune.kernels.traces import module_to_json

        self._pipeline, self._run_ids, self._defaults = pipeline, run_ids, defaults
        for budget in self.budgets.values():
            budget.start()
        for task in self.tasks:
            past = self._past[task.hash]
            scored = sorted(
                (self._objective(task.hash, s), trace) for trace, s, _ in past.known if trace
            )
            pairs = tuple((trace, score) for score, trace in scored[:_KNOWN])
            tried = (*defaults[task.hash], *past.tried)
            pipeline.add_task(NewTask(task.hash, module_to_json(task.module), pairs, tried))

    @property
    def pipeline(self) -> Workers:
        """The workers; only after `start`."""
        assert self._pipeline is not None
        return self._pipeline

    def stopped_by(self, model: str) -> str:
        """Why the search of a model ended."""
        if self.interrupted:
            return "interrupt"
        return self.budgets[model].stopped_by() or "space"

    def drift(self, model: str) -> dict[str, float]:
        """Measure a model's heaviest untuned schedules once more: last over first, by task and units."""
        first = {}
        candidates = []
        tasks = [task for task in self.tasks if model in self.allocation.models_of(task.hash)]
        for task in tasks[:_DRIFT_TASKS]:
            trace = self.untuned_trace(task, self.allocation.units_of(task.hash)[0])
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

    def untuned_trace(self, task: Task, units: int) -> str | None:
        """The fastest default schedule of a task, "" for the plain loops; None where none ran."""
        record = self.store.untuned(self.keys[task.hash, units])
        return record.trace if record else None

    def untuned_s(self, task: Task, units: int) -> float | None:
        """Seconds of a task's fastest default schedule; None where none ran."""
        record = self.store.untuned(self.keys[task.hash, units])
        return record.best_s if record else None

    def untuned_traces(self, tasks: Sequence[Task], units: int) -> dict[str, str]:
        """The kernels of an untuned library: each task's fastest default schedule."""
        pairs = ((task.hash, self.untuned_trace(task, units)) for task in tasks)
        return {task: trace for task, trace in pairs if trace}

    def baseline(self) -> Iterator[Event]:
        """Measure the default schedules that no record holds yet, and seeds from other units."""
        candidates = []
        for task in self.tasks:
            known = {trace for trace, _, _ in self._past[task.hash].known}
            for trace in self._defaults[task.hash]:
                if trace not in known:
                    candidates.append(Candidate(task.hash, trace, "default"))
            candidates.extend(self._seeds(task, known))
        demand = Demand(stop=lambda: self.interrupted, note=self._warn)
        yield from self._run(candidates, demand)

    def trials(self) -> Iterator[Event]:
        """Spend the budgets."""
        self._search_from_s = next(iter(self.budgets.values())).elapsed_s()
        demand = Demand(
            next_task=lambda busy: self.allocation.next(self._left(), busy),
            accept=self._accept,
            exhausted=self.allocation.exhaust,
            lost=self._lost,
            note=self._warn,
            best_s=self.allocation.best_s,
            stop=lambda: self.interrupted or not self._left(),
        )
        yield from self._run((), demand)

    def progress(self, model: str) -> Progress:
        """Where the run of a model stands."""
        budget, resumed = self.budgets[model], self._resumed[model]
        elapsed = budget.elapsed_s()
        searched_s = elapsed - self._search_from_s if self._search_from_s is not None else 0.0
        pipeline = self._pipeline
        slices = pipeline.slices if pipeline else ()
        return Progress(
            model=model,
            elapsed_s=elapsed,
            trials_done=budget.done,
            trials_total=budget.trials or 0,
            trials_per_min=60 * (budget.done - resumed) / searched_s if searched_s > 0 else 0.0,
            untuned_s=self.allocation.latency_s(model, untuned=True),
            best_s=self.allocation.latency_s(model),
            failures=dict(self.failures),
            eta_s=budget.eta_s(resumed, self._search_from_s or 0.0),
            builds_in_flight=pipeline.builds_in_flight if pipeline else 0,
            waiting_to_measure=pipeline.waiting_to_measure if pipeline else 0,
            slices=tuple((name, self._names.get(task or "")) for name, task in slices),
        )

    def _run(self, candidates: Sequence[Candidate], demand: Demand) -> Iterator[Event]:
        alone = self.settings.exclusive
        for outcome in self.pipeline.run(candidates, demand, self._effort, alone=alone):
            yield from self._keep(outcome)
        yield from self._flush(force=True)

    def _left(self) -> dict[str, int]:
        """Trials left by model, of those whose search has not ended."""
        return {
            model: budget.left()
            for model, budget in self.budgets.items()
            if budget.stopped_by() is None
        }

    def _lost(self, task: str, text: str) -> None:
        """The search died on a task: leave the task, and say so with the next event."""
        self.allocation.exhaust(task)
        self._warn(f"search of {self._names[task]} ended: {text}")

    def _warn(self, text: str) -> None:
        self._notes.append(Note(text, "warning"))

    def _accept(self, task: str, drafted: Sequence[Candidate]) -> Sequence[Candidate]:
        left = self._left()
        models = [model for model in self.allocation.models_of(task) if model in left]
        most = max((left[m] - self.allocation.in_flight(m) for m in models), default=0)
        return drafted[: self.allocation.start(task, min(len(drafted), most))]

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
            for model in self.allocation.models_of(candidate.task):
                latency_s = statistics.fmean(self.allocation.latency_s(model).values())
                self.budgets[model].spend(latency_s)
            whole = {u: s for u, s in seconds.items() if s is not None}
            score = self._objective(candidate.task, whole) if len(whole) == len(seconds) else None
            self.pipeline.tell(candidate, score)
        yield Trial(self._names[candidate.task], candidate.origin, seconds, outcome.failure)
        yield from self._flush()

    def _objective(self, task: str, seconds: Mapping[int, float]) -> float:
        """What the search minimises: latency relative to the best there, over the units (`combined`).

        Scaled by the best latency, so that with one share it is simply the seconds.
        """
        best = self.allocation.best_s(task)
        ratios = [value / best.get(units, value) for units, value in seconds.items()]
        first = self.allocation.units_of(task)[0]
        scale = best.get(first, seconds.get(first, 1.0))
        return combined(ratios, self.settings.objective) * scale if ratios else float("inf")

    def _record(self, candidate: Candidate, units: int, measurement: Measurement) -> Record:
        failure = measurement.failure
        coarse = ("coarse",) if measurement.coarse else ()
        return Record(
            key=self.keys[candidate.task, units],
            trace=candidate.trace,
            seconds=measurement.seconds,
            failure=failure.kind if failure else None,
            failure_text=failure.text if failure else None,
            origin=candidate.origin,
            spread=measurement.spread if measurement.seconds is not None else None,
            repeats=measurement.repeats or None,
            run_id=self._run_ids.get(self.allocation.models_of(candidate.task)[0]),
            created=time.time(),
            partition=self.backend,
            flags=",".join((*coarse, *measurement.flags, *measurement.how)),
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
            for model in self.budgets:
                yield self.progress(model)

    def _recalled(self, task: Task) -> _Past:
        if not self.settings.resume:
            return _Past((), ())
        units = self.allocation.units_of(task.hash)
        found: dict[str, dict[int, float]] = {}
        origins: dict[str, str] = {}
        tried = []
        for count in units:
            every = self.store.all(self.keys[task.hash, count])
            records = [record for record in every if record.failure != UNFIT]
            tried.append({r.trace for r in records if r.origin == "search"})
            for record in records:
                if record.usable and record.best_s is not None:
                    found.setdefault(record.trace, {})[count] = record.best_s
                    origins[record.trace] = record.origin
        known = [(t, s, origins[t]) for t, s in found.items() if len(s) == len(units)]
        return _Past(known, sorted(set.intersection(*tried)))

    def _seeds(self, task: Task, known: set[str]) -> list[Candidate]:
        """The best schedules that other units or devices of the same kind have for this task."""
        if not self.settings.resume:
            return []
        traces: dict[str, None] = {}
        for units in self.allocation.units_of(task.hash):
            for record in self.store.seeds(self.keys[task.hash, units], _SEEDS):
                if record.origin != "default" and record.trace not in known:
                    traces[record.trace] = None
        return [Candidate(task.hash, trace, "seed") for trace in list(traces)[:_SEEDS]]
