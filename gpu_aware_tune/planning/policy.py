"""The interface of run-time policies: from the state of a device to the runs that start now.

A policy has no thread, no clock and no device. A server calls `decide` with the real time and real
lanes, the simulator with a virtual clock; both apply the decision exactly as it stands.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from gpu_aware_tune.planning.lanes import Workload

SLACK = 1e-9  # seconds by which rounding may spoil a comparison


@dataclass(slots=True)
class Running:
    """A run that has not ended.

    Args:
        model: its position in the workload.
        units: that it occupies.
        lane: which lane, or None where units are taken from a pool.
        end_s: when it is planned to end.
    """

    model: int
    units: int
    lane: int | None
    end_s: float


@dataclass(slots=True)
class State:
    """What a policy sees.

    Args:
        queues: by model, the deadlines of the waiting requests in order of arrival.
        lane_free_s: by lane, when it is planned to be free; a time that has passed where it is.
        lane_idle: by lane, whether it can start a run now.
        free_units: units of the pool that are idle.
        running: runs that have not ended.
    """

    queues: list[deque[float]]
    lane_free_s: list[float]
    lane_idle: list[bool]
    free_units: int
    running: list[Running] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Start:
    """A run to start now, of the requests at the head of the model's queue.

    Args:
        model: its position in the workload.
        batch: how many requests.
        units: on so many units.
        lane: on this lane, or None for units of the pool.
    """

    model: int
    batch: int
    units: int
    lane: int | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Requests at the head of a queue that are refused."""

    model: int
    count: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, in this order, and when to ask again if nothing happens before."""

    actions: tuple[Start | Refusal, ...] = ()
    wake_s: float | None = None


class Policy(Protocol):
    """Decides what runs next."""

    name: str
    lanes: tuple[int, ...] | None  # units of each lane; None: units are taken from a pool

    def decide(self, state: State, now_s: float) -> Decision:
        """Return what to start and to refuse at `now_s`; the state is not changed."""


class RunTimes:
    """Planned seconds of runs, as plain lists: looked up for every decision.

    Args:
        work: the workload.
        widths: the widths that runs may have; all of the device's by default.
    """

    def __init__(self, work: Workload, widths: tuple[int, ...] | None = None) -> None:
        rows = {width: place for place, width in enumerate(work.device.widths)}
        self._seconds: list[dict[int, list[float]]] = []
        for table in work.tables:
            by_width: dict[int, list[float]] = {}
            for width in sorted(set(widths or work.device.widths)):
                line = table.planned_s[rows[width]]
                by_width[width] = [float(seconds) for seconds in line if seconds < float("inf")]
            self._seconds.append(by_width)
        self.fastest_s = [
            min((line[0] for line in by_width.values() if line), default=float("inf"))
            for by_width in self._seconds
        ]

    def run_s(self, model: int, units: int, batch: int) -> float:
        """Seconds of a run; infinite where there is no such library."""
        line = self._seconds[model][units]
        return line[batch - 1] if batch <= len(line) else float("inf")

    def largest_batch(self, model: int, units: int, within_s: float) -> int:
        """The largest batch that runs within a time, 0 if none does."""
        return bisect_right(self._seconds[model][units], within_s + SLACK)


class Queues:
    """The queues while one decision is made: what is refused or started is no longer waiting."""

    def __init__(self, state: State) -> None:
        self._queues = state.queues
        self._taken = [0] * len(state.queues)
        self.waiting = [len(queue) for queue in state.queues]
        self.actions: list[Start | Refusal] = []

    def deadline(self, model: int, place: int = 0) -> float:
        """The deadline of a waiting request."""
        return self._queues[model][self._taken[model] + place]

    def refuse(self, model: int, count: int) -> None:
        """Refuse requests at the head."""
        if count:
            self._take(model, count)
            self.actions.append(Refusal(model, count))

    def start(self, start: Start) -> None:
        """Start a run of requests at the head."""
        self._take(start.model, start.batch)
        self.actions.append(start)

    def refuse_before(self, model: int, deadline_s: float, keep: int = 0) -> None:
        """Refuse the requests that are due before a time, as long as so many are left."""
        count, limit = 0, self.waiting[model] - keep
        while count < limit and self.deadline(model, count) < deadline_s - SLACK:
            count += 1
        self.refuse(model, count)

    def _take(self, model: int, count: int) -> None:
        self._taken[model] += count
        self.waiting[model] -= count
