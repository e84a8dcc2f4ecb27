"""What an engine carries out: the plan for its models at some rates, and the policy for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.curve import MARGIN, Batching
from gpu_aware_tune.planning.curve_file import MeasuredCurve
from gpu_aware_tune.planning.demand import Demand
from gpu_aware_tune.planning.device import PlanDevice
from gpu_aware_tune.planning.lanes import Workload
from gpu_aware_tune.planning.planner import plan_workload, workload
from gpu_aware_tune.planning.policies import make_policy
from gpu_aware_tune.planning.policy import Policy, RunTimes
from gpu_aware_tune.planning.reserving import ReservationPolicy
from gpu_aware_tune.planning.schedule import Plan
from gpu_aware_tune.serving.dispatcher import Layout
from gpu_aware_tune.serving.lanes import LanePool
from gpu_aware_tune.serving.model_queue import ModelQueue


@dataclass(frozen=True)
class EnginePlan:
    """A workload, its plan, and the policy's name."""

    work: Workload
    plan: Plan
    policy: str

    def layout(self, queues: Sequence[ModelQueue], pool: LanePool) -> Layout:
        """The plan with a fresh policy on real lanes, which are prepared."""
        policy = self.fresh_policy()
        lanes = None if policy.lanes is None else tuple(pool.side_by_side(policy.lanes))
        for lane in lanes or ():
            lane.prepare(queue.model for queue in queues)
        work, times = self.work, RunTimes(self.work)

        def median_s(model: int, units: int, rows: int) -> float:
            table = work.tables[model]
            return float(table.median_s[table.row(units), rows - 1])

        fastest_s = tuple(times.fastest_s)
        return Layout(policy, tuple(queues), lanes, times.run_s, median_s, fastest_s)

    def fresh_policy(self) -> Policy:
        """The policy, with nothing remembered."""
        if self.policy == ReservationPolicy.name:
            return ReservationPolicy(self.work, self.plan)
        return make_policy(self.policy, self.work, self.plan)


def make_engine_plan(
    device: PlanDevice,
    demands: Sequence[Demand],
    curves: Mapping[str, MeasuredCurve],
    policy: str,
    margin: float = MARGIN,
) -> EnginePlan:
    """Plan; batch sizes are compiled in, so a batch in between runs padded.

    Raises:
        UserError: an SLO cannot be met, or there is no such policy.
    """
    work = workload(
        device, demands, [curves[demand.model] for demand in demands], margin, Batching.PADDED
    )
    planned = EnginePlan(work, plan_workload(work, margin=margin, why=False), policy)
    planned.fresh_policy()
    return planned


def with_plan(planned: EnginePlan, plan: Plan, source: str) -> EnginePlan:
    """The same with another plan.

    Raises:
        UserError: it is for another device, or for other models.
    """
    device, own = plan.device, planned.work.device
    if (device.units, device.unit) != (own.units, own.unit):
        raise UserError(
            f"{source} is a plan for {device.count(device.units)}, this engine has"
            f" {own.count(own.units)}: plan for those"
        )
    names = [demand.model for demand in planned.work.demands]
    by_name = {model.model: model for model in plan.models}
    if sorted(by_name) != sorted(names):
        raise UserError(
            f"{source} is a plan for {', '.join(sorted(by_name))}; this engine serves"
            f" {', '.join(sorted(names))}"
        )
    ordered = tuple(by_name[name] for name in names)
    return EnginePlan(
        planned.work, dataclasses.replace(plan, models=ordered), ReservationPolicy.name
    )


def scaled(curve: MeasuredCurve, factor: float) -> MeasuredCurve:
    """A curve whose runs take so many times as long."""
    points = tuple(
        dataclasses.replace(
            point, latency_ms=factor * point.latency_ms, p90_ms=factor * point.p90_ms
        )
        for point in curve.points
    )
    return dataclasses.replace(curve, points=points)
