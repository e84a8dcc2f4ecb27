"""Which task gets the next trials: those whose weight x latency x expected gain is largest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gpu_aware_tune.tasks import Task

_FIRST_GAIN = (
    0.5  # what a task's first draft is expected to bring: default schedules leave about half
)
_MEMORY = 0.5  # share of the past in the running mean of what drafts brought
_FLOOR = 0.02  # expected even of a task that has not improved for long, so that none is given up


@dataclass
class _State:
    task: Task
    untuned_s: dict[int, float] = field(default_factory=dict)
    best_s: dict[int, float] = field(default_factory=dict)
    started: int = 0  # trials asked for
    finished: int = 0
    gain: float = _FIRST_GAIN
    since: int = 0  # trials finished since the last look at the gain
    before: float = 0.0  # cost at that look
    exhausted: bool = False

    def cost(self) -> float:
        """Weight x best latency, summed over the units; 0 while nothing is measured."""
        return self.task.weight * sum(self.best_s.values())


class Allocation:
    """Keeps each task's best latencies and decides where the next trials go.

    The gain expected of a draft is a running mean of what the task's last drafts brought, plus an
    optimistic part that fades with the trials spent and is larger for tasks that run at fewer FLOP/s
    than the model's best (TVM's gradient scheduler does the same with a window of three rounds).

    Args:
        tasks: the model's tasks.
        units: the units of each share asked for.
        per_draft: trials of one draft.
        per_task: most trials a task, or None.
    """

    def __init__(
        self, tasks: Sequence[Task], units: Sequence[int], per_draft: int, per_task: int | None
    ) -> None:
        self._states = {task.hash: _State(task) for task in tasks}
        self._units = tuple(units)
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
        cost = state.cost()
        brought = max(0.0, 1 - cost / state.before) if state.before else _FIRST_GAIN
        state.gain = _MEMORY * state.gain + (1 - _MEMORY) * brought
        state.before, state.since = cost, 0

    def resume(self, task: str, trials: int) -> None:
        """Count trials of earlier runs."""
        state = self._states[task]
        state.started = state.finished = trials
        state.before = state.cost()

    def exhaust(self, task: str) -> None:
        """The task's search space has nothing new."""
        self._states[task].exhausted = True

    def next(self, left: int) -> str | None:
        """The task that should get the next draft, or None when every one is at its limit.

        Args:
            left: trials the budget still allows; those asked for and not finished count against it.
        """
        if left <= self.in_flight():
            return None
        open_states = [s for s in self._states.values() if self._room(s) > 0]
        top = max((self._rate(s) for s in open_states), default=0.0)
        best = max(open_states, key=lambda s: self._value(s, top), default=None)
        return best.task.hash if best is not None and best.cost() > 0 else None

    def start(self, task: str, count: int) -> int:
        """Count trials as asked for; returns how many the task's limit lets through."""
        state = self._states[task]
        count = min(count, self._room(state))
        if not state.started:
            state.before = state.cost()
        state.started += count
        return count

    def in_flight(self) -> int:
        """Trials asked for and not finished."""
        return sum(s.started - s.finished for s in self._states.values())

    def planned(self, trials: int) -> Mapping[str, int]:
        """A forecast for the plan that is shown before anything is measured (by FLOPs and weight)."""
        total = sum(s.task.flops * s.task.weight for s in self._states.values()) or 1.0
        limit = self._per_task or trials
        return {
            hash_: min(limit, round(trials * s.task.flops * s.task.weight / total))
            for hash_, s in self._states.items()
        }

    def best_s(self, task: str) -> Mapping[int, float]:
        """Best seconds of a task by units."""
        return self._states[task].best_s

    def untuned_s(self, task: str) -> Mapping[int, float]:
        """Seconds of a task's best default schedule by units."""
        return self._states[task].untuned_s

    def trials(self, task: str) -> int:
        """Finished trials of a task."""
        return self._states[task].finished

    def latency_s(self, untuned: bool = False) -> dict[int, float]:
        """The model's latency by units as the sum of weight x kernel over the measured tasks."""
        return {units: sum(self._latencies(units, untuned)) for units in self._units}

    def _latencies(self, units: int, untuned: bool) -> Iterable[float]:
        for state in self._states.values():
            seconds = state.untuned_s if untuned else state.best_s
            yield state.task.weight * seconds.get(units, state.best_s.get(units, 0.0))

    def _room(self, state: _State) -> int:
        if state.exhausted:
            return 0
        return (1 << 30) if self._per_task is None else self._per_task - state.started

    def _rate(self, state: _State) -> float:
        seconds = sum(state.best_s.values())
        return state.task.flops / seconds if seconds else 0.0

    def _value(self, state: _State, top_rate: float) -> float:
        below_best = 1 - self._rate(state) / top_rate if top_rate else 1.0
        drafts = state.started / self._per_draft
        hope = _FIRST_GAIN * (0.3 + 0.7 * below_best) / (1 + drafts)
        waiting = 1 + (state.started - state.finished) / self._per_draft
        return state.cost() * (_FLOOR + (state.gain + hope) / 2) / waiting
