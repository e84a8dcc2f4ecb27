"""Run-time policies and their simulator: what is known exactly, and what no policy may do."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from plan_instances import GPU, INSTANCES, curve, instance, scaled

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.arrivals import Arrivals, merge, parse_arrivals
from gpu_aware_tune.planning.bounds import goodput_bound
from gpu_aware_tune.planning.demand import Demand
from gpu_aware_tune.planning.device import PlanDevice
from gpu_aware_tune.planning.interference import Interference
from gpu_aware_tune.planning.lanes import Workload
from gpu_aware_tune.planning.outcome import Outcome, jain_index
from gpu_aware_tune.planning.planner import plan_workload, workload
from gpu_aware_tune.planning.policies import POLICIES, make_policy
from gpu_aware_tune.planning.policy import Decision, Queues, Refusal, RunTimes, Start, State
from gpu_aware_tune.planning.pool_policies import by_efficacy, by_throughput
from gpu_aware_tune.planning.reserving import ReservationPolicy
from gpu_aware_tune.planning.simulator import curve_durations, draw_arrivals, simulate
from gpu_aware_tune.planning.static_policies import TemporalPolicy, gslice
from gpu_aware_tune.planning.timeline import Timeline

POISSON = parse_arrivals("poisson")
UNIFORM = parse_arrivals("uniform")


def mix(load: float) -> Workload:
    """Three models, at a part of what the plan holds."""
    demands = [Demand("a", 100, 0.025), Demand("b", 50, 0.05), Demand("c", 20, 0.1, weight=2.0)]
    curves = [curve("a", GPU, 0.2, 10), curve("b", GPU, 0.4, 28), curve("c", GPU, 0.5, 55)]
    work = workload(GPU, demands, curves)
    return scaled(work, load * plan_workload(work).headroom)


def run(name: str, work: Workload, seconds: float = 3.0, kind: Arrivals = POISSON) -> Outcome:
    policy = make_policy(name, work, plan_workload(work, why=False))
    return simulate(policy, work, draw_arrivals(work, kind, seconds), seconds)


def test_waiting_times_are_those_of_queueing_theory() -> None:
    """One server, Poisson arrivals, constant service: Pollaczek and Khinchine's mean wait."""
    device = PlanDevice("one", 8)
    flat = curve("m", device, knee=0.1, run_ms=10, fixed=1.0)
    one = dataclasses.replace(flat, points=tuple(p for p in flat.points if p.batch == 1))
    for load in (0.3, 0.7):
        work = workload(device, [Demand("m", 100 * load, 100.0)], [one])
        streams = draw_arrivals(work, POISSON, 600, seed=1)
        steady = curve_durations(work, noise=False)
        outcome = simulate(TemporalPolicy(work), work, streams, 600, steady)
        wait_s = float(outcome.models[0].latency_s.mean()) - 0.01
        assert wait_s == pytest.approx(0.01 * load / (2 * (1 - load)), rel=0.06)
        assert outcome.utilisation == pytest.approx(load, rel=0.03)


