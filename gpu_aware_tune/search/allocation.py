"""Which task gets the next trials: those whose weight x latency x expected gain is largest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from gpu_aware_tune.model.tasks import Task

_FIRST_GAIN = (
    0.5  # what a task's first draft is expected to bring: baseline schedules leave about half
)
_MEMORY = 0.5  # share of the past in the running mean of what drafts brought
_FLOOR = 0.02  # expected even of a task that has not improved for long, so that none is given up


@dataclass(frozen=True)
class Goal:
    """A latency to bring down: one model on one share.

    Args:
        model: the model's name, unique in a run.
        units: of the share.
        weights: task hash -> how often the model runs that kernel.
    """

    model: str
    units: int
    weights: Mapping[str, int]


@dataclass
class _State:
    task: Task
    untuned_s: dict[int, float] = field(default_factory=dict)
    best_s: dict[int, float] = field(default_factory=dict)
    started: int = 0  # trials asked for
    finished: int = 0
    gain: float = _FIRST_GAIN
    since: int = 0  # trials finished since the last look at the gain
    before: float = 0.0  # seconds at that look, summed over the units
    exhausted: bool = False

    def seconds(self) -> float:
        """Best latency, summed over the units; 0 while nothing is measured."""
        return sum(self.best_s.values())


class Allocation:
    """Keeps each task's best latencies and decides where the next trials go.

    The gain expected of a draft is a running mean of what the task's last drafts brought, plus an
    optimistic part that fades with the trials spent and is larger for tasks that run at fewer FLOP/s
    than the best one (TVM's gradient scheduler does the same with a window of three rounds). What
    a task is worth is its part of each goal's latency, so that a slow model does not starve a fast
    one that is tuned at the same time.

    Args:
        tasks: every task of every goal, each once.
        goals: the latencies to bring down.
        per_draft: trials of one draft.
        per_task: most trials a task, or None.
    """

    def __init__(
        self, tasks: Sequence[Task], goals: Sequence[Goal], per_draft: int, per_task: int | None
    ) -> None:
        self._states = {task.hash: _State(task) for task in tasks}
        self._goals = tuple(goals)
        self._per_draft = per_draft
        self._per_task = per_task

    def note(self, task: str, units: int, seconds: float, origin: str) -> None:
        """Take in one measurement."""
        state = self._states[task]
        if origin == "default":
            state.untuned_s[units] = min(seconds, state.untuned_s.get(units, seconds))
        if seconds < state.best_s.get(units, float("inf")):
            state.best_s[units] = seconds

    def finish(self, task: str) -> None:
        """One trial of the search is over (measured or failed)."""
        state = self._states[task]
        state.finished += 1
        state.since += 1
        if state.since < self._per_draft and state.finished < state.started:
            return
        seconds = state.seconds()
        first = _FIRST_GAIN if seconds else 0.0  # 0: nothing of this task has run yet
        brought = max(0.0, 1 - seconds / state.before) if state.before else first
        state.gain = _MEMORY * state.gain + (1 - _MEMORY) * brought
        state.before, state.since = seconds, 0

    def resume(self, task: str, trials: int) -> None:
        """Count trials of earlier runs."""
        state = self._states[task]
        state.started = state.finished = trials
        state.before = state.seconds()

    def exhaust(self, task: str) -> None:
        """The task's search space has nothing new."""
        self._states[task].exhausted = True

    def next(self, left: Mapping[str, int], busy: Collection[str] = ()) -> str | None:
        """The task that should get the next draft, or None when every one is at its limit.

        Args:
            left: trials that each model's budget still allows; those asked for and not finished
                count against it. A model that is not named gets none.
            busy: tasks that are being drafted for already.
        """
        open_goals = [g for g in self._goals if left.get(g.model, 0) > self.in_flight(g.model)]
        worth = self._worth(open_goals)
        states = [self._states[t] for t in worth if worth[t] and self._room(self._states[t]) > 0]
        top = max((self._rate(state) for state in states), default=0.0)
        return max(
            (state.task.hash for state in states if state.task.hash not in busy),
            key=lambda hash_: self._value(self._states[hash_], worth[hash_], top),
            default=None,
        )

    def start(self, task: str, count: int) -> int:
        """Count trials as asked for; returns how many the task's limit lets through."""
        state = self._states[task]
        count = max(0, min(count, self._room(state)))
        if not state.started:
            state.before = state.seconds()
        state.started += count
        return count

    def in_flight(self, model: str) -> int:
        """Trials asked for and not finished, of one model's tasks."""
        return sum(
            state.started - state.finished
            for state in self._states.values()
            if state.started > state.finished and model in self.models_of(state.task.hash)
        )

    def models_of(self, task: str) -> tuple[str, ...]:
        """The models that have a task, in the order of the goals."""
        return tuple(dict.fromkeys(goal.model for goal in self._goals if task in goal.weights))

    def units_of(self, task: str) -> tuple[int, ...]:
        """The units that a task is measured on, in the order of the goals."""
        return tuple(dict.fromkeys(goal.units for goal in self._goals if task in goal.weights))

    def planned(self, trials: int, model: str) -> Mapping[str, int]:
        """A forecast for the plan that is shown before anything is measured (by FLOPs and weight)."""
        weights = next(goal.weights for goal in self._goals if goal.model == model)
        flops = {t: self._states[t].task.flops * weight for t, weight in weights.items()}
        total = sum(flops.values()) or 1.0
        limit = self._per_task or trials
        return {t: min(limit, round(trials * value / total)) for t, value in flops.items()}

    def best_s(self, task: str) -> Mapping[int, float]:
        """Best seconds of a task by units."""
        return self._states[task].best_s

    def untuned_s(self, task: str) -> Mapping[int, float]:
        """Seconds of a task's best baseline schedule by units."""
        return self._states[task].untuned_s

    def trials(self, task: str) -> int:
        """Finished trials of a task."""
        return self._states[task].finished

    def latency_s(self, model: str, untuned: bool = False) -> dict[int, float]:
        """A model's latency by units as the sum of weight x kernel over the measured tasks."""
        goals = [goal for goal in self._goals if goal.model == model]
        return {goal.units: self._latency(goal, untuned) for goal in goals}

    def _latency(self, goal: Goal, untuned: bool = False) -> float:
        total = 0.0
        for task, weight in goal.weights.items():
            state = self._states[task]
            seconds = state.untuned_s if untuned else state.best_s
            total += weight * seconds.get(goal.units, state.best_s.get(goal.units, 0.0))
        return total

    def _worth(self, goals: Sequence[Goal]) -> dict[str, float]:
        """Each task's part of the goals' latencies, summed.

        A task of which nothing has run yet, because every baseline schedule failed, counts by its
        part of the FLOPs, or of the number of tasks: only the search can give it a kernel.
        """
        worth: dict[str, float] = {}
        for goal in goals:
            latency = self._latency(goal) or 1.0
            flops = sum(self._states[t].task.flops * w for t, w in goal.weights.items()) or 1.0
            for task, weight in goal.weights.items():
                state = self._states[task]
                seconds = state.best_s.get(goal.units)
                guess = max(state.task.flops / flops, 1 / len(goal.weights))
                part = guess if seconds is None else seconds / latency
                worth[task] = worth.get(task, 0.0) + weight * part
        return worth

    def _room(self, state: _State) -> int:
        if state.exhausted:
            return 0
        return (1 << 30) if self._per_task is None else self._per_task - state.started

    def _rate(self, state: _State) -> float:
        seconds = state.seconds()
        return state.task.flops / seconds if seconds else 0.0

    def _value(self, state: _State, worth: float, top_rate: float) -> float:
        below_best = 1 - self._rate(state) / top_rate if top_rate else 1.0
        drafts = state.started / self._per_draft
        hope = _FIRST_GAIN * (0.3 + 0.7 * below_best) / (1 + drafts)
        waiting = 1 + (state.started - state.finished) / self._per_draft
        return worth * (_FLOOR + (state.gain + hope) / 2) / waiting
