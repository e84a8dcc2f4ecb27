"""Baselines whose shares never change: the whole device in turns, equal shares, GSLICE.

All of them refuse requests that cannot be answered in time, which their papers do not mention: with
endless queues a comparison by goodput would say nothing.
"""

from __future__ import annotations

import math

from gpu_aware_tune.planning.curve import LatencyTable
from gpu_aware_tune.planning.lanes import Workload
from gpu_aware_tune.planning.policy import Decision, Queues, RunTimes, Start, State
from gpu_aware_tune.profiling.knee import knee

FIXED_BATCH = 16


class TemporalPolicy:
    """The whole device for one model at a time, in batches as large as the queue and SLO allow.

    Args:
        work: what is served.
        round_robin: take the models in turns, instead of the one whose request came first.
    """

    def __init__(self, work: Workload, round_robin: bool = False) -> None:
        self.name = "temporal-rr" if round_robin else "temporal-fifo"
        self.lanes: tuple[int, ...] | None = (work.device.units,)
        self._units = work.device.units
        self._times = RunTimes(work, self.lanes)
        self._slo_s = [demand.slo_s for demand in work.demands]
        self._round_robin = round_robin
        self._last = -1

    def decide(self, state: State, now_s: float) -> Decision:
        """Return what to start and to refuse at `now_s`."""
        queues = Queues(state)
        if not state.lane_idle[0]:
            return Decision()
        for model in self._order(queues):
            if start_batch(queues, self._times, model, self._units, FIXED_BATCH, 0, now_s):
                self._last = model
                break
        return Decision(tuple(queues.actions))

    def _order(self, queues: Queues) -> list[int]:
        models = [model for model, count in enumerate(queues.waiting) if count]
        if self._round_robin:
            count = len(queues.waiting)
            return sorted(models, key=lambda model: (model - self._last - 1) % count)
        return sorted(models, key=lambda model: queues.deadline(model) - self._slo_s[model])


class StaticPolicy:
    """A lane of its own for each model; where there are more models than lanes, some share one.

    Args:
        name: of the policy.
        work: what is served.
        shares: units of each model's lane.
        patient: whether a batch waits until it is full or must start.
    """

    def __init__(self, name: str, work: Workload, shares: tuple[int, ...], patient: bool) -> None:
        self.name, self._patient = name, patient
        while sum(shares) > work.device.units:
            shares = shares[:-1]
        self.lanes: tuple[int, ...] | None = shares
        self._shares = shares
        self._times = RunTimes(work, shares)
        self._batch = [
            max(1, self._times.largest_batch(model, self._units(model), demand.slo_s / 2))
            for model, demand in enumerate(work.demands)
        ]
        self._batch = [min(FIXED_BATCH, batch) for batch in self._batch]

    def decide(self, state: State, now_s: float) -> Decision:
        """Return what to start and to refuse at `now_s`."""
        queues, wakes = Queues(state), []
        idle = list(state.lane_idle)
        for model in self._by_deadline(queues):
            lane, units, batch = model % len(idle), self._units(model), self._batch[model]
            if not idle[lane]:
                continue
            must_s = queues.deadline(model) - self._times.run_s(model, units, batch)
            if self._patient and queues.waiting[model] < batch and must_s > now_s:
                wakes.append(must_s)
            elif start_batch(queues, self._times, model, units, batch, lane, now_s):
                idle[lane] = False
        return Decision(tuple(queues.actions), min(wakes, default=None))

    def _units(self, model: int) -> int:
        return self._shares[model % len(self._shares)]

    @staticmethod
    def _by_deadline(queues: Queues) -> list[int]:
        models = [model for model, count in enumerate(queues.waiting) if count]
        return sorted(models, key=queues.deadline)


def equal_shares(work: Workload) -> StaticPolicy:
    """The same share for every model, and a fixed batch that waits until full or must start."""
    step, total = work.device.step, work.device.units
    share = max(step, total // len(work) // step * step, *(_narrowest(t) for t in work.tables))
    share = total if share + step > total else share
    return StaticPolicy("equal-shares", work, (share,) * len(work), patient=True)


def gslice(work: Workload) -> StaticPolicy:
    """GSLICE (SoCC '20) once it has converged.

    It raises the share of a model that misses its SLO, lowers that of one that keeps it, and stops
    at the knee. So here each unit goes to the model that is short of most, up to its knee. Batches
    adapt to the queue, up to what half of the SLO holds.
    """
    shares = [_narrowest(table) for table in work.tables]
    knees = [knee_width(table) for table in work.tables]
    while True:
        free = work.device.units - sum(shares)
        growing = [
            model
            for model, share in enumerate(shares)
            if share < knees[model] and _next_width(work, share) - share <= free
        ]
        if not growing:
            return StaticPolicy("gslice", work, tuple(shares), patient=False)
        model = max(growing, key=lambda model: _load(work, model, shares[model]))
        shares[model] = _next_width(work, shares[model])


def start_batch(
    queues: Queues,
    times: RunTimes,
    model: int,
    units: int,
    most: int,
    lane: int | None,
    now_s: float,
) -> int:
    """Start up to `most` requests of a model, refusing those that are too late; tells how many."""
    queues.refuse_before(model, now_s + times.run_s(model, units, 1))
    most = min(most, times.largest_batch(model, units, math.inf))  # no larger one can be run
    if queues.waiting[model] >= most:
        queues.refuse_before(model, now_s + times.run_s(model, units, most), keep=most)
    if not queues.waiting[model]:
        return 0
    within_s = queues.deadline(model) - now_s
    batch = min(queues.waiting[model], most, times.largest_batch(model, units, within_s))
    if batch:
        queues.start(Start(model, batch, units, lane))
    return batch


def knee_width(table: LatencyTable) -> int:
    """The knee of a model's largest measured batch up to 16."""
    sizes = [size for size in table.measured if size <= FIXED_BATCH] or [table.measured[0]]
    latency_ms = {
        width: 1e3 * float(line[sizes[-1] - 1])
        for width, line in zip(table.widths, table.median_s, strict=True)
        if math.isfinite(line[sizes[-1] - 1])
    }
    return knee(latency_ms)


def _narrowest(table: LatencyTable) -> int:
    """The narrowest width that the model has a library for."""
    return table.widths[int((table.median_s[:, 0] < math.inf).argmax())]


def _next_width(work: Workload, width: int) -> int:
    return next((each for each in work.device.widths if each > width), 2 * work.device.units)


def _load(work: Workload, model: int, width: int) -> float:
    """A model's rate over what a lane serves in batches of up to half of the SLO."""
    demand, table = work.demands[model], work.tables[model]
    line = table.planned_s[table.row(width)][:FIXED_BATCH]
    speeds = [(size + 1) / run_s for size, run_s in enumerate(line) if 2 * run_s <= demand.slo_s]
    return demand.rate_per_s / max(speeds) if speeds else math.inf