def test_within_the_plan_nothing_is_late() -> None:
    """Even arrivals at all that the plan holds, runs of the measured p90: no miss, no refusal."""
    for seed in range(max(INSTANCES // 8, 5)):
        work = instance(seed)
        work = dataclasses.replace(
            work, demands=tuple(dataclasses.replace(d, cv=0.0) for d in work.demands)
        )
        made = plan_workload(work, why=False)
        if not made.headroom:
            continue
        work = scaled(work, 0.999 * made.headroom)
        made = plan_workload(work, why=False)
        seconds = 30 * max(demand.slo_s for demand in work.demands)
        streams = draw_arrivals(work, UNIFORM, seconds, seed)
        rows = {width: place for place, width in enumerate(work.device.widths)}

        def p90_s(start: Start, _: object, work: Workload = work, rows=rows) -> float:  # type: ignore[no-untyped-def]
            return float(work.tables[start.model].p90_s[rows[start.units], start.batch - 1])

        outcome = simulate(ReservationPolicy(work, made), work, streams, seconds, p90_s)
        assert [model.attainment for model in outcome.models] == [1.0] * len(work), seed


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_is_answered_or_refused_and_no_bound_is_passed(name: str) -> None:
    for load in (0.5, 1.3):
        work = mix(load)
        streams = draw_arrivals(work, POISSON, 3.0)
        outcome = simulate(make_policy(name, work, plan_workload(work)), work, streams, 3.0)
        for model, stream in zip(outcome.models, streams, strict=True):
            assert len(model.latency_s) + model.refused == len(stream) == model.offered
            assert model.good <= len(model.latency_s)
        assert 0 < outcome.utilisation <= 1.05  # the last runs end after the arrivals
        assert outcome.goodput_per_s <= goodput_bound(scaled(work, 1.5)).value * 1.05


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_load_gives_the_same_outcome(name: str) -> None:
    work = mix(0.9)
    assert run(name, work).as_dict() == run(name, work).as_dict()


def test_the_plan_serves_more_than_the_baselines() -> None:
    work = mix(1.2)
    good = {name: run(name, work, 4.0).goodput_per_s for name in POLICIES}
    ours = good.pop("plan")
    assert ours > max(good.values())
    assert ours > 1.15 * good["d-stack"]
    assert ours > 2 * max(good["temporal-fifo"], good["temporal-rr"])


def test_weights_decide_who_is_served_when_not_all_can_be() -> None:
    work = mix(1.0)
    heavy = [dataclasses.replace(d, weight=50.0 if d.model == "c" else 1.0) for d in work.demands]
    work = scaled(dataclasses.replace(work, demands=tuple(heavy)), 2.0)
    from gpu_aware_tune.planning.schedule import PlanObjective

    made = plan_workload(work, PlanObjective.GOODPUT, why=False)
    outcome = simulate(ReservationPolicy(work, made), work, draw_arrivals(work, POISSON, 3.0), 3.0)
    assert outcome.models[2].attainment > 0.9
    assert min(model.attainment for model in outcome.models) < 0.8


def test_a_policy_that_takes_what_is_not_free_is_caught() -> None:
    work = mix(0.5)

    class Greedy:
        name = "greedy"
        lanes: tuple[int, ...] | None = (132,)

        def decide(self, state: State, now_s: float) -> Decision:
            model = next((m for m, queue in enumerate(state.queues) if queue), None)
            return Decision() if model is None else Decision((Start(model, 2, 132, 0),))

    with pytest.raises(AssertionError, match="greedy cannot do Start"):
        simulate(Greedy(), work, draw_arrivals(work, POISSON, 1.0), 1.0)


def test_an_answer_after_its_deadline_is_not_good() -> None:
    """Runs that take three times as long as planned: the policy starts them, and they are late."""
    work = mix(0.5)
    steady = curve_durations(work, noise=False)
    outcome = simulate(
        ReservationPolicy(work, plan_workload(work)),
        work,
        draw_arrivals(work, POISSON, 2.0),
        2.0,
        lambda start, beside: 3 * steady(start, beside),
    )
    for model, demand in zip(outcome.models, work.demands, strict=True):
        assert model.good == (model.latency_s <= demand.slo_s + 1e-9).sum()
        assert model.good < len(model.latency_s)


def test_interference_slows_runs_beside_others() -> None:
    work = mix(0.6)
    made = plan_workload(work)
    streams = draw_arrivals(work, POISSON, 3.0)
    outcomes = [
        simulate(
            ReservationPolicy(work, made), work, streams, 3.0,
            curve_durations(work, Interference(factor)),
        )
        for factor in (1.0, 1.5)
    ]  # fmt: skip
    assert outcomes[1].utilisation > 1.2 * outcomes[0].utilisation


def test_decisions_are_made_of_what_is_waiting() -> None:
    state = State([deque([1.0, 2.0, 3.0, 4.0])], [0.0], [True], 0)
    queues = Queues(state)
    queues.refuse_before(0, 2.5, keep=1)
    assert (queues.waiting, queues.deadline(0)) == ([2], 3.0)
    queues.start(Start(0, 1, 8, 0))
    assert queues.actions == [Refusal(0, 2), Start(0, 1, 8, 0)]
    assert queues.deadline(0) == 4.0
    queues.refuse_before(0, 99.0, keep=1)
    assert queues.waiting == [1]
    assert len(state.queues[0]) == 4  # the driver takes them out


def test_a_request_that_cannot_be_answered_in_time_is_refused_at_once() -> None:
    work = mix(0.5)
    policy = ReservationPolicy(work, plan_workload(work))
    lanes = len(policy.lanes or ())
    state = State([deque([0.001]), deque(), deque()], [0.0] * lanes, [True] * lanes, 0)
    assert policy.decide(state, 0.0).actions == (Refusal(0, 1),)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "plan"])
def test_what_fits_no_batch_is_not_refused_while_there_is_time(name: str) -> None:
    """Where the largest batch is smaller than the one that a policy would like."""
    device = PlanDevice("one", 8)
    full = curve("m", device, knee=0.1, run_ms=10)
    small = dataclasses.replace(full, points=tuple(p for p in full.points if p.batch <= 4))
    work = workload(device, [Demand("m", 100, 1000.0)], [small])
    policy = make_policy(name, work, plan_workload(work, why=False))
    lanes = len(policy.lanes or ())
    state = State([deque([1000.0] * 40)], [0.0] * lanes, [True] * lanes, 0 if lanes else 8)
    actions = policy.decide(state, 0.0).actions
    assert any(isinstance(action, Start) for action in actions)
    assert not any(isinstance(action, Refusal) for action in actions)


