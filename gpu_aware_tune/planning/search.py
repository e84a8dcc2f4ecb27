"""How far the rates of a workload can grow until it no longer fits its device."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gpu_aware_tune.planning.branching import EXACT_MODELS, Grouper, best_grouping, refined
from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.grouping import Grouping, merged, units_of
from gpu_aware_tune.planning.lanes import MOST_PERIODS, Occupancy, Workload

RATIO = 1.001  # scales are powers of it, so that equal problems find equal scales
_COARSE = 16  # steps at a time while the partition is still looked for
_FEW_PERIODS = 48  # while the scale of many models is still far off
_LEAST = 1e-4  # of the limit: rates so low that only the SLOs count


def scale_at(step: int) -> float:
    """The factor on the rates at a step."""
    return float(RATIO**step)


def cheapest_cost(work: Workload) -> Floats:
    """Unit-seconds of a request of each model, on the width and in the batch that need fewest.

    No schedule can do better, as a run longer than the SLO helps nobody.
    """
    widths = np.asarray(work.device.widths, dtype=np.float64)[:, None]
    costs = []
    for demand, table in zip(work.demands, work.tables, strict=True):
        sizes = np.arange(1, table.largest_batch + 1)
        cost = np.where(table.planned_s <= demand.slo_s, widths * table.planned_s / sizes, np.inf)
        costs.append(cost.min())
    return np.asarray(costs)


def headroom_limit(work: Workload) -> float:
    """A factor on all rates that no schedule can pass: every unit always busy at its best."""
    rates = np.asarray([demand.rate_per_s for demand in work.demands])
    return work.device.units / float((cheapest_cost(work) * rates).sum())


def largest_scale(
    work: Workload, grouper: Grouper = best_grouping, most_periods: int | None = MOST_PERIODS
) -> tuple[int, Grouping] | None:
    """The largest step whose scale fits the device, and the grouping there; None: none does.

    However low the rates are, every model must start often enough to meet its SLO, and for that the
    device may be too small.

    Args:
        work: the workload.
        grouper: finds groups for a given load.
        most_periods: see `Occupancy`.
    """
    limit = headroom_limit(work)
    if grouper(Occupancy(work, _LEAST * limit), work.device.units).units > work.device.units:
        return None
    top = (math.floor(math.log(limit) / math.log(RATIO)) // _COARSE + 1) * _COARSE
    trial = _Trial(work, grouper, most_periods)
    if len(work) <= EXACT_MODELS or grouper is not best_grouping:
        best = _last(trial.fits, _last(trial.fits, top, _COARSE) + _COARSE, 1)
        return best, trial.found[best]
    return _many(work, top, most_periods)


def _many(work: Workload, top: int, most_periods: int | None) -> tuple[int, Grouping]:
    """The same for many models: merge quickly, then try to pass what that reaches."""
    units = work.device.units
    quick = _Trial(work, lambda load, _: merged(load), _FEW_PERIODS)
    coarse = _last(quick.fits, top, _COARSE, 8 * _COARSE)
    partition = quick.found[coarse].partition
    for jump in (4 * _COARSE, 2 * _COARSE, _COARSE):
        load = Occupancy(work, scale_at(coarse + jump), most_periods)
        found = refined(load, Grouping(partition, units_of(load, partition)), units)
        if found.units <= units:
            coarse, partition = coarse + jump, found.partition
    fixed = _Trial(
        work, lambda load, _: Grouping(partition, units_of(load, partition)), most_periods
    )
    best = _last(fixed.fits, coarse + _COARSE, 1)
    return best, fixed.found[best]


class _Trial:
    """Groupings by step, each looked for once."""

    def __init__(self, work: Workload, grouper: Grouper, most_periods: int | None) -> None:
        self.work, self.grouper, self.most_periods = work, grouper, most_periods
        self.found: dict[int, Grouping] = {}

    def fits(self, step: int) -> bool:
        """Whether the rates at a step fit the device."""
        if step not in self.found:
            load = Occupancy(self.work, scale_at(step), self.most_periods)
            self.found[step] = self.grouper(load, self.work.device.units)
        return self.found[step].units <= self.work.device.units


def _last(fits: Callable[[int], bool], top: int, stride: int, jump: int | None = None) -> int:
    """The largest multiple of `stride` below `top` that fits, looked for downwards from there."""
    high, jump = top, jump or stride
    low = top - jump
    while not fits(low):
        high, jump = low, 2 * jump
        low -= jump
    while high - low > stride:
        middle = low + (high - low) // (2 * stride) * stride
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
