"""The planner: what every plan keeps, how far it is from the best, and what it says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time

import numpy as np
import pytest
from plan_instances import GPU, INSTANCES, curve, instance, scaled

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.bounds import goodput_bound, headroom_bound
from gpu_aware_tune.planning.branching import best_grouping, branch_and_bound, refined
from gpu_aware_tune.planning.demand import Demand
from gpu_aware_tune.planning.device import PlanDevice
from gpu_aware_tune.planning.exact import exact_grouping, optimal_headroom
from gpu_aware_tune.planning.grouping import merged
from gpu_aware_tune.planning.interference import Interference
from gpu_aware_tune.planning.lanes import Occupancy, Workload
from gpu_aware_tune.planning.placement import place
from gpu_aware_tune.planning.planner import plan, plan_workload, workload
from gpu_aware_tune.planning.schedule import Plan, PlanObjective, check_plan, plan_from_dict
from gpu_aware_tune.planning.search import RATIO, largest_scale, scale_at


def check_promises(made: Plan, work: Workload) -> None:
    """Everything that a plan promises, from its slots alone."""
    check_plan(made, "plan")  # lanes disjoint, slots within their cycles
    tables = {table.model: table for table in work.tables}
    for model, demand in zip(made.models, work.demands, strict=True):
        assert model.worst_case_s <= demand.slo_s + 1e-9
        if not model.batch:
            assert (model.served_per_s, model.group, made.headroom) == (0, -1, 0)
            continue
        served = dataclasses.replace(demand, rate_per_s=model.served_per_s)
        assert model.batch >= served.batch_for(model.period_s)
        assert model.served_per_s <= demand.rate_per_s * (1 + 1e-9)
        starts = []
        for lane in made.lanes:
            for slot in lane.slots:
                if slot.model == model.model:
                    table = tables[slot.model]
                    planned_s = table.planned_s[table.row(lane.units), slot.batch - 1]
                    assert slot.length_s == pytest.approx(planned_s)
                    starts += [slot.start_s + number * lane.cycle_s for number in range(2)]
        gaps = np.diff(sorted(starts))
        assert gaps == pytest.approx(np.full(len(gaps), model.period_s), rel=1e-6, abs=1e-9)


def test_every_plan_keeps_its_promises() -> None:
    for seed in range(INSTANCES):
        work = instance(seed)
        for objective in PlanObjective:
            check_promises(plan_workload(work, objective, why=False), work)


def test_more_units_never_mean_less_headroom() -> None:
    for seed in range(INSTANCES):
        work = instance(seed)
        device = work.device
        fewer = dataclasses.replace(device, units=device.units - device.step)
        rows = [device.widths.index(width) for width in fewer.widths if width in device.widths]
        if len(rows) < len(fewer.widths):
            continue  # the widest lane of the smaller device is none of the larger one's
        tables = tuple(
            dataclasses.replace(
                table,
                widths=fewer.widths,
                median_s=table.median_s[rows],
                p90_s=table.p90_s[rows],
                planned_s=table.planned_s[rows],
            )
            for table in work.tables
        )
        smaller = Workload(fewer, work.demands, tables)
        if not all(t.fastest_s < d.slo_s for t, d in zip(tables, work.demands, strict=True)):
            continue
        one, two = largest_scale(smaller), largest_scale(work)
        assert one is None or (two is not None and two[0] >= one[0]), seed


def test_headroom_is_next_to_the_best_over_all_partitions_and_periods() -> None:
    gaps = []
    for seed in range(INSTANCES):
        work = instance(seed)
        best = optimal_headroom(work)
        found = plan_workload(work, why=False).headroom
        assert (found == 0) == (best == 0)
        if best:
            assert found <= best * RATIO**2
            gaps.append(1 - found / best)
    assert statistics.median(gaps) < 0.01
    assert max(gaps) < 0.05


def test_many_models_are_near_the_best_too() -> None:
    """The heuristic for large sets, on sets that are small enough to know the best."""
    gaps = []
    for seed in range(max(INSTANCES // 4, 12)):
        load = Occupancy(scaled(instance(seed, 10), 0.4))
        best = exact_grouping(load).units
        if np.isfinite(best):
            gaps.append(refined(load, merged(load), 0.0).units / best - 1)
    assert statistics.median(gaps) < 0.01
    assert max(gaps) < 0.15


def test_branch_and_bound_dynamic_programme_and_mixed_integer_programme_agree() -> None:
    milp = pytest.importorskip("scipy.optimize").milp
    from scipy.optimize import LinearConstraint

    for seed in range(max(INSTANCES // 6, 10)):
        load = Occupancy(scaled(instance(seed, 5), 0.4))
        groups = [g for size in range(1, 6) for g in itertools.combinations(range(5), size)]
        needs = [load.units_of(group) for group in groups]
        usable = [(g, n) for g, n in zip(groups, needs, strict=True) if np.isfinite(n)]
        found = branch_and_bound(load)
        assert found.units == exact_grouping(load).units
        covers = np.asarray([[model in g for g, _ in usable] for model in range(5)], dtype=float)
        if not covers.any(axis=1).all():
            assert found.units == np.inf
            continue
        answer = milp(
            [need for _, need in usable],
            constraints=LinearConstraint(covers, 1, 1),
            integrality=np.ones(len(usable)),
            bounds=(0, 1),
        )
        assert answer.fun == pytest.approx(found.units)
        assert sorted(m for group in found.partition for m in group) == list(range(5))


def test_branch_and_bound_cuts_nothing_that_is_better() -> None:
    for seed in range(max(INSTANCES, 40)):
        for scale in (0.2, 0.6):
            load = Occupancy(scaled(instance(seed, 7), scale))
            assert branch_and_bound(load).units == exact_grouping(load).units, (seed, scale)


def test_enough_is_enough() -> None:
    load = Occupancy(scaled(instance(3, 6), 0.3))
    best = best_grouping(load).units
    assert best <= best_grouping(load, enough=2 * best).units <= 2 * best


def test_no_plan_passes_the_bounds() -> None:
    for seed in range(max(INSTANCES // 3, 10)):
        work = instance(seed)
        work = dataclasses.replace(
            work, demands=tuple(dataclasses.replace(d, cv=0.0) for d in work.demands)
        )
        made = plan_workload(work, PlanObjective.GOODPUT, why=False)
        bound = headroom_bound(work).value
        assert made.headroom <= bound * (1 + 1e-6)
        assert bound <= made.headroom_limit * (1 + 1e-6)
        worth = sum(model.served_per_s * model.weight for model in made.models)
        assert worth <= goodput_bound(work, planned=True).value * (1 + 1e-6)


def test_goodput_serves_no_less_than_all_alike() -> None:
    for seed in range(max(INSTANCES // 3, 10)):
        work = instance(seed)
        headroom = plan_workload(work, why=False).headroom
        if not headroom:
            continue
        work = scaled(work, 1.5 * headroom)
        worth = [
            sum(m.served_per_s * m.weight for m in plan_workload(work, kind, why=False).models)
            for kind in (PlanObjective.HEADROOM, PlanObjective.GOODPUT)
        ]
        assert worth[1] >= worth[0] * 0.999


def test_the_fewest_units_serve_the_rates_and_fewer_do_not() -> None:
    work = scaled(instance(1), 0.2)
    made = plan_workload(work, PlanObjective.UNITS)
    assert made.fits
    assert made.units_used == best_grouping(Occupancy(work)).units
    assert all(0 <= model.lowest_per_s <= model.rate_per_s for model in made.models)


def demand(name: str, rate: float, slo_ms: float, **more: float) -> Demand:
    return Demand(name, rate, 1e-3 * slo_ms, **more)


def test_one_model_alone_is_served_as_the_formula_says() -> None:
    """Constant 10 ms a batch of up to 16 on one width, SLO 30 ms: two batches every 20 ms."""
    device = PlanDevice("one", 8)
    flat = curve("m", device, knee=0.1, run_ms=10, fixed=1.0)
    work = workload(device, [demand("m", 100, 30)], [flat], margin=1.0)
    made = plan_workload(work)
    run_s = 10e-3 * 1.03
    assert made.headroom * 100 == pytest.approx(16 / run_s, rel=2e-3)  # back to back
    assert made.models[0].worst_case_s == pytest.approx(2 * run_s, rel=2e-3)
    # A run may take half of the SLO; here it would take more.
    with pytest.raises(UserError, match=r"slo 20ms of m is below .* on 8 SMs, 20\.6 ms"):
        workload(device, [demand("m", 100, 20)], [flat], margin=1.0)


def test_models_that_never_fit_together_are_told_apart() -> None:
    """Each needs the whole device to meet its SLO, at any rate."""
    device = PlanDevice("one", 8)
    curves = [curve(name, device, knee=0.1, run_ms=10, fixed=1.0) for name in "ab"]
    made = plan(device, [demand("a", 1, 30), demand("b", 1, 30, weight=2.0)], curves)
    assert [model.served_per_s > 0 for model in made.models] == [False, True]
    assert not made.fits
    assert made.reason is not None and "a: 1 requests/s" in made.reason
    assert place(workload(device, [demand("a", 1, 30), demand("b", 1, 30)], curves)).devices == (
        ((0, 1.0),),
        ((1, 1.0),),
    )


def test_interference_and_margin_cost_headroom() -> None:
    demands = [demand("a", 50, 50), demand("b", 50, 100)]
    curves = [curve("a", GPU), curve("b", GPU)]
    free = plan(GPU, demands, curves).headroom
    assert plan(GPU, demands, curves, margin=1.3).headroom < 0.95 * free
    worse = Interference(pairs={("a", "b"): 1.3})
    assert plan(GPU, demands, curves, interference=worse).headroom < 0.97 * free
    with pytest.raises(UserError, match=r"interference 0\.5 of every pair"):
        Interference(0.5)


def test_planning_is_quick_and_pure() -> None:
    work = instance(5, 8)
    assert plan_workload(work, why=False) == plan_workload(work, why=False)
    twenty = workload(
        GPU,
        [demand(f"m{n}", 20 + n, 25 * (1 + n % 4)) for n in range(20)],
        [curve(f"m{n}", GPU, 0.2 + 0.02 * n, 8 + n / 2) for n in range(20)],
    )
    taken = []
    for _ in range(3):
        start = time.process_time()
        plan_workload(twenty, why=False)
        taken.append(time.process_time() - start)
    assert min(taken) < 0.15, taken  # about 0.05 on a machine that does nothing else


def test_what_does_not_fit_says_why_and_what_would_help() -> None:
    demands = [demand("a", 400, 50), demand("b", 100, 50), demand("c", 800, 100, weight=0.5)]
    curves = [curve("a", GPU), curve("b", GPU), curve("c", GPU, run_ms=40)]
    made = plan(GPU, demands, curves)
    assert not made.fits
    assert made.reason is not None
    assert made.reason.startswith("c: 800 requests/s within 100 ms at p99 need")
    assert any("a device of this kind with" in text for text in made.helps) or (
        "more than 132 SMs" in made.reason
    )
    assert any(text.endswith("devices of this kind") for text in made.helps)
    assert plan(GPU, demands, curves, why=False).reason is None


def test_a_model_that_fills_the_device_alone_is_named() -> None:
    made = plan(GPU, [demand("a", 1e5, 50), demand("b", 1, 50)], [curve(n, GPU) for n in "ab"])
    assert made.reason is not None
    assert made.reason == "a: 100000 requests/s within 50 ms at p99 need more than 132 SMs"


def test_a_looser_slo_and_a_missing_library_are_told() -> None:
    whole = curve("a", GPU, knee=1.0)
    # Libraries for 88 and 132 units only, and 88 are too few: it would take the whole device.
    few = dataclasses.replace(whole, points=tuple(p for p in whole.points if p.units in (88, 132)))
    demands = [demand("a", 10, 20), demand("b", 100, 50, weight=2.0)]
    made = plan(GPU, demands, [few, curve("b", GPU)])
    assert not made.fits
    assert any("a library of a tuned at 96 SMs" in text for text in made.helps), made.helps
    assert any(text in ("an SLO of 20 ms for a", "an SLO of 21 ms for a") for text in made.helps), (
        made.helps
    )


@pytest.mark.parametrize(
    ("demands", "names", "message"),
    [
        ([], "a", "there is no model to plan"),
        ([demand("a", 1, 50), demand("a", 1, 50)], "a", "a is asked for twice"),
        ([demand("b", 1, 50)], "a", r"there is no curve of b \(curves: a\)"),
        ([demand("a", 1, 5)], "a", r"slo 5ms of a is below the best .* on 132 SMs, 13 ms"),
    ],
)
def test_what_cannot_be_planned_is_refused(demands: list[Demand], names: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(GPU, demands, [curve(name, GPU) for name in names])


def test_a_model_without_a_usable_library_is_refused() -> None:
    wide = curve("a", PlanDevice("GPU", 264))
    wide = dataclasses.replace(wide, points=tuple(p for p in wide.points if p.units > 132))
    with pytest.raises(UserError, match=r"a has no library for 132 SMs or fewer \(its narrowest"):
        plan(GPU, [demand("a", 1, 50)], [wide])
    with pytest.raises(UserError, match=r"--margin 0\.5"):
        plan(GPU, [demand("a", 1, 50)], [curve("a", GPU)], margin=0.5)


def test_models_are_placed_on_few_devices() -> None:
    for seed in range(8):
        work = scaled(instance(seed, 6), 3.0)
        placement = place(work)
        assert len(placement.devices) >= placement.least_devices >= 1
        assert len(placement.devices) <= 2 * placement.least_devices + 1
        parts = [0.0] * 6
        for number, placed in enumerate(placement.devices):
            assert plan_workload(placement.workload(work, number), why=False).fits
            for model, part in placed:
                parts[model] += part
        assert parts == pytest.approx([1.0] * 6)


def test_a_plan_is_read_back_and_a_broken_one_is_not() -> None:
    made = plan_workload(instance(2))
    facts = json.loads(json.dumps(made.as_dict()))
    assert plan_from_dict(facts, "plan.json") == made
    for breaking, message in (
        ({"format": 9}, "format 9"),
        ({"lanes": [*facts["lanes"], facts["lanes"][0]]}, "overlaps"),
        ({"headroom": None}, "is no plan"),
        ({"models": [{**facts["models"][0], "slo_s": 1e-6}]}, "cannot meet its SLO"),
    ):
        with pytest.raises(UserError, match=message):
            plan_from_dict({**facts, **breaking}, "plan.json")
    with pytest.raises(UserError, match=r"is no plan \(no lanes\)"):
        plan_from_dict({"format": 1}, "plan.json")


def test_scales_are_the_same_for_equal_problems() -> None:
    work = instance(4)
    found = largest_scale(work)
    assert found is not None
    step, grouping = found
    assert Occupancy(work, scale_at(step)).units(
        np.asarray([Occupancy(work, scale_at(step)).busy[list(g)].sum(axis=0) for g in grouping.partition])
    ).sum() <= work.device.units  # fmt: skip
