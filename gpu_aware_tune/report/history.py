"""What a run did over time: each task's and the model's best latency, failures, phases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gpu_aware_tune.records.store import LogEntry, Run, Store
from gpu_aware_tune.records.task_records import BASELINE


@dataclass(frozen=True)
class TaskInfo:
    """A task of the run's model, as the run's row or the library's manifest names it."""

    hash: str
    name: str
    weight: int


class Point(NamedTuple):
    """A latency at a moment of the run.

    `trial` counts the searched candidates of the whole run up to then, `number` those of the task.
    """

    time_s: float
    trial: int
    number: int
    seconds: float


@dataclass
class Curve:
    """One task on one share.

    `untuned_s` and `best_s` are as measured during the search, which is what the points show;
    `final_untuned_s` and `final_s` go by the second measurements, made alone: a kernel that has none
    does not win over one that has, as in `records.task_records.decisive`.
    """

    untuned_s: float | None = None
    best_s: float | None = None
    final_untuned_s: float | None = None
    final_s: float | None = None
    untuned_retimed: bool = False
    retimed: bool = False
    origin: str = ""
    points: list[Point] = field(default_factory=list)
    steps: list[Point] = field(default_factory=list)


@dataclass
class TaskHistory:
    """One task of a run; `trials` counts searched candidates, `failed` any that failed."""

    hash: str
    name: str
    weight: int
    curves: dict[int, Curve]
    trials: int = 0
    failed: int = 0

    @property
    def cost_s(self) -> float:
        """The most time that one inference spends in it, untuned."""
        untuned = (curve.untuned_s or curve.best_s or 0.0 for curve in self.curves.values())
        return self.weight * max(untuned, default=0.0)


@dataclass(frozen=True)
class History:
    """A run as its records tell it.

    Args:
        run: its row.
        tasks: costliest first.
        weighted: whether the tasks' weights are known; otherwise each counts once.
        model: the model's latency by units, from when all tasks have a measurement.
        trials: searched candidates of this run, failures included.
        known: searched candidates that it found in the store, as it counts them.
        candidates: all candidates of this run, untuned schedules and seeds among them.
        failures: candidates by kind of failure.
        examples: the first message of each kind.
        phases: wall-clock seconds by what was going on.
        last_s: when the last record was made, in seconds of the run; its end where none was.
    """

    run: Run
    tasks: tuple[TaskHistory, ...]
    weighted: bool
    model: Mapping[int, Sequence[Point]]
    trials: int
    known: int
    candidates: int
    failures: Mapping[str, int]
    examples: Mapping[str, str]
    phases: Mapping[str, float]
    last_s: float

    @property
    def units(self) -> list[int]:
        """The units of the run's shares, most first."""
        return sorted(self.model, reverse=True)

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.run.machine.get("model") or "unnamed model")

    def untuned_s(self, units: int) -> float | None:
        """The model's latency with each task's fastest untuned schedule, as a sum of kernels."""
        found = [(t.weight, t.curves[units]) for t in self.tasks if units in t.curves]
        if not any(curve.untuned_s for _, curve in found):
            return None
        return sum(weight * (curve.untuned_s or curve.best_s or 0.0) for weight, curve in found)

    def best_s(self, units: int) -> float | None:
        """The model's best latency so far as a sum of kernels; None before all are measured."""
        return self.model[units][-1].seconds if self.model[units] else None


@dataclass(frozen=True)
class Latency:
    """One share's model latency before and after; `whole` where the library itself was timed."""

    units: int
    untuned_s: float | None
    tuned_s: float | None
    whole: bool


def latencies(history: History) -> list[Latency]:
    """Before and after on each share: of the library, else the sum of its kernels."""
    timed = history.run.facts.get("latency_s") or {}
    found = []
    for units in history.units:
        before, after = timed.get(f"untuned-{units}"), timed.get(f"tuned-{units}")
        if after is not None:
            found.append(Latency(units, before, after, True))
        else:
            best_s = history.best_s(units)
            found.append(Latency(units, history.untuned_s(units), best_s, False))
    return found


def task_infos(run: Run) -> list[TaskInfo]:
    """Return the tasks that a run's row names; none where it was written without them."""
    tasks = run.machine.get("tasks") or ()
    return [TaskInfo(str(t["hash"]), str(t["name"]), int(t["weight"])) for t in tasks]


def read_history(store: Store, run: Run, infos: Sequence[TaskInfo] = ()) -> History:
    """Read what a run did, whether it goes on or is over.

    Args:
        store: its record store.
        run: its row.
        infos: the model's tasks; without them each that it measured counts once.
    """
    log = store.log(run, [info.hash for info in infos])
    targets = {entry.target for entry in log if entry.run_id == run.id}
    log = [entry for entry in log if entry.target in targets or not targets]
    before = [entry for entry in log if entry.run_id != run.id]
    own = [entry for entry in log if entry.run_id == run.id]
    if not run.settings.get("resume", True):
        before = [entry for entry in before if entry.origin == BASELINE]
    names = {entry.task: entry.name or entry.task[:8] for entry in log}
    found = infos or [TaskInfo(hash, name, 1) for hash, name in names.items()]
    units = sorted({int(u) for u in run.machine.get("units", ())} | {e.units for e in own})
    tasks = {
        info.hash: TaskHistory(
            info.hash, info.name, info.weight, {count: Curve() for count in units}
        )
        for info in found
    }
    for entry in before:
        _recall(tasks[entry.task].curves.get(entry.units), entry)
    numbers = _follow(run, tasks, own)
    costliest = tuple(sorted(tasks.values(), key=lambda task: -task.cost_s))
    trials, failures, examples = _count(tasks, own)
    ended_s = (run.finished or run.started) - run.started  # all there is where nothing was new
    last_s = max((entry.created - run.started for entry in own), default=ended_s)
    return History(
        run=run,
        tasks=costliest,
        weighted=bool(infos),
        model={count: _ended(model_curve(costliest, count), last_s, numbers) for count in units},
        trials=trials,
        known=min(_searched(before, units), run.settings.get("trials") or 1 << 62),
        candidates=len({(entry.task, entry.trace) for entry in own}),
        failures=failures,
        examples=examples,
        phases=_phases(run, own),
        last_s=last_s,
    )


