"""The search stage: baseline schedules first, then drafts where they pay, each result kept at once."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpu_aware_tune.events import Event, Level, Note, Origin, Progress, StoppedBy, Trial
from gpu_aware_tune.measure import SEARCH
from gpu_aware_tune.measure.measurement import Measurement
from gpu_aware_tune.model.tasks import Task
from gpu_aware_tune.records.store import Record
from gpu_aware_tune.search.budget import Budget, StopRequest
from gpu_aware_tune.search.candidates import Candidate, NewTask
from gpu_aware_tune.search.objectives import combined
from gpu_aware_tune.search.pipeline import Outcome
from gpu_aware_tune.search.sources import CandidatePipeline, CandidateSource
from gpu_aware_tune.search.task_set import Known, TaskSet, allocation_of
from gpu_aware_tune.settings import RunSettings

_PROGRESS_S = 0.5
_FLUSH_S = 0.8  # a finished trial is on disk within a second
_LOOK_S = 2.0  # between two looks at what other runs have measured
_KNOWN = 64  # measured schedules that a search starts from
_SEEDS = 4  # schedules of other units or devices that are tried first


@dataclass(frozen=True)
class SearchContext:
    """What a search is given.

    Args:
        settings: of the run.
        work: what is searched.
        known: what the records hold of it.
        backend: the partition backend, kept with each record.
        run_ids: each model's run row.
        baselines: traces of each task's baseline schedules; "" stands for the unscheduled kernel.
        stop: whether somebody asked to end the search.
    """

    settings: RunSettings
    work: TaskSet
    known: Known
    backend: str
    run_ids: Mapping[str, int]
    baselines: Mapping[str, Sequence[str]]
    stop: StopRequest


@dataclass(frozen=True)
class SearchResult:
    """What a search came to; the kernels themselves are in the records.

    Args:
        best_s: seconds of the fastest schedule by task and units, as the search measured it.
        trials: finished trials by task.
        trials_of: finished trials by model, those of earlier runs included.
        failures: of this run, by kind.
        stopped_by: why the search of each model ended.
        interrupted: whether it was asked to end.
    """

    best_s: Mapping[tuple[str, int], float]
    trials: Mapping[str, int]
    trials_of: Mapping[str, int]
    failures: Mapping[str, int]
    stopped_by: Mapping[str, StoppedBy]
    interrupted: bool


def search(
    context: SearchContext,
    pipeline: CandidatePipeline,
    budgets: Mapping[str, Budget],
    trials: bool = True,
) -> Generator[Event, None, SearchResult]:
    """Measure the baseline schedules that no record holds yet, then spend the budgets.

    Args:
        context: what is searched.
        pipeline: searches, builds and measures.
        budgets: when to stop, by model.
        trials: whether anything is searched; without, only the baseline is measured.
    """
    running = _Search(context, pipeline, budgets)
    yield from running.baseline()
    if trials and not context.stop.requested:
        yield from running.trials()
    return running.result()


class _Search:
    """One run's search over all tasks of all models; a task that several models have is searched once."""

    def __init__(
        self, context: SearchContext, pipeline: CandidatePipeline, budgets: Mapping[str, Budget]
    ) -> None:
        self._context, self._pipeline, self._budgets = context, pipeline, budgets
        self._settings, self._work, self._known = context.settings, context.work, context.known
        self._timing = dataclasses.replace(SEARCH, budget_s=self._settings.measure_s)
        self.allocation = allocation_of(self._work, self._known, self._settings)
        self.names = {task.hash: task.name for task in self._work.tasks}
        self._failures: Counter[str] = Counter()
        self._notes: list[Note] = []
        self._unsaved: list[Record] = []
        self._saved_at = self._shown_at = 0.0
        self._last_id, self._looked_at = self._known.records.store.last_id(), time.monotonic()
        self.elsewhere: set[tuple[str, str]] = set()  # (task, trace) that other runs measured
        self._resumed: dict[str, int] = {}
        self._search_from_s: float | None = None
        for model, budget in budgets.items():
            spent = self._known.spent[model]
            limit = spent if budget.trials is None else budget.trials
            budget.done = self._resumed[model] = min(spent, limit)
            budget.start()
        for task in self._work.tasks:
            pipeline.add_task(self._new_task(task))

    def _new_task(self, task: Task) -> NewTask:
        """A task with its best known schedules, as its searcher gets it."""
        past = self._known.past[task.hash]
        scored = sorted(
            (self._objective(task.hash, s), trace) for trace, s, _ in past.known if trace
        )
        pairs = tuple((trace, score) for score, trace in scored[:_KNOWN])
        tried = (*self._context.baselines[task.hash], *past.tried)
        return NewTask(task.hash, task.module_json, pairs, tried)

    def baseline(self) -> Iterator[Event]:
        """Measure the baseline schedules that no record holds yet, and seeds from elsewhere.

        The heaviest tasks come first: where the time is short, the light ones go without. A task
        that has a seed from another batch size needs only its most promising baseline schedule.
        """
        candidates = []
        for task in self._work.tasks:
            if task.hash in self._known.light:
                continue
            known = {trace for trace, _, _ in self._known.past[task.hash].known}
            relatives = self._known.seeds.get(task.hash, ())
            baselines = self._context.baselines[task.hash][: 1 if relatives else None]
            for trace in baselines:
                if trace not in known:
                    candidates.append(Candidate(task.hash, trace, Origin.BASELINE))
            known.update(baselines)
            candidates.extend(self._seeds(task.hash, known, relatives))
        yield from self._run(candidates, _Baseline(self))

    def trials(self) -> Iterator[Event]:
        """Spend the budgets."""
        self._search_from_s = next(iter(self._budgets.values())).elapsed_s()
        yield from self._run((), _Trials(self))

    def result(self) -> SearchResult:
        """What it came to."""
        allocation, stopped = self.allocation, self._stopped()
        return SearchResult(
            best_s={
                (task.hash, units): seconds
                for task in self._work.tasks
                for units, seconds in allocation.best_s(task.hash).items()
            },
            trials={task.hash: allocation.trials(task.hash) for task in self._work.tasks},
            trials_of={model: budget.done for model, budget in self._budgets.items()},
            failures=dict(self._failures),
            stopped_by={
                model: StoppedBy.INTERRUPT if stopped else budget.stopped_by() or StoppedBy.SPACE
                for model, budget in self._budgets.items()
            },
            interrupted=stopped,
        )

    def progress(self, model: str) -> Progress:
        """Where the run of a model stands."""
        budget, resumed = self._budgets[model], self._resumed[model]
        elapsed = budget.elapsed_s()
        searched_s = elapsed - self._search_from_s if self._search_from_s is not None else 0.0
        pipeline = self._pipeline
        return Progress(
            model=model,
            elapsed_s=elapsed,
            trials_done=budget.done,
            trials_total=budget.trials or 0,
            trials_per_min=60 * (budget.done - resumed) / searched_s if searched_s > 0 else 0.0,
            untuned_s=self.allocation.latency_s(model, untuned=True),
            best_s=self.allocation.latency_s(model),
            failures=dict(self._failures),
            eta_s=budget.eta_s(resumed, self._search_from_s or 0.0),
            builds_in_flight=pipeline.builds_in_flight,
            waiting_to_measure=pipeline.waiting_to_measure,
            slices=tuple((name, self.names.get(task or "")) for name, task in pipeline.slices),
        )

    def _stopped(self) -> bool:
        return self._context.stop.requested

    def must_stop(self) -> bool:
        """Whether the run was asked to stop; the pipeline asks all the time, so this also saves."""
        if time.monotonic() - self._saved_at > _FLUSH_S:
            self._save()
        return self._stopped()

    def _save(self) -> None:
        if self._unsaved:
            self._known.records.store.add(self._unsaved)
            self._unsaved = []
            self._saved_at = time.monotonic()

    def out_of_time(self) -> bool:
        """Whether no time is left for any model."""
        return all(b.stopped_by() == StoppedBy.TIME for b in self._budgets.values())

    def _run(self, wanted: Sequence[Candidate], source: CandidateSource) -> Iterator[Event]:
        try:
            alone = self._settings.exclusive
            for outcome in self._pipeline.run(wanted, source, self._timing, alone):
                yield from self._keep(outcome)
        finally:  # also where the caller closes the run, or an error or a second Ctrl-C ends it
            self._save()
        yield from self._flush(force=True)

    def left(self) -> dict[str, int]:
        """Trials left by model, of those whose search has not ended."""
        return {
            model: budget.left()
            for model, budget in self._budgets.items()
            if budget.stopped_by() is None
        }

    def warn(self, text: str) -> None:
        """Say something with the next event."""
        self._notes.append(Note(text, Level.WARNING))

    def _keep(self, outcome: Outcome) -> Iterator[Event]:
        """Record one outcome and pass it on to the allocation, the search and the caller."""
        candidate = outcome.candidate
        seconds = {units: m.seconds for units, m in outcome.measurements.items()}
        for units, measurement in outcome.measurements.items():
            self._unsaved.append(self._record(candidate, units, measurement))
            if measurement.seconds is not None:
                self.allocation.note(candidate.task, units, measurement.seconds, candidate.origin)
        if outcome.failure is not None:
            self._failures[outcome.failure] += 1
        if candidate.origin == Origin.SEARCH:
            self.allocation.finish(candidate.task)
            for model in self.allocation.models_of(candidate.task):
                latency_s = statistics.fmean(self.allocation.latency_s(model).values())
                self._budgets[model].spend(latency_s)
            whole = {u: s for u, s in seconds.items() if s is not None}
            score = self._objective(candidate.task, whole) if len(whole) == len(seconds) else None
            self._pipeline.tell(candidate, score)
        name = self.names[candidate.task]
        yield Trial(name, Origin(candidate.origin), seconds, outcome.failure)
        yield from self._flush()

    def _objective(self, task: str, seconds: Mapping[int, float]) -> float:
        """What the search minimises: latency relative to the best there, over the units (`combined`).

        Scaled by the best latency, so that with one share it is simply the seconds.
        """
        best = self.allocation.best_s(task)
        ratios = [value / best.get(units, value) for units, value in seconds.items()]
        first = self._work.units_of(task)[0]
        scale = best.get(first, seconds.get(first, 1.0))
        return combined(ratios, self._settings.objective) * scale if ratios else float("inf")

    def _record(self, candidate: Candidate, units: int, measurement: Measurement) -> Record:
        failure = measurement.failure
        coarse = ("coarse",) if measurement.coarse else ()
        return Record(
            key=self._known.records.keys[candidate.task, units],
            trace=candidate.trace,
            seconds=measurement.seconds,
            failure=failure.kind if failure else None,
            failure_text=failure.text if failure else None,
            origin=candidate.origin,
            spread=measurement.spread if measurement.seconds is not None else None,
            repeats=measurement.repeats or None,
            run_id=self._context.run_ids.get(self.allocation.models_of(candidate.task)[0]),
            created=time.time(),
            partition=self._context.backend,
            flags=",".join((*coarse, *measurement.flags, *measurement.how)),
        )

    def _flush(self, force: bool = False) -> Iterator[Event]:
        now = time.monotonic()
        yield from self._notes
        self._notes.clear()
        if self._unsaved and (force or now - self._saved_at > _FLUSH_S):
            self._save()
            self._learn_from_others(now)
        if force or now - self._shown_at > _PROGRESS_S:
            self._shown_at = now
            for model in self._budgets:
                yield self.progress(model)

    def _learn_from_others(self, now: float) -> None:
        """Take in what runs in other processes have measured of these tasks meanwhile."""
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        records = self._known.records
        last_id = records.store.last_id()
        for record in records.from_others(self._last_id, list(self._context.run_ids.values())):
            task = record.key.task
            self.elsewhere.add((task, record.trace))
            if record.usable and record.best_s is not None:
                self.allocation.note(task, record.key.units, record.best_s, record.origin)
        self._last_id = last_id

    def _seeds(
        self, task: str, known: Collection[str], relatives: Sequence[str]
    ) -> list[Candidate]:
        """The best schedules of this task elsewhere: at another batch size, on other units or devices."""
        traces = {trace: None for trace in relatives if trace not in known}
        if not self._settings.resume:
            return [Candidate(task, trace, Origin.SEED) for trace in traces]
        for units in self._work.units_of(task):
            for record in self._known.records.seeds(task, units, _SEEDS):
                if record.origin != Origin.BASELINE and record.trace not in known:
                    traces[record.trace] = None
        return [Candidate(task, trace, Origin.SEED) for trace in list(traces)[:_SEEDS]]


