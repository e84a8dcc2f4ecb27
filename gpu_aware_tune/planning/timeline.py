"""The reservations of a plan over time: when each lane's next slots start, and how late they may."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpu_aware_tune.planning.policy import RunTimes
from gpu_aware_tune.planning.schedule import Plan


@dataclass(frozen=True, slots=True)
class Reservation:
    """A slot of a lane's cycle.

    Args:
        model: its position in the workload.
        batch: the most requests that it takes.
        offset_s: its start, from the start of the plan.
        run_s: planned length.
        usual_s: planned length of a run with as many requests as the demand has in a period.
        slack_s: how late it may start without breaking the SLO of any request.
    """

    model: int
    batch: int
    offset_s: float
    run_s: float
    usual_s: float
    slack_s: float


class Timeline:
    """Where every lane stands in its cycle.

    Args:
        plan: whose slots these are. Its models are in the order of the workload.
        times: planned seconds of runs.

    `next_s` has the start of each lane's next slot.
    """

    def __init__(self, plan: Plan, times: RunTimes) -> None:
        places = {model.model: place for place, model in enumerate(plan.models)}
        slack = [model.slo_s - model.worst_case_s for model in plan.models]
        self.group = [lane.group for lane in plan.lanes]
        self.members = [plan.group_lanes(lane.group) for lane in plan.lanes]
        usual = [
            min(model.batch, max(1, math.ceil(model.served_per_s * model.period_s - 1e-7)))
            for model in plan.models
        ]
        self.slots: list[list[Reservation]] = [
            [
                Reservation(
                    model=place,
                    batch=slot.batch,
                    offset_s=slot.start_s,
                    run_s=slot.length_s,
                    usual_s=times.run_s(place, lane.units, usual[place]),
                    slack_s=slack[place],
                )
                for slot in lane.slots
                for place in [places[slot.model]]
            ]
            for lane in plan.lanes
        ]
        self.period_s = [lane.cycle_s / len(plan.group_lanes(lane.group)) for lane in plan.lanes]
        self._cycle_s = [lane.cycle_s for lane in plan.lanes]
        self._next = [0] * len(plan.lanes)
        self._earlier_s = [0.0] * (max(self.group) + 1)
        self.next_s = [self.start_s(lane) for lane in range(len(plan.lanes))]

    def start_s(self, lane: int, ahead: int = 0) -> float:
        """When a lane's next slot starts, or the one so many slots later; never for a spare lane."""
        slots = self.slots[lane]
        if not slots:
            return math.inf
        cycle, place = divmod(self._next[lane] + ahead, len(slots))
        return (
            slots[place].offset_s + cycle * self._cycle_s[lane] - self._earlier_s[self.group[lane]]
        )

    def slot(self, lane: int, ahead: int = 0) -> Reservation:
        """A lane's next slot, or the one so many slots later."""
        slots = self.slots[lane]
        return slots[(self._next[lane] + ahead) % len(slots)]

    def advance(self, lane: int, count: int = 1) -> None:
        """Go on to a lane's following slot."""
        self._next[lane] += count
        self.next_s[lane] = self.start_s(lane)

    def skip_idle(self, lane: int, now_s: float) -> None:
        """Pass over whole cycles of a lane that lie in the past."""
        behind_s = now_s - self.next_s[lane]
        if behind_s > self._cycle_s[lane] > 0:
            self.advance(lane, int(behind_s / self._cycle_s[lane]) * len(self.slots[lane]))

    def pull(self, lane: int, seconds: float) -> None:
        """Move all lanes of a lane's group to an earlier time: no run starts later for that."""
        self._earlier_s[self.group[lane]] += seconds
        for member in self.members[lane]:
            self.next_s[member] = self.start_s(member)