def model_curve(tasks: Iterable[TaskHistory], units: int) -> list[Point]:
    """The sum of weight x best kernel so far, from when each task that ever ran has one."""
    curves = [(task.weight, task.curves[units]) for task in tasks if task.curves[units].steps]
    events = sorted(
        (point.time_s, point.trial, place, point.seconds)
        for place, (_, curve) in enumerate(curves)
        for point in curve.steps
    )
    best: dict[int, float] = {}
    steps: list[Point] = []
    for time_s, trial, place, seconds in events:
        best[place] = min(seconds, best.get(place, seconds))
        if len(best) == len(curves):
            total = sum(curves[one][0] * value for one, value in best.items())
            if steps and steps[-1].time_s == time_s:
                steps.pop()  # what was known at the start comes as one step
            steps.append(Point(time_s, trial, trial, total))
    return steps


def _recall(curve: Curve | None, entry: LogEntry) -> None:
    """Take in a record that the run found in the store."""
    if curve is None or not entry.usable or entry.best_s is None:
        return
    if curve.best_s is None or entry.best_s < curve.best_s:
        curve.best_s = entry.best_s
        curve.steps = [Point(0.0, 0, 0, entry.best_s)]
    _note(curve, entry, entry.best_s)


def _note(curve: Curve, entry: LogEntry, seconds: float) -> None:
    final, retimed = entry.best_s or seconds, entry.retimed is not None
    if curve.final_s is None or (not retimed, final) < (not curve.retimed, curve.final_s):
        curve.final_s, curve.retimed, curve.origin = final, retimed, entry.origin
    if entry.origin == BASELINE:
        curve.untuned_s = min(seconds, curve.untuned_s or seconds)
        best, best_retimed = curve.final_untuned_s, curve.untuned_retimed
        if best is None or (not retimed, final) < (not best_retimed, best):
            curve.final_untuned_s, curve.untuned_retimed = final, retimed


def _follow(run: Run, tasks: Mapping[str, TaskHistory], own: Sequence[LogEntry]) -> int:
    """Play a run's own records into the curves and return how many trials they are."""
    trials: dict[tuple[str, int], tuple[int, int]] = {}
    numbers: Counter[str] = Counter()
    for entry in own:
        key = (entry.task, entry.trace)
        if entry.origin == "search" and key not in trials:
            numbers[entry.task] += 1
            trials[key] = (len(trials) + 1, numbers[entry.task])
        if not entry.usable or entry.seconds is None:
            continue
        trial, number = trials.get(key, (len(trials), numbers[entry.task]))
        point = Point(max(0.0, entry.created - run.started), trial, number, entry.seconds)
        curve = tasks[entry.task].curves[entry.units]
        curve.points.append(point)
        if curve.best_s is None or entry.seconds < curve.best_s:
            curve.best_s = entry.seconds
            curve.steps.append(point)
        _note(curve, entry, entry.seconds)
    return len(trials)


def _count(
    tasks: Mapping[str, TaskHistory], own: Sequence[LogEntry]
) -> tuple[int, dict[str, int], dict[str, str]]:
    """Count trials and failures, each candidate once however many shares it was measured on."""
    searched = {(entry.task, entry.trace) for entry in own if entry.origin == "search"}
    for task, _ in searched:
        tasks[task].trials += 1
    failed: dict[tuple[str, int], LogEntry] = {}
    for entry in own:
        if entry.failure is not None or entry.wrong:
            failed.setdefault((entry.task, entry.trace), entry)
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for entry in failed.values():
        kind = entry.failure or "wrong"
        tasks[entry.task].failed += 1
        kinds[kind] += 1
        examples.setdefault(kind, entry.failure_text or "")
    return len(searched), dict(kinds.most_common()), examples


def _searched(before: Sequence[LogEntry], units: Sequence[int]) -> int:
    """Count earlier searched candidates that were tried on every share."""
    tried = [
        {(e.task, e.trace) for e in before if e.units == count and e.origin == "search"}
        for count in units
    ]
    return len(set.intersection(*tried)) if tried else 0


def _ended(steps: list[Point], last_s: float, trials: int) -> list[Point]:
    """Draw the curve on to the run's last record."""
    if steps and (steps[-1].time_s < last_s or steps[-1].trial < trials):
        steps.append(Point(max(last_s, steps[-1].time_s), trials, trials, steps[-1].seconds))
    return steps


def _phases(run: Run, own: Sequence[LogEntry]) -> dict[str, float]:
    """Wall-clock seconds of the untuned schedules, the search, and what follows it."""
    searched = [entry.created for entry in own if entry.origin == "search"]
    others = [entry.created for entry in own if entry.origin != "search"]
    first_s = max(others, default=run.started)
    if searched:
        first_s = min(first_s, min(searched))
    last_s = max(searched, default=first_s)
    phases = {"untuned schedules and seeds": first_s - run.started, "search": last_s - first_s}
    if run.finished is not None:
        phases["re-measuring, compiling, checking"] = run.finished - last_s
    return {name: max(0.0, spent) for name, spent in phases.items()}
