"""The policy that carries out a plan: reservations first, then whatever fits before them.

A model of a lane group is due one period after its last start. When a lane is idle it starts, in this
order,

1. the model of its group that has been due longest;
2. a model of its group before it is due, if every reservation of the group can still be kept;
3. the batch of another group with the least slack whose own lanes are busy, under the same condition.

A batch is as large as the earliest deadline in it allows, and at most as large as its slot. Requests
that cannot be answered in time are refused at once; while more than a batch is waiting, so are the
ones at the head that a whole batch could not answer in time, as serving them would cost the others
more. The least served model, by weight, goes first among equals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpu_aware_tune.planning.lanes import Workload
from gpu_aware_tune.planning.policy import SLACK, Decision, Queues, RunTimes, Start, State
from gpu_aware_tune.planning.schedule import Plan


@dataclass(frozen=True)
class _Reservation:
    """A model's slot in the cycle of its group."""

    group: int
    batch: int
    period_s: float
    run_s: float


class ReservationPolicy:
    """Carries out a plan.

    Args:
        work: what was planned.
        plan: its plan; lanes without slots take only what others cannot.
        steal: whether idle lanes may run models of other groups.
    """

    name = "plan"

    def __init__(self, work: Workload, plan: Plan, steal: bool = True) -> None:
        widths = tuple(lane.units for lane in plan.lanes)
        self.lanes: tuple[int, ...] | None = widths
        self._widths = widths
        self._times = RunTimes(work, widths)
        self._steal = steal
        self._lane_group = [lane.group for lane in plan.lanes]
        groups = max(self._lane_group) + 1
        self._group_lanes = [plan.group_lanes(group) for group in range(groups)]
        self._members: list[list[int]] = [[] for _ in range(groups)]
        self._slots = [
            _Reservation(model.group, model.batch, model.period_s, model.run_s)
            for model in plan.models
        ]
        for place, slot in enumerate(self._slots):
            self._members[slot.group].append(place)
        self._slo_s = [demand.slo_s for demand in work.demands]
        self._weight = [demand.weight for demand in work.demands]
        self._due_s = [-math.inf] * len(work)
        self._served = [0.0] * len(work)  # weighted unit-seconds

    def decide(self, state: State, now_s: float) -> Decision:
        """Return what to start and to refuse at `now_s`."""
        queues = Queues(state)
        if not any(queues.waiting):
            return Decision()
        for model, count in enumerate(queues.waiting):
            if count:
                queues.refuse_before(model, now_s + self._times.fastest_s[model])
        free_s = [
            now_s if idle else max(now_s, free)
            for free, idle in zip(state.lane_free_s, state.lane_idle, strict=True)
        ]
        idle = [lane for lane, free in enumerate(state.lane_idle) if free]
        left = [lane for lane in idle if not self._own(queues, free_s, lane, now_s)]
        if self._steal:
            for lane in left:
                self._foreign(queues, free_s, lane, now_s)
        waits = [
            self._due_s[model]
            for model, count in enumerate(queues.waiting)
            if count and self._due_s[model] > now_s
        ]
        return Decision(tuple(queues.actions), min(waits, default=None))

    def _own(self, queues: Queues, free_s: list[float], lane: int, now_s: float) -> bool:
        """Start a model of the lane's own group."""
        ready = [model for model in self._members[self._lane_group[lane]] if queues.waiting[model]]
        for model in sorted(ready, key=lambda model: (self._due_s[model], self._served[model])):
            if self._due_s[model] <= now_s + SLACK:
                if self._run(queues, free_s, lane, model, now_s):
                    return True
                continue
            full = queues.waiting[model] >= self._slots[model].batch
            end_s = now_s + self._times.run_s(model, self._widths[lane], self._size(queues, model))
            own_due_s = math.inf if full else now_s + self._slots[model].period_s
            if self._kept(queues, free_s, lane, end_s, model, own_due_s, now_s) and self._run(
                queues, free_s, lane, model, now_s
            ):
                return True
        return False

    def _foreign(self, queues: Queues, free_s: list[float], lane: int, now_s: float) -> bool:
        """Start a model of another group whose own lanes are busy."""
        group, width = self._lane_group[lane], self._widths[lane]
        slack: list[tuple[float, int]] = []
        for model, count in enumerate(queues.waiting):
            slot = self._slots[model]
            if not count or slot.group == group:
                continue
            latest_s = queues.deadline(model) - slot.run_s
            home_s = min(free_s[own] for own in self._group_lanes[slot.group])
            if home_s > now_s and (count >= slot.batch or latest_s < home_s):
                slack.append((latest_s, model))
        for _, model in sorted(slack):
            within_s = queues.deadline(model) - now_s
            batch = min(queues.waiting[model], self._times.largest_batch(model, width, within_s))
            if not batch:
                continue
            end_s = now_s + self._times.run_s(model, width, batch)
            if self._kept(queues, free_s, lane, end_s, model, math.inf, now_s):
                self._begin(queues, free_s, Start(model, batch, width, lane), end_s, now_s)
                return True
        return False

    def _size(self, queues: Queues, model: int) -> int:
        return min(queues.waiting[model], self._slots[model].batch)

    def _run(
        self, queues: Queues, free_s: list[float], lane: int, model: int, now_s: float
    ) -> bool:
        """Start as large a batch as slot and deadlines allow; refuse what would make it small."""
        slot, width = self._slots[model], self._widths[lane]
        if queues.waiting[model] >= slot.batch:
            queues.refuse_before(model, now_s + slot.run_s, keep=slot.batch)
        within_s = queues.deadline(model) - now_s
        batch = min(self._size(queues, model), self._times.largest_batch(model, width, within_s))
        if not batch:
            return False
        end_s = now_s + self._times.run_s(model, width, batch)
        self._begin(queues, free_s, Start(model, batch, width, lane), end_s, now_s)
        self._due_s[model] = now_s + slot.period_s
        return True

    def _begin(
        self, queues: Queues, free_s: list[float], start: Start, end_s: float, now_s: float
    ) -> None:
        assert start.lane is not None
        queues.start(start)
        free_s[start.lane] = end_s
        self._served[start.model] += (end_s - now_s) * start.units / self._weight[start.model]

    def _kept(
        self,
        queues: Queues,
        free_s: list[float],
        lane: int,
        end_s: float,
        model: int,
        own_due_s: float,
        now_s: float,
    ) -> bool:
        """Whether the lane's group can keep its reservations if the lane is busy until `end_s`.

        Each reserved model must find a lane at the latest time that its first request allows; the
        lanes are handed out in the order of these times.
        """
        group = self._lane_group[lane]
        latest: list[tuple[float, float]] = []
        for other in self._members[group]:
            run_s = self._slots[other].run_s
            if other == model:
                if own_due_s < math.inf:
                    latest.append((own_due_s, run_s))
                continue
            first_s = (
                queues.deadline(other) if queues.waiting[other] else now_s + self._slo_s[other]
            )
            latest.append((max(now_s, first_s - run_s), run_s))
        free = sorted(end_s if own == lane else free_s[own] for own in self._group_lanes[group])
        for start_s, run_s in sorted(latest):
            if free[0] > start_s + SLACK:
                return False
            free[0] += run_s
            free.sort()
        return True
