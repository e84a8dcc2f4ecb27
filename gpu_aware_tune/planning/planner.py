"""From demands and curves to a plan: a pure function, milliseconds for a dozen models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.branching import Grouper, best_grouping
from gpu_aware_tune.planning.curve import MARGIN, Batching, CurvePoint, latency_table
from gpu_aware_tune.planning.demand import Demand
from gpu_aware_tune.planning.device import PlanDevice
from gpu_aware_tune.planning.explain import explain
from gpu_aware_tune.planning.grouping import Grouping
from gpu_aware_tune.planning.interference import Interference
from gpu_aware_tune.planning.lanes import LaneGroup, Occupancy, Workload
from gpu_aware_tune.planning.schedule import Lane, ModelPlan, Plan, PlanObjective, Slot
from gpu_aware_tune.planning.search import cheapest_cost, headroom_limit, largest_scale, scale_at

_SELDOM = 1e-6  # times the rates: only the SLOs count
_LEAST_PART = 0.02  # of a rate: less is not worth its slots
_PART_STEPS = 6


class CurveLike(Protocol):
    """What is looked at of a curve; `profiling.curves.Curve` is one."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def points(self) -> Sequence[CurvePoint]:
        """What was measured."""


def plan(
    device: PlanDevice,
    demands: Sequence[Demand],
    curves: Iterable[CurveLike],
    *,
    objective: PlanObjective = PlanObjective.HEADROOM,
    margin: float = MARGIN,
    batching: Batching = Batching.AFFINE,
    interference: Interference | None = None,
    why: bool = True,
) -> Plan:
    """Plan which model runs on which lanes, when, and in which batches.

    Args:
        device: what to plan for.
        demands: one for each model.
        curves: one for each model, measured on such a device.
        objective: what to make the most of.
        margin: the planning latency is so many times the measured p90.
        batching: what a batch size that was not measured takes.
        interference: how much lanes slow each other down; not at all by default.
        why: look for the reason where the demands do not fit; that takes longer than the plan.

    Returns:
        The plan; where not every demand fits it serves less and says why.

    Raises:
        UserError: a curve is missing, or an SLO cannot be met at all.
    """
    work = workload(device, demands, curves, margin, batching, interference)
    return plan_workload(work, objective, margin, why=why)


def workload(
    device: PlanDevice,
    demands: Sequence[Demand],
    curves: Iterable[CurveLike],
    margin: float = MARGIN,
    batching: Batching = Batching.AFFINE,
    interference: Interference | None = None,
) -> Workload:
    """Put together what is planned; see `plan`."""
    if not demands:
        raise UserError("there is no model to plan: name at least one")
    if not (math.isfinite(margin) and margin >= 1):
        raise UserError(f"--margin {margin:g} is not allowed: give a factor from 1 on, such as 1.1")
    names = [demand.model for demand in demands]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{', '.join(sorted(twice))} is asked for twice: add up its rates")
    by_name = {curve.model: curve for curve in curves}
    disturbed = interference or Interference()
    tables = []
    for name in names:
        if name not in by_name:
            known = ", ".join(sorted(by_name)) or "none"
            raise UserError(f"there is no curve of {name} (curves: {known}): profile it")
        factor = margin * disturbed.worst(name, names if len(names) > 1 else ())
        points = by_name[name].points
        tables.append(latency_table(name, points, device.widths, margin=factor, batching=batching))
    work = Workload(device, tuple(demands), tuple(tables))
    _check_possible(work, by_name)
    return work


def plan_workload(
    work: Workload,
    objective: PlanObjective = PlanObjective.HEADROOM,
    margin: float = MARGIN,
    grouper: Grouper = best_grouping,
    why: bool = True,
) -> Plan:
    """Plan a workload; see `plan`."""
    kept, (step, evenly) = _served(work, grouper)
    part = work.part(kept)
    headroom = scale_at(step)
    served, load, grouping, rate_part = part, Occupancy(part, headroom), evenly, min(1.0, headroom)
    if objective is PlanObjective.UNITS and headroom >= 1:
        load = Occupancy(part)
        grouping = grouper(load, 0.0)
    elif objective is PlanObjective.GOODPUT and headroom < 1:
        chosen, chosen_load, chosen_grouping = _most_goodput(part, grouper)
        if _worth(chosen) > headroom * _worth(part):  # slots are whole, so it may not be
            served, load, grouping, rate_part = chosen, chosen_load, chosen_grouping, 1.0
    groups = [made for models in grouping.partition if (made := load.group(models)) is not None]
    planned = _models(part, served, groups, rate_part, saving=objective is PlanObjective.UNITS)
    result = Plan(
        device=work.device,
        lanes=_lanes(part, groups),
        models=tuple(
            planned[kept.index(model)] if model in kept else _unserved(work.demands[model])
            for model in range(len(work))
        ),
        headroom=headroom if len(kept) == len(work) else 0.0,
        headroom_limit=headroom_limit(work),
        objective=objective,
        margin=margin,
    )
    if result.fits or not why:
        return result
    reason, helps = explain(work, grouper)
    return dataclasses.replace(result, reason=reason, helps=helps)


def _served(work: Workload, grouper: Grouper) -> tuple[list[int], tuple[int, Grouping]]:
    """The models that get lanes, and how far their rates can grow together.

    All of them, unless the device is too small for their SLOs at any rate. Then the model goes
    without that needs most units for its weight, until the others fit.
    """
    kept = list(range(len(work)))
    while (found := largest_scale(work.part(kept), grouper)) is None:
        seldom = Occupancy(work.part(kept), _SELDOM)
        units = seldom.units(seldom.busy)
        kept.pop(
            max(
                range(len(kept)),
                key=lambda place: units[place] / work.demands[kept[place]].weight,
            )
        )
    return kept, found


