"""Baselines that take any free units for a run: D-STACK, max-min and max-throughput.

Each model has one share and one batch size. What differs is by what these are chosen, and who goes
first. As in `static_policies`, requests that cannot be answered in time are refused.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from gpu_aware_tune.planning.curve import LatencyTable
from gpu_aware_tune.planning.demand import Demand
from gpu_aware_tune.planning.lanes import Workload
from gpu_aware_tune.planning.policy import SLACK, Decision, Queues, RunTimes, State
from gpu_aware_tune.planning.static_policies import FIXED_BATCH, knee_width, start_batch

_SESSIONS = 10  # how far back D-STACK's score board looks


def by_efficacy(demand: Demand, table: LatencyTable) -> tuple[int, int]:
    """D-STACK's share and batch: the highest throughput / (latency x share).

    Feasible is what takes half of the SLO at most, and whose batch arrives in the rest of it.
    """
    return _best(demand, table, power=2, assemble=True)


def by_knee(demand: Demand, table: LatencyTable) -> tuple[int, int]:
    """The share at the knee, and the largest batch that takes half of the SLO at most."""
    units = knee_width(table)
    line = table.planned_s[table.row(units)][:FIXED_BATCH]
    return units, max(1, int((line <= demand.slo_s / 2).sum()))


def by_throughput(demand: Demand, table: LatencyTable) -> tuple[int, int]:
    """The share and batch that serve most requests a unit-second within half of the SLO."""
    return _best(demand, table, power=1, assemble=False)


def _best(demand: Demand, table: LatencyTable, power: int, assemble: bool) -> tuple[int, int]:
    widths = np.asarray(table.widths, dtype=np.float64)[:, None]
    sizes = np.arange(1, min(table.largest_batch, FIXED_BATCH) + 1)
    run_s = table.planned_s[:, : len(sizes)]
    fits = run_s <= demand.slo_s / 2
    if assemble:
        fits &= run_s + sizes / demand.rate_per_s <= demand.slo_s
    if not fits.any():  # not for the paper's feasible models: as soon as can be
        fits = run_s <= run_s[:, :1].min() + SLACK
    with np.errstate(invalid="ignore"):
        worth = np.where(fits, sizes / (run_s**power * widths), -np.inf)
    row, column = np.unravel_index(int(worth.argmax()), worth.shape)
    return table.widths[row], int(column) + 1


class PoolPolicy:
    """Starts the models in an order as long as units are free; subclasses give the order."""

    name: str

    def __init__(self, work: Workload, runs: Sequence[tuple[int, int]]) -> None:
        self.lanes: tuple[int, ...] | None = None
        self._runs = tuple(runs)  # units and batch of each model
        self._times = RunTimes(work)
        self._run_s = [
            self._times.run_s(model, units, batch) for model, (units, batch) in enumerate(runs)
        ]

    def decide(self, state: State, now_s: float) -> Decision:
        """Return what to start and to refuse at `now_s`."""
        queues, free = Queues(state), state.free_units
        started = True
        while started:
            started = False
            for model in self.order(queues, now_s):
                units, batch = self._runs[model]
                if units > free or not self.may_start(queues, state, free, model, now_s):
                    continue
                count = start_batch(queues, self._times, model, units, batch, None, now_s)
                if count:
                    free -= units
                    self.has_started(model, count, now_s)
                    started = True
                    break
        return Decision(tuple(queues.actions), self.wake_s(queues, now_s))

    def order(self, queues: Queues, now_s: float) -> list[int]:
        """The models with waiting requests, first the one to start first."""
        raise NotImplementedError

    def may_start(self, queues: Queues, state: State, free: int, model: int, now_s: float) -> bool:
        """Whether a model that is next in order may start; so far so many units are free."""
        return True

    def has_started(self, model: int, count: int, now_s: float) -> None:
        """Take note of a run."""

    def wake_s(self, queues: Queues, now_s: float) -> float | None:
        """When to ask again."""
        return None


class MaxMinPolicy(PoolPolicy):
    """Max-min fairness: the model goes first of whose demand the smallest part was served."""

    name = "max-min"

    def __init__(self, work: Workload) -> None:
        pairs = zip(work.demands, work.tables, strict=True)
        super().__init__(work, [by_efficacy(demand, table) for demand, table in pairs])
        self._demand = [demand.rate_per_s * demand.weight for demand in work.demands]
        self._served = [0.0] * len(work)

    def order(self, queues: Queues, now_s: float) -> list[int]:
        """The least served first."""
        models = [model for model, count in enumerate(queues.waiting) if count]
        return sorted(models, key=lambda model: self._served[model])

    def has_started(self, model: int, count: int, now_s: float) -> None:
        """Count what was served."""
        self._served[model] += count / self._demand[model]


class MaxThroughputPolicy(PoolPolicy):
    """Most requests a unit-second first."""

    name = "max-throughput"

    def __init__(self, work: Workload) -> None:
        pairs = zip(work.demands, work.tables, strict=True)
        super().__init__(work, [by_throughput(demand, table) for demand, table in pairs])
        self._worth = [
            demand.weight * batch / (run_s * units)
            for demand, (units, batch), run_s in zip(
                work.demands, self._runs, self._run_s, strict=True
            )
        ]

    def order(self, queues: Queues, now_s: float) -> list[int]:
        """The most productive first."""
        models = [model for model, count in enumerate(queues.waiting) if count]
        return sorted(models, key=lambda model: -self._worth[model])


class DStackPolicy(PoolPolicy):
    """D-STACK (arXiv:2304.13541): efficacy, sessions, and who ran least goes first.

    Every model has a reserved run in each of its SLO periods: the next start is reserved so that the
    gap between two starts stays below the SLO. Between these, idle units go to the models that have
    requests, least run time over the last ten sessions first, as long as the run ends before a
    reserved one needs the units. A session is as long as the longest SLO.

    Args:
        work: what is served.
        at_knee: take the share at the knee and the largest batch instead of the highest efficacy, as
            the paper's table of models has it.
    """

    def __init__(self, work: Workload, at_knee: bool = False) -> None:
        self.name = "d-stack-knee" if at_knee else "d-stack"
        choose = by_knee if at_knee else by_efficacy
        pairs = zip(work.demands, work.tables, strict=True)
        super().__init__(work, [choose(demand, table) for demand, table in pairs])
        self._slo_s = [demand.slo_s for demand in work.demands]
        self._window_s = _SESSIONS * max(self._slo_s)
        self._reserved_s = [0.0] * len(work)
        self._history: deque[tuple[float, int, float]] = deque()
        self._ran_s = [0.0] * len(work)

    def order(self, queues: Queues, now_s: float) -> list[int]:
        """Reserved runs by earliest deadline, then the models that ran least."""
        while self._history and self._history[0][0] < now_s - self._window_s:
            _, model, run_s = self._history.popleft()
            self._ran_s[model] -= run_s
        models = [model for model, count in enumerate(queues.waiting) if count]
        return sorted(models, key=lambda model: self._key(queues, model, now_s))

    def _key(self, queues: Queues, model: int, now_s: float) -> tuple[float, float]:
        due = self._reserved_s[model] <= now_s
        return (-math.inf, queues.deadline(model)) if due else (self._ran_s[model], model)

    def may_start(self, queues: Queues, state: State, free: int, model: int, now_s: float) -> bool:
        """A reserved run may; another one must leave enough units to those that come before its end."""
        if self._reserved_s[model] <= now_s:
            return True
        units, _ = self._runs[model]
        end_s, needed = now_s + self._run_s[model], 0
        for reserved_s, other in sorted((time, m) for m, time in enumerate(self._reserved_s)):
            idle = reserved_s <= now_s and not queues.waiting[other]  # its run is not needed
            if reserved_s >= end_s or other == model or idle:
                continue
            needed += self._runs[other][0]
            ready_s = _ready_s(state, free, needed, max(now_s, reserved_s))
            if ready_s < end_s and free - units + _ended(state, ready_s) < needed:
                return False
        return True

    def has_started(self, model: int, count: int, now_s: float) -> None:
        """Reserve the next run, and put this one on the score board."""
        run_s = self._run_s[model]
        self._reserved_s[model] = now_s + max(run_s, self._slo_s[model] - run_s)
        self._history.append((now_s, model, run_s))
        self._ran_s[model] += run_s

    def wake_s(self, queues: Queues, now_s: float) -> float | None:
        """When the next reserved run is due that has work."""
        due = [
            time
            for time, count in zip(self._reserved_s, queues.waiting, strict=True)
            if count and time > now_s
        ]
        return min(due, default=None)


def _ended(state: State, time_s: float) -> int:
    """Units of the runs that end until a time."""
    return sum(run.units for run in state.running if run.end_s <= time_s)


def _ready_s(state: State, free: int, needed: int, from_s: float) -> float:
    """The first time from `from_s` on at which so many units are free if nothing else starts."""
    ends = sorted(run.end_s for run in state.running if run.end_s > from_s)
    times = (time for time in [from_s, *ends] if free + _ended(state, time) >= needed)
    return next(times, math.inf)
