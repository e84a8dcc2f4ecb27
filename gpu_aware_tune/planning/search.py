"""How far the rates of a workload can grow until it no longer fits its device."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.grouping import (
    EXACT_MODELS,
    Grouper,
    Grouping,
    Partition,
    exact_grouping,
    greedy_grouping,
    merged,
    units_of,
)
from gpu_aware_tune.planning.lanes import MOST_PERIODS, Occupancy, Workload

RATIO = 1.001  # scales are powers of it, so that equal problems find equal scales
_COARSE = 16  # steps at a time while the partition is still looked for
_FEW_PERIODS = 48  # while the scale of many models is still far off
_LIMIT = 20_000  # steps either way: a factor of 5e8


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


def largest_scale(
    work: Workload, grouper: Grouper | None = None, most_periods: int | None = MOST_PERIODS
) -> tuple[int, Grouping]:
    """The largest step whose scale fits the device, and the grouping there.

    Args:
        work: the workload.
        grouper: finds groups for a given load; by default exact for few models, else greedy.
        most_periods: see `Occupancy`.
    """
    rates = np.asarray([demand.rate_per_s for demand in work.demands])
    limit = work.device.units / float((cheapest_cost(work) * rates).sum())
    top = (math.floor(math.log(limit) / math.log(RATIO)) // _COARSE + 1) * _COARSE
    if grouper is not None or len(work) <= EXACT_MODELS:
        trial = _Trial(work, grouper or exact_grouping, most_periods)
        best = _last(trial.fits, _last(trial.fits, top, _COARSE) + _COARSE, 1)
        return best, trial.found[best]
    quick = _Trial(work, merged, _FEW_PERIODS)
    start = _last(quick.fits, top, _COARSE)
    trial = _Trial(work, greedy_grouping, most_periods)
    low = _last(trial.fits, start + _COARSE, _COARSE)
    while low >= start and trial.fits(low + _COARSE):
        low += _COARSE
    return _refine(trial, low)


def largest_scale_of(work: Workload, partition: Partition) -> int:
    """The largest step at which given groups fit the device."""
    return largest_scale(work, lambda load: Grouping(partition, units_of(load, partition)))[0]


class _Trial:
    """Groupings by step, each looked for once."""

    def __init__(self, work: Workload, grouper: Grouper, most_periods: int | None) -> None:
        self.work, self.grouper, self.most_periods = work, grouper, most_periods
        self.found: dict[int, Grouping] = {}

    def fits(self, step: int) -> bool:
        if step not in self.found:
            self.found[step] = self.grouper(self.load(step))
        return self.found[step].units <= self.work.device.units

    def load(self, step: int) -> Occupancy:
        return Occupancy(self.work, scale_at(step), self.most_periods)


def _refine(trial: _Trial, coarse: int) -> tuple[int, Grouping]:
    """Go on in single steps with the groups that were found."""
    partition = trial.found[coarse].partition
    fixed = _Trial(
        trial.work, lambda load: Grouping(partition, units_of(load, partition)), trial.most_periods
    )
    fixed.found[coarse] = trial.found[coarse]
    best = _last(fixed.fits, coarse + _COARSE, 1)
    return best, fixed.found[best]


def _last(fits: Callable[[int], bool], top: int, stride: int) -> int:
    """The largest multiple of `stride` up to `top` that fits, looked for downwards from there."""
    high, jump = top, stride
    low = top - jump
    while not fits(low):
        high, jump = low, 2 * jump
        low -= jump
        if low < -_LIMIT:
            raise ArithmeticError("no rate is low enough")  # excluded by the planner's checks
    while high - low > stride:
        middle = low + (high - low) // (2 * stride) * stride
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