def _unserved(demand: Demand) -> ModelPlan:
    """What a model gets that does not fit beside the others at any rate."""
    return ModelPlan(
        model=demand.model,
        rate_per_s=demand.rate_per_s,
        served_per_s=0.0,
        slo_s=demand.slo_s,
        percentile=demand.percentile,
        weight=demand.weight,
        group=-1,
        batch=0,
        period_s=0.0,
        run_s=0.0,
        lowest_per_s=0.0,
    )


def _check_possible(work: Workload, curves: Mapping[str, CurveLike]) -> None:
    """Refuse what no plan can serve, however low the rate."""
    for demand, table in zip(work.demands, work.tables, strict=True):
        if not math.isfinite(table.fastest_s):
            narrowest = min((point.units for point in curves[demand.model].points), default=0)
            raise UserError(
                f"{demand.model} has no library for {work.device.count(work.device.units)} or fewer"
                f" (its narrowest has {narrowest}): tune it for a smaller share"
            )
        lanes = np.asarray([work.device.units // width for width in table.widths])
        promised_s = float((table.planned_s[:, 0] * (1 + 1 / lanes)).min())
        if promised_s > demand.slo_s:
            raise UserError(
                f"slo {1e3 * demand.slo_s:g}ms of {demand.model} is below the best that can be"
                f" promised on {work.device.count(work.device.units)}, {1e3 * promised_s:.3g} ms: a"
                f" run of one request takes {1e3 * table.fastest_s:.3g} ms, and it may just have"
                " missed a start; give more, or tune the model further"
            )


def _most_goodput(work: Workload, grouper: Grouper) -> tuple[Workload, Occupancy, Grouping]:
    """Serve the models in order of weighted requests a unit-second, each as far as it fits."""
    cost = cheapest_cost(work)
    order = sorted(
        range(len(work)), key=lambda model: (cost[model] / work.demands[model].weight, model)
    )
    rates = [demand.rate_per_s * _LEAST_PART * 1e-3 for demand in work.demands]

    def attempt(model: int, part: float) -> tuple[Workload, Occupancy, Grouping]:
        trial = list(rates)
        trial[model] = work.demands[model].rate_per_s * part
        demands = [
            dataclasses.replace(demand, rate_per_s=rate)
            for demand, rate in zip(work.demands, trial, strict=True)
        ]
        part_work = dataclasses.replace(work, demands=tuple(demands))
        load = Occupancy(part_work)
        return part_work, load, grouper(load, work.device.units)

    best = attempt(order[0], rates[order[0]] / work.demands[order[0]].rate_per_s)
    for model in order:
        low, high = 0.0, 1.0
        for _ in range(_PART_STEPS):
            part = high if low == 0.0 and high == 1.0 else (low + high) / 2
            tried = attempt(model, max(part, _LEAST_PART * 1e-3))
            if tried[2].units <= work.device.units:
                low, best = part, tried
                rates[model] = tried[0].demands[model].rate_per_s
                if part == 1.0:
                    break
            else:
                high = part
    return best


def _worth(work: Workload) -> float:
    """Weighted requests a second."""
    return sum(demand.weight * demand.rate_per_s for demand in work.demands)


def _lanes(work: Workload, groups: Sequence[LaneGroup]) -> tuple[Lane, ...]:
    lanes: list[Lane] = []
    first = 0
    for number, group in enumerate(groups):
        row = work.device.widths.index(group.width)
        cycle_s = group.lanes * group.period_s
        order = sorted(
            zip(group.models, group.batches, strict=True),
            key=lambda item: (work.demands[item[0]].slo_s, item[0]),
        )
        for place in range(group.lanes):
            start_s, slots = place * group.period_s, []
            for model, batch in order:
                length_s = float(work.tables[model].planned_s[row, batch - 1])
                slots.append(Slot(work.demands[model].model, batch, start_s, length_s))
                start_s += length_s
            lanes.append(Lane(first, group.width, number, cycle_s, tuple(slots)))
            first += group.width
    if work.device.units - first >= work.device.step:
        spare = (work.device.units - first) // work.device.step * work.device.step
        lanes.append(Lane(first, spare, len(groups), 0.0, ()))
    return tuple(lanes)


def _models(
    work: Workload, served: Workload, groups: Sequence[LaneGroup], part: float, saving: bool
) -> tuple[ModelPlan, ...]:
    found: dict[int, ModelPlan] = {}
    for number, group in enumerate(groups):
        row = work.device.widths.index(group.width)
        lowest = _lowest_scale(served, group) if saving else 0.0
        for model, batch in zip(group.models, group.batches, strict=True):
            demand = work.demands[model]
            found[model] = ModelPlan(
                model=demand.model,
                rate_per_s=demand.rate_per_s,
                served_per_s=served.demands[model].rate_per_s * part,
                slo_s=demand.slo_s,
                percentile=demand.percentile,
                weight=demand.weight,
                group=number,
                batch=batch,
                period_s=group.period_s,
                run_s=float(work.tables[model].planned_s[row, batch - 1]),
                lowest_per_s=lowest * served.demands[model].rate_per_s,
            )
    return tuple(found[model] for model in sorted(found))


def _lowest_scale(work: Workload, group: LaneGroup) -> float:
    """The factor on a group's rates down to which it needs all of its units."""
    alone = work.part(group.models)
    members = tuple(range(len(group.models)))

    def smaller(scale: float) -> bool:
        return Occupancy(alone, scale).units_of(members) < group.units

    return _bisect(smaller, 1e-3, 1.0) if smaller(1e-3) else 0.0


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest factor at which something holds that holds at `low`; to 2 %."""
    if holds(high):
        return high
    while high / low > 1.02:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
