"""Which models share lanes: the partition into lane groups that needs the fewest units.

Exact for a few models by dynamic programming over subsets; for more, groups are merged greedily and
then improved by moving one model at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.lanes import ROUNDING, Occupancy

EXACT_MODELS = 8
_MOVES = 40  # improving moves of the heuristic; it stops long before

Partition = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Grouping:
    """Groups of models, and the units that they need together (infinite: no group fits)."""

    partition: Partition
    units: float


Grouper = Callable[[Occupancy], Grouping]


def best_grouping(load: Occupancy) -> Grouping:
    """The best partition where that is cheap, else a good one."""
    return exact_grouping(load) if len(load.busy) <= EXACT_MODELS else greedy_grouping(load)


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


def greedy_grouping(load: Occupancy) -> Grouping:
    """A good partition: the merges that save most units, then moves of single models."""
    return improved(load, merged(load).partition)


def merged(load: Occupancy) -> Grouping:
    """A partition by merging two groups at a time, always those that save most units."""
    partition = tuple(tuple(sorted(group)) for group in _merge(load))
    return Grouping(partition, units_of(load, partition))


def units_of(load: Occupancy, partition: Partition) -> float:
    """Units that a partition needs."""
    return sum(load.units_of(group) for group in partition)


def _subset_units(load: Occupancy) -> Floats:
    """Units of every subset of the models, by its bits."""
    sums = np.zeros((1, *load.busy.shape[1:]))
    for busy in load.busy:
        sums = np.concatenate([sums, sums + busy])
    return load.units(sums)


def _merge(load: Occupancy) -> list[tuple[int, ...]]:
    groups = [(model,) for model in range(len(load.busy))]
    busy = load.busy.copy()
    units = load.units(busy)
    count = len(groups)
    gains = np.full((count, count), -np.inf)
    one, two = np.triu_indices(count, 1)
    gains[one, two] = _gains(units[one], units[two], load.units(busy[one] + busy[two]))
    alive = np.ones(count, dtype=bool)
    while True:
        keep, drop = np.unravel_index(int(gains.argmax()), gains.shape)
        if not gains[keep, drop] > ROUNDING:
            return [group for group, kept in zip(groups, alive, strict=True) if kept]
        groups[keep] += groups[drop]
        busy[keep] += busy[drop]
        alive[drop] = False
        gains[drop, :] = gains[:, drop] = -np.inf
        units[keep] = load.units(busy[keep])
        others = np.flatnonzero(alive & (np.arange(count) != keep))
        fresh = _gains(units[keep], units[others], load.units(busy[keep] + busy[others]))
        gains[np.minimum(keep, others), np.maximum(keep, others)] = fresh


def _gains(one: Floats | float, two: Floats, together: Floats) -> Floats:
    """Units saved by a merge; none where it does not fit."""
    with np.errstate(invalid="ignore"):
        saved = one + two - together
    return np.where(np.isfinite(together), saved, -np.inf)


def improved(load: Occupancy, groups: Sequence[tuple[int, ...]]) -> Grouping:
    """Move a model to another group, or out of its own, as long as that saves units."""
    found = [list(group) for group in groups]
    empty = np.zeros(load.busy.shape[1:])
    for _ in range(_MOVES):
        busy = np.asarray([load.busy[group].sum(axis=0) for group in found] + [empty])
        units = load.units(busy)
        best, move = ROUNDING, None
        for source, group in enumerate(found):
            for model in group:
                without = load.units_of([each for each in group if each != model])
                into = load.units(busy + load.busy[model])
                with np.errstate(invalid="ignore"):
                    saved = units[source] - without - (into - units)
                saved[source] = -np.inf
                target = int(np.nanargmax(saved))
                if saved[target] > best:
                    best, move = float(saved[target]), (model, source, target)
        if move is None:
            break
        model, source, target = move
        found[source].remove(model)
        if target == len(found):
            found.append([])
        found[target].append(model)
        found = [group for group in found if group]
    partition = tuple(tuple(sorted(group)) for group in found)
    return Grouping(partition, units_of(load, partition))
