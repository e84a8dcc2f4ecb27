"""The partition into lane groups that needs the fewest units, by branch and bound.

Complete for small sets. For larger ones groups are merged, single models moved, and then the most
wasteful groups are taken together and divided anew by branch and bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gpu_aware_tune.planning.grouping import Grouping, improved, merged
from gpu_aware_tune.planning.lanes import ROUNDING, Occupancy

EXACT_MODELS = 8
_REDIVISIONS = 3  # of a larger set

Grouper = Callable[[Occupancy, float], Grouping]
"""From a load and a number of units that is enough to a partition."""


def best_grouping(load: Occupancy, enough: float = 0.0) -> Grouping:
    """The partition that needs the fewest units; a good one where there are many models.

    Args:
        load: what the models need.
        enough: any partition of so few units will do.
    """
    if len(load.busy) <= EXACT_MODELS:
        return branch_and_bound(load, enough)
    return refined(load, merged(load), enough)


def refined(load: Occupancy, start: Grouping, enough: float) -> Grouping:
    """Improve a partition of many models until it is good enough, or a few attempts have passed.

    Args:
        load: what the models need.
        start: the partition, with what it needs.
        enough: any partition of so few units will do.
    """
    found = start if start.units <= enough else improved(load, start.partition)
    for attempt in range(_REDIVISIONS):
        if found.units <= enough:
            break
        found = _redivided(load, found, attempt)
    return found


def _redivided(load: Occupancy, found: Grouping, attempt: int) -> Grouping:
    """Divide some groups anew: the most wasteful ones, without as many of them as attempts so far."""
    groups = list(found.partition)
    needs = [load.units_of(group) for group in groups]
    busy = np.asarray([load.busy[list(group)].sum(axis=0) for group in groups])
    waste = needs - (busy.min(axis=2) * load.widths).min(axis=1)
    order = [int(place) for place in np.argsort(-waste, kind="stable")[attempt:]]
    chosen: list[int] = []
    for place in order:
        if sum(len(groups[each]) for each in [*chosen, place]) <= EXACT_MODELS:
            chosen.append(place)
    models = [model for place in chosen for model in groups[place]]
    units = sum(needs[place] for place in chosen)
    start = Grouping(tuple((place,) for place in range(len(models))), units)
    better = branch_and_bound(load.part(models), start=start)
    if better is start:
        return found
    kept = [group for place, group in enumerate(groups) if place not in chosen]
    fresh = [tuple(sorted(models[place] for place in group)) for group in better.partition]
    return Grouping((*kept, *fresh), found.units - units + better.units)


def branch_and_bound(
    load: Occupancy,
    enough: float = 0.0,
    start: Grouping | None = None,
) -> Grouping:
    """Look for the partition that needs the fewest units.

    Models are added one by one, those that need most first, to a group that is there or to a new
    one. A branch is cut when its groups, which can only grow, or the work of all models spread
    perfectly, need no less than the best found so far.

    Args:
        load: what the models need.
        enough: stop at any partition of so few units.
        start: only a partition of fewer units is of interest.
    """
    search = _Search(load, enough, start)
    search.run()
    return search.best


class _Search:
    def __init__(self, load: Occupancy, enough: float, start: Grouping | None) -> None:
        self.load, self.enough = load, enough
        self.known: dict[tuple[int, ...], float] = {}
        count = len(load.busy)
        alone = load.units(load.busy).tolist()
        self.known.update({(model,): alone[model] for model in range(count)})
        self.order = sorted(range(count), key=lambda model: (-alone[model], model))
        area = (load.busy.min(axis=2) * load.widths).min(axis=1)
        self.least = float(area.sum())  # units if nothing were lost between lanes
        self.best = start or Grouping(tuple((model,) for model in range(count)), math.inf)

    def run(self) -> None:
        """Search until the best is found, or one that is good enough."""
        if math.isfinite(self.least):
            self._extend(0, (), 0.0)

    def _extend(self, depth: int, groups: tuple[tuple[int, ...], ...], units: float) -> None:
        """Add the next model everywhere it may go, the cheapest place first."""
        if self._cut(units):
            return
        if depth == len(self.order):
            self.best = Grouping(tuple(sorted(groups)), units)
            return
        model = self.order[depth]
        alone: tuple[int, ...] = (model,)
        options = [(units + self.known[alone], len(groups), alone)]
        for place, group in enumerate(groups):
            larger = tuple(sorted((*group, model)))
            options.append((units - self.known[group] + self._units(larger), place, larger))
        for total, place, group in sorted(options):
            self._extend(depth + 1, (*groups[:place], group, *groups[place + 1 :]), total)

    def _cut(self, units: float) -> bool:
        return self.best.units <= self.enough or (
            max(units, self.least) >= self.best.units - ROUNDING
        )

    def _units(self, group: tuple[int, ...]) -> float:
        """Units of a group, looked up once."""
        if group not in self.known:
            self.known[group] = self.load.units_of(group)
        return self.known[group]
