"""Why demands do not fit a device, in one sentence, and what would help."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from gpu_aware_tune.planning.branching import Grouper
from gpu_aware_tune.planning.curve import Floats, LatencyTable
from gpu_aware_tune.planning.lanes import Occupancy, Workload
from gpu_aware_tune.planning.placement import place

_LOOSEST = 8.0  # times the SLO: a looser one is no help
_STEPS = 7


def explain(work: Workload, grouper: Grouper) -> tuple[str, tuple[str, ...]]:
    """The constraint that binds, and what would lift it.

    Args:
        work: a workload that does not fit its device.
        grouper: finds groups for a given load.
    """
    needed = _needed(work, grouper)
    binding, reason = _reason(work, needed, grouper)
    return reason, tuple(_helps(work, binding, needed, grouper))


def _reason(work: Workload, needed: float, grouper: Grouper) -> tuple[int, str]:
    """The model that is in the way, and why."""
    device = work.device
    alone = [_needed(work.part([model]), grouper) for model in range(len(work))]
    for model, units in enumerate(alone):
        if units > device.units:
            return model, f"{_asked(work, model)} need more than {device.count(device.units)}"
    others = [_without(work, model, grouper) for model in range(len(work))]
    left = [(device.units - units) // device.step * device.step for units in others]
    short = [
        (work.demands[model].weight, max(alone[model] - left[model], 0), model)
        for model in range(len(work))
        if left[model] >= 0
    ]
    if short:
        _, _, model = min(short)
        units = int(max(needed - others[model], left[model] + device.step))
        there = f"{int(left[model])} {'is' if left[model] == 1 else 'are'} left"
        return model, f"{_asked(work, model)} need at least {device.count(units)}; {there}"
    largest = max(range(len(work)), key=lambda model: alone[model])
    return largest, (
        f"the models need {device.count(int(needed))} together; {device.name} has {device.units},"
        " and leaving out any one of them is not enough"
    )


def _helps(work: Workload, model: int, needed: float, grouper: Grouper) -> Iterator[str]:
    device, demand = work.device, work.demands[model]
    slo_s = _looser(work, model, grouper)
    if slo_s is not None:
        yield f"an SLO of {1e3 * slo_s:.0f} ms for {demand.model}"
    width = _missing_library(work, model, grouper)
    if width is not None:
        yield f"a library of {demand.model} tuned at {device.count(width)}, between those measured"
    if device.units < needed < math.inf:
        yield f"a device of this kind with {device.count(int(needed))}"
    count = len(place(work, grouper).devices)
    if count > 1:
        yield f"{count} devices of this kind"


def _needed(work: Workload, grouper: Grouper) -> float:
    """Units that a workload needs; infinite where a model is too much for the device."""
    return grouper(Occupancy(work), 0.0).units if len(work) else 0.0


def _without(work: Workload, model: int, grouper: Grouper) -> float:
    return _needed(work.part([other for other in range(len(work)) if other != model]), grouper)


def _asked(work: Workload, model: int) -> str:
    demand = work.demands[model]
    return (
        f"{demand.model}: {demand.rate_per_s:g} requests/s within {1e3 * demand.slo_s:g} ms at"
        f" p{demand.percentile:g}"
    )


def _looser(work: Workload, model: int, grouper: Grouper) -> float | None:
    """The tightest SLO of a model at which all fits, to a few percent."""
    slo_s = work.demands[model].slo_s

    def fits(factor: float) -> bool:
        changed = dataclasses.replace(work.demands[model], slo_s=slo_s * factor)
        demands = (*work.demands[:model], changed, *work.demands[model + 1 :])
        return _needed(dataclasses.replace(work, demands=demands), grouper) <= work.device.units

    return None if not fits(_LOOSEST) else slo_s * _least(fits, 1.0, _LOOSEST)


def _least(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest factor that fits, between one that does not and one that does."""
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _missing_library(work: Workload, model: int, grouper: Grouper) -> int | None:
    """The width at which a library would make all fit, if the curve between two is smooth."""
    table = work.tables[model]
    smooth = dataclasses.replace(
        table, planned_s=_smooth(table.planned_s, np.asarray(table.widths, dtype=np.float64))
    )
    tables: tuple[LatencyTable, ...] = (*work.tables[:model], smooth, *work.tables[model + 1 :])
    load = Occupancy(dataclasses.replace(work, tables=tables))
    grouping = grouper(load, work.device.units)
    if grouping.units > work.device.units:
        return None
    own = next(models for models in grouping.partition if model in models)
    group = load.group(own)
    return None if group is None else group.width


def _smooth(planned_s: Floats, widths: Floats) -> Floats:
    """Latencies as they would be with a library at every width: affine in 1 / width between those."""
    smooth = planned_s.copy()
    for column in range(planned_s.shape[1]):
        line = planned_s[:, column]
        narrower = np.concatenate([[np.inf], line[:-1]])
        known = np.flatnonzero(line < narrower)  # widths with a library of their own
        if len(known) > 1:
            inside = np.arange(known[0], known[-1] + 1)
            # np.interp wants ascending places, 1 / width descends
            smooth[inside, column] = np.interp(
                1 / widths[inside][::-1], 1 / widths[known][::-1], line[known][::-1]
            )[::-1]
    return smooth