class _Baseline(CandidateSource):
    """While the baseline is measured: nothing is drafted."""

    def __init__(self, search: _Search) -> None:
        self._search = search

    def warn(self, text: str) -> None:
        self._search.warn(text)

    def stop(self) -> bool:
        return self._search.must_stop() or self._search.out_of_time()


class _Trials(_Baseline):
    """The searchers' candidates, as far as the budgets go."""

    def next_task(self, busy: Collection[str]) -> str | None:
        return self._search.allocation.next(self._search.left(), busy)

    def accept(self, task: str, drafted: Sequence[Candidate]) -> Sequence[Candidate]:
        search, left = self._search, self._search.left()
        drafted = [c for c in drafted if (task, c.trace) not in search.elsewhere]
        models = [model for model in search.allocation.models_of(task) if model in left]
        most = max((left[m] - search.allocation.in_flight(m) for m in models), default=0)
        return drafted[: search.allocation.start(task, min(len(drafted), most))]

    def exhausted(self, task: str) -> None:
        self._search.allocation.exhaust(task)

    def lost(self, task: str, text: str) -> None:
        """The search died on a task: leave the task, and say so with the next event."""
        self._search.allocation.exhaust(task)
        self._search.warn(f"search of {self._search.names[task]} ended: {text}")

    def best_s(self, task: str) -> Mapping[int, float]:
        return self._search.allocation.best_s(task)

    def stop(self) -> bool:
        return self._search.must_stop() or not self._search.left()
