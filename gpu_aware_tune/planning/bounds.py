"""Upper bounds that no scheduler can pass, by linear programming.

The device runs one configuration at a time: a multiset of runs (model, units, batch) that fit side by
side. A clairvoyant scheduler that may cut time between configurations as finely as it likes, that
always finds full batches, and whose runs take up to the whole SLO, serves

    max  sum of w_m x_m    with  x_m <= rate_m,  x_m <= sum of y_C (requests a second of m in C),
                                 sum of y_C = 1

There are too many configurations to list; they are generated as the program asks for them, by a
dynamic programme over units (column generation, Gilmore and Gomory 1961). HiGHS solves the programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.lanes import Workload

_ROUNDS = 500
_GAP = 1e-7


@dataclass(frozen=True)
class Bound:
    """An upper bound.

    Args:
        value: requests a second (weighted), or the headroom.
        served_per_s: of each model in the solution.
    """

    value: float
    served_per_s: tuple[float, ...]


def goodput_bound(work: Workload, planned: bool = False) -> Bound:
    """The most weighted requests a second that can be answered within their SLOs.

    Args:
        work: the workload.
        planned: reckon with planning latencies instead of medians, which are what runs take.
    """
    speeds = _speeds(work, planned)
    rates = [demand.rate_per_s for demand in work.demands]
    weights = [demand.weight for demand in work.demands]
    served, value = _solve(speeds, _steps(work), weights, rates, shared=False)
    return Bound(value, served)


def headroom_bound(work: Workload, planned: bool = True) -> Bound:
    """The largest factor on all rates that can be served; see `goodput_bound`."""
    speeds = _speeds(work, planned)
    rates = [demand.rate_per_s for demand in work.demands]
    served, value = _solve(speeds, _steps(work), [0.0] * len(rates), rates, shared=True)
    return Bound(value, served)


def _steps(work: Workload) -> list[int]:
    return list(work.device.widths)


def _speeds(work: Workload, planned: bool) -> Floats:
    """Requests a second of a run of each model, by width, in its best batch."""
    rows = []
    for demand, table in zip(work.demands, work.tables, strict=True):
        run_s = table.planned_s if planned else table.median_s
        sizes = np.arange(1, table.largest_batch + 1)
        rows.append(np.where(run_s <= demand.slo_s, sizes / run_s, 0.0).max(axis=1))
    return np.asarray(rows)


def _solve(
    speeds: Floats,
    widths: Sequence[int],
    weights: Sequence[float],
    rates: Sequence[float],
    shared: bool,
) -> tuple[tuple[float, ...], float]:
    """Generate configurations until none is worth adding; gives what is served, and the optimum.

    Variables: with `shared` one factor h on all rates, else x_m of each model; then y of each
    configuration.
    """
    from scipy.optimize import linprog

    count = len(rates)
    rate = np.asarray(rates)
    first = -rate[:, None] if shared else -np.eye(count)
    cost = [-1.0] if shared else [-weight for weight in weights]
    limits: list[tuple[float, float | None]] = (
        [(0.0, None)] if shared else [(0.0, each) for each in rates]
    )
    columns = [np.where(np.arange(count) == m, speeds[m].max(), 0.0) for m in range(count)]
    for _ in range(_ROUNDS):
        served = np.concatenate([first, np.asarray(columns).T], axis=1)
        answer = linprog(
            [*cost, *([0.0] * len(columns))],
            A_ub=-served,
            b_ub=np.zeros(count),
            A_eq=[[0.0] * len(cost) + [1.0] * len(columns)],
            b_eq=[1.0],
            bounds=[*limits, *([(0.0, None)] * len(columns))],
            method="highs",
        )
        prices = -answer.ineqlin.marginals
        worth, column = _configuration(speeds, widths, prices)
        now = -answer.eqlin.marginals[0]
        if worth <= now + _GAP * max(1.0, now):
            break
        columns.append(column)
    got = answer.x[0] * rate if shared else answer.x[:count]
    return tuple(float(value) for value in got), float(-answer.fun)


def _configuration(speeds: Floats, widths: Sequence[int], prices: Floats) -> tuple[float, Floats]:
    """The configuration that is worth most, by dynamic programming over units."""
    value = speeds * prices[:, None]
    best_model = value.argmax(axis=0)
    gain = value.max(axis=0)
    total = widths[-1]
    worth, choice = [0.0] * (total + 1), [-1] * (total + 1)
    for units in range(1, total + 1):
        worth[units] = worth[units - 1]
        for row, width in enumerate(widths):
            if width > units:
                break
            if worth[units - width] + gain[row] > worth[units] + 1e-15:
                worth[units], choice[units] = worth[units - width] + gain[row], row
    column, left = np.zeros(len(speeds)), total
    while left > 0:
        row = choice[left]
        if row < 0:
            left -= 1
            continue
        column[best_model[row]] += speeds[best_model[row], row]
        left -= widths[row]
    return worth[total], column
