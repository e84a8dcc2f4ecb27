"""The fewest units by dynamic programming over all subsets: a referee for branch and bound.

It shares with the planner what a group needs, and nothing of how groups are looked for.
"""

from __future__ import annotations

import math

import numpy as np

from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.grouping import Grouping
from gpu_aware_tune.planning.lanes import Occupancy, Workload
from gpu_aware_tune.planning.search import largest_scale, scale_at


def optimal_headroom(work: Workload) -> float:
    """The largest factor on all rates, over all partitions and all periods that may be best; 0: none."""
    found = largest_scale(work, lambda load, _: exact_grouping(load), most_periods=None)
    return 0.0 if found is None else scale_at(found[0])


def exact_grouping(load: Occupancy) -> Grouping:
    """The partition that needs the fewest units, by dynamic programming over subsets."""
    count = len(load.busy)
    needs = _subset_units(load).tolist()
    best = [0.0] + [math.inf] * ((1 << count) - 1)
    choice = [0] * (1 << count)
    for mask in range(1, 1 << count):
        low = mask & -mask
        rest = part = mask ^ low
        while True:  # every subset of `mask` that holds its lowest model
            units = needs[part | low] + best[rest ^ part]
            if units < best[mask]:
                best[mask], choice[mask] = units, part | low
            if not part:
                break
            part = (part - 1) & rest
    full = (1 << count) - 1
    if not math.isfinite(best[full]):
        return Grouping(tuple((model,) for model in range(count)), math.inf)
    groups, left = [], full
    while left:
        groups.append(tuple(model for model in range(count) if choice[left] >> model & 1))
        left ^= choice[left]
    return Grouping(tuple(groups), best[full])


def _subset_units(load: Occupancy) -> Floats:
    """Units of every subset of the models, by its bits."""
    sums = np.zeros((1, *load.busy.shape[1:]))
    for busy in load.busy:
        sums = np.concatenate([sums, sums + busy])
    return load.units(sums)
