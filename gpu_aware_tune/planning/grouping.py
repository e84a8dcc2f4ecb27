"""Which models share lanes: partitions into lane groups, and a quick way to a good one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.lanes import ROUNDING, Occupancy

_MOVES = 40  # improving moves of the heuristic; it stops long before

Partition = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Grouping:
    """Groups of models, and the units that they need together (infinite: no group fits)."""

    partition: Partition
    units: float


def merged(load: Occupancy) -> Grouping:
    """A partition by merging two groups at a time, always those that save most units."""
    partition = tuple(tuple(sorted(group)) for group in _merge(load))
    return Grouping(partition, units_of(load, partition))


def units_of(load: Occupancy, partition: Partition) -> float:
    """Units that a partition needs."""
    return sum(load.units_of(group) for group in partition)


def _merge(load: Occupancy) -> list[tuple[int, ...]]:
    groups: list[tuple[int, ...]] = [(model,) for model in range(len(load.busy))]
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
