"""The policy that carries out a plan: reservations first, then whatever fits before them.

The slots of the plan repeat in absolute time. When a lane is idle it does, in this order,

1. the slot that is due, if its model has requests;
2. an extra run, as long as every later slot of the lane still starts in time for its requests: of a
   model of its own group, or of one whose own lanes are busy; the batch with the least slack first;
3. its next slot before the time, if a full batch for it is waiting; the group's slots then all move
   to that much earlier. So runs that end before their planned end are no time lost.

As long as runs take no longer than the measured p90, and the requests of a period fit their slot, no
request is late: a slot never waits longer for extra runs than its own requests can. The plan's margin
is for runs that take longer.

A batch is as large as its slot and the earliest deadline in it allow. Requests that cannot be answered
in time are refused at once; while more than a batch is waiting, so are those at the head that a whole
batch could not answer in time, as they would make it small. Among equals the model goes first that was
served least, by weight.
"""

from __future__ import annotations

import math

from gpu_aware_tune.planning.lanes import Workload
from gpu_aware_tune.planning.policy import SLACK, Decision, Queues, RunTimes, Start, State
from gpu_aware_tune.planning.schedule import Plan
from gpu_aware_tune.planning.timeline import Reservation, Timeline

_STAGGER = 1.0  # of a period by which other lanes may fall behind when slots are moved


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
        self._widths, self._steal = widths, steal
        self._times = RunTimes(work, widths)
        self._timeline = Timeline(plan, self._times)
        self._home = [plan.group_lanes(model.group) for model in plan.models]
        self._own = [
            [place for place, model in enumerate(plan.models) if model.group == lane.group]
            for lane in plan.lanes
        ]
        # A model without lanes of its own has what others leave.
        pairs = list(zip(plan.models, work.tables, strict=True))
        self._batch = [model.batch or table.largest_batch for model, table in pairs]
        self._run_s = [model.run_s or table.fastest_s for model, table in pairs]
        self._slo_s = [demand.slo_s for demand in work.demands]
        self._weight = [demand.weight for demand in work.demands]
        self._served = [0.0] * len(work)  # weighted unit-seconds
        self._expected = 1 / plan.margin  # of a planned time: what runs are expected to take
        self._started_s: float | None = None

    def decide(self, state: State, now_s: float) -> Decision:
        """Return what to start and to refuse at `now_s`."""
        queues = Queues(state)
        if not any(queues.waiting):
            return Decision()
        if self._started_s is None:
            self._started_s = now_s
        for model, count in enumerate(queues.waiting):
            if count:
                queues.refuse_before(model, now_s + self._times.fastest_s[model])
        now = _Moment(
            queues,
            now_s,
            now_s - self._started_s,
            [
                now_s if idle else max(now_s, free)
                for free, idle in zip(state.lane_free_s, state.lane_idle, strict=True)
            ],
        )
        idle = [lane for lane, free in enumerate(state.lane_idle) if free]
        next_s, due_s = self._timeline.next_s, now.at_s + SLACK
        left = [lane for lane in idle if next_s[lane] > due_s or not self._due(now, lane)]
        for attempt in (self._own_extra, self._foreign_extra, self._pull):
            if any(queues.waiting):
                left = [lane for lane in left if not attempt(now, lane)]
        return Decision(tuple(queues.actions), self._wake_s(now, left))

    def _due(self, now: _Moment, lane: int) -> bool:
        """Start the lane's slot that is due; pass over those that are due without requests."""
        timeline = self._timeline
        timeline.skip_idle(lane, now.at_s)
        while timeline.next_s[lane] <= now.at_s + SLACK:
            slot = timeline.slot(lane)
            timeline.advance(lane)
            if now.queues.waiting[slot.model] and self._start(now, lane, slot.model, slot.batch):
                return True
        return False

    def _own_extra(self, now: _Moment, lane: int) -> bool:
        """Start a run of the lane's own group that no slot is reserved for."""
        return self._extra(now, lane, self._own[lane])

    def _foreign_extra(self, now: _Moment, lane: int) -> bool:
        """Start a run of another group."""
        return self._steal and self._extra(now, lane, self._stranded(now, lane))

    def _extra(self, now: _Moment, lane: int, models: list[int]) -> bool:
        """Start a run that no slot is reserved for."""
        queues, width = now.queues, self._widths[lane]
        ready = [model for model in models if queues.waiting[model]]
        if len(ready) > 1:
            ready.sort(key=lambda m: (queues.deadline(m) - self._run_s[m], self._served[m]))
        for model in ready:
            if queues.waiting[model] < self._batch[model] and self._last_idle(now, lane):
                continue  # a small batch must not take the last lane that a burst could have
            batch = min(
                queues.waiting[model],
                self._batch[model],
                self._times.largest_batch(model, width, queues.deadline(model) - now.now_s),
            )
            while batch and not self._kept(now, lane, model, batch):
                batch //= 2
            if batch:
                return self._start(now, lane, model, batch)
        return False

    def _last_idle(self, now: _Moment, lane: int) -> bool:
        """Whether the other lanes of a lane's group are all busy, and there are others."""
        members = self._timeline.members[lane]
        idle = sum(now.free_s[other] <= now.now_s for other in members)
        return idle <= 1 < len(members)

    def _stranded(self, now: _Moment, lane: int) -> list[int]:
        """Models of other groups whose own lanes are busy while a batch or a deadline waits."""
        found = []
        for model, count in enumerate(now.queues.waiting):
            if not count or model in self._own[lane]:
                continue
            home_s = min((now.free_s[own] for own in self._home[model]), default=math.inf)
            latest_s = now.queues.deadline(model) - self._run_s[model]
            if home_s > now.now_s and (count >= self._batch[model] or latest_s < home_s):
                found.append(model)
        return found

    def _pull(self, now: _Moment, lane: int) -> bool:
        """Start the lane's next slot before its time where a full batch is waiting for it."""
        timeline = self._timeline
        start_s = timeline.next_s[lane]
        if start_s == math.inf:
            return False
        slot = timeline.slot(lane)
        if now.queues.waiting[slot.model] <= slot.batch:
            return False
        ahead_s = start_s - now.at_s
        room_s = _STAGGER * timeline.period_s[lane]
        for other in timeline.members[lane]:
            if other != lane:
                free_s = now.free_s[other] - now.now_s + now.at_s
                ahead_s = min(ahead_s, timeline.next_s[other] - free_s + room_s)
        if ahead_s < start_s - now.at_s - SLACK:
            return False
        timeline.advance(lane)
        if not self._start(now, lane, slot.model, slot.batch):
            return False
        timeline.pull(lane, ahead_s)
        return True

    def _start(self, now: _Moment, lane: int, model: int, most: int) -> bool:
        """Start as large a batch as slot and deadlines allow; refuse what would make it small."""
        queues, width = now.queues, self._widths[lane]
        if queues.waiting[model] >= most:
            run_s = self._times.run_s(model, width, most)
            queues.refuse_before(model, now.now_s + run_s, keep=most)
        within_s = queues.deadline(model) - now.now_s
        batch = min(queues.waiting[model], most, self._times.largest_batch(model, width, within_s))
        if not batch:
            return False
        run_s = self._times.run_s(model, width, batch)
        queues.start(Start(model, batch, width, lane))
        now.free_s[lane] = now.now_s + run_s
        self._served[model] += run_s * width / self._weight[model]
        return True

    def _kept(self, now: _Moment, lane: int, model: int, batch: int) -> bool:
        """Whether every later slot of the lane is still in time after a run that starts now.

        A slot may start as late as the plan's slack allows. In the cycle that comes next it may also
        start as late as the first request that waits for it; without one, the first that may come.
        What is late beyond that cycle stays late, so it has to be within the plan's slack.
        """
        timeline = self._timeline
        free_s = now.at_s + self._expected * self._times.run_s(model, self._widths[lane], batch)
        count = len(timeline.slots[lane])
        for ahead in range(2 * count):
            start_s = timeline.start_s(lane, ahead)
            if free_s <= start_s:
                return True
            slot = timeline.slot(lane, ahead)
            latest_s = start_s + slot.slack_s
            if free_s > latest_s + SLACK and ahead < count:
                latest_s = self._patience(now, slot, model, batch)
            if free_s > latest_s + SLACK:
                return False
            free_s += self._expected * slot.usual_s
        return True

    def _patience(self, now: _Moment, slot: Reservation, model: int, batch: int) -> float:
        """How long the first request can wait that a slot will serve, after a run of a model."""
        taken = batch if slot.model == model else 0
        waits = now.queues.waiting[slot.model] > taken
        deadline_s = (
            now.queues.deadline(slot.model, taken) if waits else now.now_s + self._slo_s[slot.model]
        )
        return deadline_s - now.now_s + now.at_s - slot.run_s

    def _wake_s(self, now: _Moment, idle: list[int]) -> float | None:
        """When the next slot of an idle lane starts that has requests."""
        starts = [
            self._timeline.start_s(lane, ahead)
            for lane in idle
            for ahead in range(len(self._timeline.slots[lane]))
            if now.queues.waiting[self._timeline.slot(lane, ahead).model]
        ]
        assert self._started_s is not None
        times = (self._started_s + start_s for start_s in starts)
        return min((time_s for time_s in times if time_s > now.now_s), default=None)


class _Moment:
    """One decision: the queues, the time (and since the first request), when each lane is free."""

    __slots__ = ("at_s", "free_s", "now_s", "queues")

    def __init__(self, queues: Queues, now_s: float, at_s: float, free_s: list[float]) -> None:
        self.queues, self.now_s, self.at_s, self.free_s = queues, now_s, at_s, free_s