def test_the_timeline_repeats_and_moves() -> None:
    work = mix(0.8)
    made = plan_workload(work)
    timeline = Timeline(made, RunTimes(work))
    lane, slots = 0, made.lanes[0].slots
    assert [timeline.start_s(lane, ahead) for ahead in range(len(slots) + 1)] == pytest.approx(
        [slot.start_s for slot in slots] + [slots[0].start_s + made.lanes[0].cycle_s]
    )
    timeline.advance(lane, len(slots))
    timeline.pull(lane, 0.001)
    first_s = slots[0].start_s + made.lanes[0].cycle_s - 0.001
    assert timeline.start_s(lane) == pytest.approx(first_s)
    timeline.skip_idle(lane, first_s + 2.5 * made.lanes[0].cycle_s)
    assert timeline.start_s(lane) == pytest.approx(first_s + 2 * made.lanes[0].cycle_s)


def test_d_stack_and_gslice_choose_as_their_papers_say() -> None:
    work = mix(1.0)
    for demand, table in zip(work.demands, work.tables, strict=True):
        units, batch = by_efficacy(demand, table)
        line = {
            (width, size): size / (run_s**2 * width)
            for width, row in zip(table.widths, table.planned_s, strict=True)
            for size, run_s in enumerate(row, 1)
            if 2 * run_s <= demand.slo_s and run_s + size / demand.rate_per_s <= demand.slo_s
        }
        assert line[units, batch] == pytest.approx(max(line.values()))
        width, size = by_throughput(demand, table)
        run_s = table.planned_s[table.row(width), size - 1]
        assert size / (run_s * width) >= batch / (
            table.planned_s[table.row(units), batch - 1] * units
        )
    shares = gslice(work).lanes
    assert shares is not None
    assert sum(shares) <= 132
    assert all(share <= width for share, width in zip(shares, (32, 56, 72), strict=True))


@pytest.mark.parametrize(
    ("text", "cv"),
    [("uniform", 0.0), ("poisson", 1.0), ("gamma:4", 4.0), ("gamma:0.5", 0.5)],
)
def test_arrivals_have_their_rate_and_burstiness(text: str, cv: float) -> None:
    times = parse_arrivals(text).draw(50, 4000, np.random.default_rng(3))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(50 * 4000, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1, abs=0.01)
    assert (gaps >= 0).all()
    assert times[0] >= 0 and times[-1] < 4000


def test_a_square_wave_has_two_rates_and_a_trace_keeps_its_shape(tmp_path: Path) -> None:
    times = parse_arrivals("square:3:2").draw(100, 1000, np.random.default_rng(0))
    high = ((times % 2) < 1).sum()
    assert len(times) == pytest.approx(100_000, rel=0.03)
    assert high / (len(times) - high) == pytest.approx(3, rel=0.05)
    path = tmp_path / "trace.txt"
    path.write_text("10\n10.5\n11\n13\n")
    trace = parse_arrivals(str(path))
    assert trace.trace_s == (0, 0.5, 1.0, 3.0)
    drawn = trace.draw(8, 100, np.random.default_rng(0))
    assert len(drawn) == pytest.approx(800, abs=8)
    assert sorted(set(np.round(np.diff(drawn), 6))) == pytest.approx(
        [1 / 16, 1 / 8, 1 / 4], rel=0.01
    )


@pytest.mark.parametrize(
    "text", ["normal", "gamma", "gamma:0", "gamma:4:5", "square:0.5", "square:2:0", "gamma:1.2.3"]
)
def test_unknown_arrivals_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--arrivals .* is not known; allowed: poisson"):
        parse_arrivals(text)


@pytest.mark.parametrize("text", ["1\n", "1\nx\n", "2\n2\n", "1\nnan\n"])
def test_traces_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"trace\.txt"):
        parse_arrivals(str(path))


def test_streams_are_merged_in_order() -> None:
    assert merge([np.asarray([1.0, 3.0]), np.asarray([2.0])]) == ([1.0, 2.0, 3.0], [0, 1, 0])


def test_fairness_is_jains() -> None:
    assert jain_index([1, 1, 1]) == pytest.approx(1)
    assert jain_index([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain_index([0, 0]) == 1


def test_an_unknown_policy_is_refused() -> None:
    work = mix(0.5)
    with pytest.raises(UserError, match=r"--policy 'edf' is not known; allowed: plan, "):
        make_policy("edf", work, plan_workload(work))


def test_fifty_thousand_requests_take_seconds() -> None:
    work = mix(0.9)
    seconds = 5e4 / sum(demand.rate_per_s for demand in work.demands)
    start = time.process_time()
    outcome = run("plan", work, seconds)
    assert sum(model.offered for model in outcome.models) == pytest.approx(5e4, rel=0.02)
    assert time.process_time() - start < 6  # a million in a minute, on a machine half as fast
    assert math.isfinite(outcome.models[0].latency_at(99))
