"""Every run-time policy by name."""

from __future__ import annotations

from collections.abc import Callable

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.lanes import Workload
from gpu_aware_tune.planning.policy import Policy
from gpu_aware_tune.planning.pool_policies import DStackPolicy, MaxMinPolicy, MaxThroughputPolicy
from gpu_aware_tune.planning.reserving import ReservationPolicy
from gpu_aware_tune.planning.schedule import Plan
from gpu_aware_tune.planning.static_policies import TemporalPolicy, equal_shares, gslice

BASELINES: dict[str, Callable[[Workload], Policy]] = {
    "temporal-fifo": TemporalPolicy,
    "temporal-rr": lambda work: TemporalPolicy(work, round_robin=True),
    "equal-shares": equal_shares,
    "gslice": gslice,
    "d-stack": DStackPolicy,
    "d-stack-knee": lambda work: DStackPolicy(work, at_knee=True),
    "max-min": MaxMinPolicy,
    "max-throughput": MaxThroughputPolicy,
}
PLAN = ReservationPolicy.name
POLICIES = (PLAN, *BASELINES)


def make_policy(name: str, work: Workload, plan: Plan) -> Policy:
    """A fresh policy by its name; only that of the plan looks at the plan.

    Raises:
        UserError: there is none of that name.
    """
    if name == PLAN:
        return ReservationPolicy(work, plan)
    if name not in BASELINES:
        raise UserError(f"--policy {name!r} is not known; allowed: {', '.join(POLICIES)}")
    return BASELINES[name](work)
