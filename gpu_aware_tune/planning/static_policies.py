"""Baselines whose shares never change: the whole device in turns, equal shares, GSLICE.

All of them refuse requests that cannot be answered in time, which their papers do not mention: with
endless queues a comparison by goodput would say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


class EqualSharesPolicy:
    """The same share for every model, and a fixed batch that waits until it is full or must start."""

    name = "equal-shares"

    def __init__(self, work: Workload) -> None:
        share = work.device.units // len(work) // work.device.step * work.device.step
        self._units = max(work.device.step, share)
        fitting = work.device.units // self._units
        self.lanes: tuple[int, ...] | None = (self._units,) * min(len(work), fitting)
        self._times = RunTimes(work, self.lanes)
        self._batch = [
            max(1, min(FIXED_BATCH, self._times.largest_batch(m, self._units, demand.slo_s / 2)))
            for m, demand in enumerate(work.demands)
        ]

    def decide(self, state: State, now_s: float) -> Decision:
        """Return what to start and to refuse at `now_s`."""
        queues, wakes = Queues(state), []
        for model, batch in enumerate(self._batch):
            lane = model % len(state.lane_idle)
            started = any(isinstance(a, Start) and a.lane == lane for a in queues.actions)
            if not state.lane_idle[lane] or started or not queues.waiting[model]:
                continue
            run_s = self._times.run_s(model, self._units, batch)
            must_s = queues.deadline(model) - run_s
            if queues.waiting[model] >= batch or must_s <= now_s:
                start_batch(queues, self._times, model, self._units, batch, lane, now_s)
            else:
                wakes.append(must_s)
        return Decision(tuple(queues.actions), min(wakes, default=None))


class GslicePolicy:
    """GSLICE (SoCC '20): a share at the knee for each model, and batches that adapt to the SLO.

    Where the knees do not fit side by side they are cut in proportion. A batch grows by one while
    the answers are in time, and shrinks by a quarter when one is late or refused.
    """

    name = "gslice"

    def __init__(self, work: Workload) -> None:
        self._shares = fitted([_knee_of(work, model) for model in range(len(work))], work)
        self.lanes: tuple[int, ...] | None = tuple(self._shares)
        self._times = RunTimes(work, self.lanes)
        self._cap = [1.0] * len(work)

    def decide(self, state: State, now_s: float) -> Decision:
        """Return what to start and to refuse at `now_s`."""
        queues = Queues(state)
        for model, units in enumerate(self._shares):
            lane = model % len(state.lane_idle)
            if not state.lane_idle[lane] or not queues.waiting[model]:
                continue
            before = len(queues.actions)
            cap = int(self._cap[model])
            started = start_batch(queues, self._times, model, units, cap, lane, now_s)
            late = len(queues.actions) - before > (1 if started else 0)
            if late:
                self._cap[model] = max(1.0, 0.75 * self._cap[model])
            elif started == cap:
                self._cap[model] = min(self._cap[model] + 1, FIXED_BATCH)
        return Decision(tuple(queues.actions))


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
    if queues.waiting[model] >= most:
        queues.refuse_before(model, now_s + times.run_s(model, units, most), keep=most)
    if not queues.waiting[model]:
        return 0
    within_s = queues.deadline(model) - now_s
    batch = min(queues.waiting[model], most, times.largest_batch(model, units, within_s))
    if batch:
        queues.start(Start(model, batch, units, lane))
    return batch


def fitted(wanted: Sequence[int], work: Workload) -> list[int]:
    """Shares cut in proportion until they fit the device, each at least the narrowest library."""
    device = work.device
    least = [
        next(width for width, line in zip(table.widths, table.median_s, strict=True)
             if math.isfinite(line[0]))
        for table in work.tables
    ]
    shares = list(wanted)
    part = min(1.0, device.units / sum(wanted))
    shares = [
        max(low, int(part * share) // device.step * device.step)
        for low, share in zip(least, wanted, strict=True)
    ]
    excess: Callable[[int], int] = lambda place: shares[place] - least[place]  # noqa: E731
    while sum(shares) > device.units:
        largest = max(range(len(shares)), key=excess)
        if excess(largest) <= 0:
            break  # more models than fit side by side; the caller shares lanes
        shares[largest] -= min(device.step, excess(largest))
    return shares


def _knee_of(work: Workload, model: int) -> int:
    """The knee of a model's largest measured batch up to 16."""
    table = work.tables[model]
    sizes = [size for size in table.measured if size <= FIXED_BATCH] or [table.measured[0]]
    latency_ms = {
        width: 1e3 * float(line[sizes[-1] - 1])
        for width, line in zip(table.widths, table.median_s, strict=True)
        if math.isfinite(line[sizes[-1] - 1])
    }
    return knee(latency_ms)
