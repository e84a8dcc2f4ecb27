"""Discrete events: a policy, a virtual clock, and latencies from curves in the place of a device."""

from __future__ import annotations

import heapq
import math
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_aware_tune.planning.arrivals import Arrivals, draw_streams, merge
from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.interference import Interference
from gpu_aware_tune.planning.lanes import Workload
from gpu_aware_tune.planning.outcome import ModelOutcome, Outcome
from gpu_aware_tune.planning.policy import Policy, Refusal, Running, Start, State

_ONE_SIDED_P90 = 1.2815515655446004  # standard deviations

Duration = Callable[[Start, Sequence[Running]], float]
"""Seconds that a run takes, given what runs beside it. A replay of measured runs is another one."""


def curve_durations(
    work: Workload, interference: Interference | None = None, seed: int = 0, noise: bool = True
) -> Duration:
    """Run times from the curves: the median, log-normal so that the 90th percentile is met.

    Args:
        work: the workload, whose tables have a margin in `planned_s` but none in `median_s`.
        interference: how much runs slow each other down.
        seed: of the noise.
        noise: whether runs vary at all; where p90 is not above the median they do not.
    """
    rows = {width: place for place, width in enumerate(work.device.widths)}
    names = [demand.model for demand in work.demands]
    median = [table.median_s.tolist() for table in work.tables]
    spread = [np.log(np.maximum(1.0, table.p90_s / table.median_s)) for table in work.tables]
    sigma = [(np.nan_to_num(each) / _ONE_SIDED_P90).tolist() for each in spread]
    normal = np.random.default_rng(seed).standard_normal(4096).tolist()
    drawn = 0

    def seconds(start: Start, beside: Sequence[Running]) -> float:
        nonlocal drawn
        row = rows[start.units]
        taken: float = median[start.model][row][start.batch - 1]
        if noise and (width := sigma[start.model][row][start.batch - 1]):
            drawn = (drawn + 1) % len(normal)
            taken *= math.exp(width * normal[drawn])
        if interference is not None:
            taken *= interference.worst(names[start.model], {names[run.model] for run in beside})
        return taken

    return seconds


def draw_arrivals(
    work: Workload, arrivals: Arrivals, duration_s: float, seed: int = 0
) -> list[Floats]:
    """Arrival times of each model, at the rates of the demands."""
    rates = [demand.rate_per_s for demand in work.demands]
    return draw_streams(arrivals, rates, duration_s, seed)


@dataclass
class _Tally:
    """What came of one model's requests."""

    latency_s: array[float]
    good: int = 0
    refused: int = 0
    runs: int = 0
    unit_seconds: float = 0.0


def simulate(
    policy: Policy,
    work: Workload,
    streams: Sequence[Floats],
    duration_s: float,
    durations: Duration | None = None,
) -> Outcome:
    """Drive a policy over given arrivals until every request is answered or refused.

    Latency counts from the planned arrival. A request is good if it is answered within its SLO.

    Args:
        policy: decides; a fresh one, as it remembers.
        work: what it serves.
        streams: arrival times of each model, ascending; see `draw_arrivals`.
        duration_s: over which rates are taken.
        durations: how long a run takes; from the curves by default.
    """
    engine = _Engine(policy, work, durations or curve_durations(work))
    engine.run(*merge(streams))
    return Outcome(
        policy=policy.name,
        duration_s=duration_s,
        units=work.device.units,
        models=tuple(
            ModelOutcome(
                model=demand.model,
                offered=len(stream),
                good=tally.good,
                refused=tally.refused,
                runs=tally.runs,
                unit_seconds=tally.unit_seconds,
                latency_s=np.sort(np.asarray(tally.latency_s)),
            )
            for demand, stream, tally in zip(work.demands, streams, engine.tallies, strict=True)
        ),
    )


class _Engine:
    """The state of a simulated device."""

    def __init__(self, policy: Policy, work: Workload, durations: Duration) -> None:
        self.policy, self.durations = policy, durations
        lanes = policy.lanes or ()
        if sum(lanes) > work.device.units:
            raise AssertionError(f"{policy.name}: lanes of {sum(lanes)} units")
        self.pooled = policy.lanes is None
        self.planned = [table.planned_s.tolist() for table in work.tables]
        self.rows = {width: place for place, width in enumerate(work.device.widths)}
        self.slo_s = [demand.slo_s for demand in work.demands]
        self.tallies = [_Tally(array("d")) for _ in work.demands]
        self.state = State(
            queues=[deque() for _ in work.demands],
            lane_free_s=[0.0] * len(lanes),
            lane_idle=[True] * len(lanes),
            free_units=work.device.units if self.pooled else 0,
        )
        self.ends: list[tuple[float, int, Running]] = []
        self.started = 0

    def run(self, times: list[float], owners: list[int]) -> None:
        """Go from event to event."""
        queues, ends, slo_s = self.state.queues, self.ends, self.slo_s
        place, count, wake_s = 0, len(times), math.inf
        while True:
            now_s = min(
                times[place] if place < count else math.inf,
                ends[0][0] if ends else math.inf,
                wake_s,
            )
            if now_s == math.inf:
                break
            while ends and ends[0][0] <= now_s:
                self._end(heapq.heappop(ends)[2])
            while place < count and times[place] <= now_s:
                queues[owners[place]].append(times[place] + slo_s[owners[place]])
                place += 1
            if self.state.free_units or any(self.state.lane_idle):
                decision = self.policy.decide(self.state, now_s)
                for action in decision.actions:
                    self._apply(action, now_s)
                wake_s = math.inf if decision.wake_s is None else decision.wake_s
                if wake_s <= now_s:
                    raise AssertionError(f"{self.policy.name} asks to be woken in the past")
            else:
                wake_s = math.inf
        for model, queue in enumerate(queues):  # a policy that never serves them
            self.tallies[model].refused += len(queue)

    def _apply(self, action: Start | Refusal, now_s: float) -> None:
        queue, tally = self.state.queues[action.model], self.tallies[action.model]
        if isinstance(action, Refusal):
            for _ in range(action.count):
                queue.popleft()
            tally.refused += action.count
            return
        self._occupy(action)
        taken_s = self.durations(action, self.state.running)
        end_s, slo_s = now_s + taken_s, self.slo_s[action.model]
        for _ in range(action.batch):
            deadline_s = queue.popleft()
            tally.latency_s.append(end_s - deadline_s + slo_s)
            tally.good += end_s <= deadline_s + 1e-9
        tally.runs += 1
        tally.unit_seconds += taken_s * action.units
        planned_s = self.planned[action.model][self.rows[action.units]][action.batch - 1]
        running = Running(action.model, action.units, action.lane, now_s + planned_s)
        if action.lane is not None:
            self.state.lane_free_s[action.lane] = running.end_s
        self.state.running.append(running)
        self.started += 1
        heapq.heappush(self.ends, (end_s, self.started, running))

    def _occupy(self, start: Start) -> None:
        """Take the units of a run; a policy that takes what is not free is a defect."""
        state = self.state
        if start.lane is None:
            free = state.free_units >= start.units
            state.free_units -= start.units
        else:
            assert self.policy.lanes is not None
            free = state.lane_idle[start.lane] and self.policy.lanes[start.lane] == start.units
            state.lane_idle[start.lane] = False
        if not free or not 0 < start.batch <= len(state.queues[start.model]):
            raise AssertionError(f"{self.policy.name} cannot do {start}")

    def _end(self, running: Running) -> None:
        self.state.running.remove(running)
        if running.lane is None:
            self.state.free_units += running.units
        else:
            self.state.lane_idle[running.lane] = True
