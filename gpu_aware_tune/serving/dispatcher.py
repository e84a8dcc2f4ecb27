"""From waiting rows to runs: applies what a policy decides, with the real clock and real lanes.

Whoever has news (a request, a run that has ended, a time that has come) takes the lock, brings the
state up to date and asks the policy; there is no thread in between. The simulator in `planning` does
the same with a virtual clock.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_aware_tune.errors import last_line
from gpu_aware_tune.planning.policy import Policy, Refusal, Running, Start, State
from gpu_aware_tune.serving.lanes import LanePool, LaneRuns
from gpu_aware_tune.serving.model_queue import ModelQueue, Row
from gpu_aware_tune.serving.requests import Clock, Draining, Refused, Request, RunFailed
from gpu_aware_tune.serving.waker import Waker

Answer = Callable[[], None]
PlannedSeconds = Callable[[int, int, int], float]
"""What a run is planned to take: of a model's number, units and rows."""

_log = logging.getLogger(__name__)
_SWITCHES = 10_000  # the latest, whose times are kept
_DRIFT_WEIGHT = 0.05  # of the latest run in the average


@dataclass(eq=False, slots=True)
class Run:
    """A batch under way."""

    queue: ModelQueue
    rows: list[Row]
    lane: LaneRuns
    end_s: float
    median_s: float
    since_s: float | None  # the first run after a switch: when it could have begun


@dataclass(frozen=True)
class Layout:
    """How the device is shared from now on.

    Args:
        policy: decides what runs next.
        queues: of the models, in the order in which the policy numbers them.
        lanes: those of the policy, or None where it takes units from a pool.
        planned_s: what a run is planned to take.
        median_s: what it takes by the curve.
        fastest_s: of each model, what its fastest run of one row is planned to take.
    """

    policy: Policy
    queues: tuple[ModelQueue, ...]
    lanes: tuple[LaneRuns, ...] | None
    planned_s: PlannedSeconds
    median_s: PlannedSeconds
    fastest_s: tuple[float, ...]


class Dispatcher:
    """Queues, lanes and a policy.

    Args:
        pool: the lanes.
        layout: what to begin with.
        clock: seconds; the policy's `now`.
    """

    def __init__(self, pool: LanePool, layout: Layout, clock: Clock = time.monotonic) -> None:
        self.pool, self.clock, self.layout = pool, clock, layout
        self.lock = threading.Lock()
        self.idle = threading.Condition(self.lock)  # nothing waits and nothing runs
        self._runs: list[Run] = []
        self._state = State([], [], [], 0)
        self._switched_s: float | None = None
        self._freed_s: dict[int, float] = {}  # by core, when its last run ended
        # From the decision for a layout, or the end of the run on its cores, to its first run.
        self.switch_s: deque[float] = deque(maxlen=_SWITCHES)
        self._waker = Waker(self.wake, clock)
        self._arrange()

    def submit(self, queue: ModelQueue, request: Request, arrays: Sequence[np.ndarray]) -> None:
        """Take in a request.

        Raises:
            Draining: the model is closed.
            Refused: it cannot be answered in time, or the queue is full.
        """
        whole = not queue.model.max_batch
        with self.lock:
            if queue.closed:
                raise Draining(f"{queue.model.name} is being closed: send it elsewhere")
            queue.arrived += request.rows
            self._check_possible(queue, request)
            first = queue.slots.take(request.rows)
            if first is None:
                queue.statistics.full += 1
                raise Refused(
                    f"the queue of {queue.model.name} is full ({queue.slots.size} rows): try later"
                )
        request.first_slot, request.left = first, request.rows
        queue.slots.write(first, arrays, whole)
        with self.lock:
            if queue.closed:  # while its inputs were being written
                queue.slots.give_back(first, request.rows)
                raise Draining(f"{queue.model.name} is being closed: send it elsewhere")
            queue.push(request)
            answers = self._step()
        _give(answers)

    def _check_possible(self, queue: ModelQueue, request: Request) -> None:
        """Refuse what even the fastest run would answer late, begun as soon as a lane is free."""
        layout = self.layout
        model = layout.queues.index(queue)
        now_s = free_s = self.clock()
        if not self._state.free_units and not any(self._state.lane_idle):
            free_s = max(now_s, min((run.end_s for run in self._runs), default=now_s))
        if free_s + layout.fastest_s[model] > request.deadline_s:
            queue.statistics.refused += 1
            raise _late(queue, request, now_s)

    def cancel(self, queue: ModelQueue, request: Request) -> None:
        """Drop what has not run of a request whose caller has given it up."""
        with self.lock:
            if not request.is_over:
                request.is_over = True
                queue.drop(request)
                queue.statistics.cancelled += 1
            answers = self._step()
        _give(answers)

    def switch(self, layout: Layout) -> None:
        """Go on with another policy, other lanes or other models.

        Runs under way end where they are; a lane begins as soon as its cores are free. What waits
        for a model that is replaced waits for the new one; for one that is gone it is refused.
        """
        with self.lock:
            self._switched_s = self.clock()
            gone = [queue for queue in self.layout.queues if queue not in layout.queues]
            names = {queue.model.name: queue for queue in layout.queues}
            for queue in gone:
                if queue.model.name in names:
                    names[queue.model.name].adopt(queue)
            self.layout = layout
            answers = [answer for queue in gone for answer in self._close(queue)]
            self._arrange()
            answers += self._step()
        _give(answers)

    def wake(self) -> None:
        """Ask the policy again: the time has come that it named."""
        with self.lock:
            answers = self._step()
        _give(answers)

    def drain(self, timeout_s: float) -> None:
        """Accept nothing more, and wait until all is answered; then refuse what is left."""
        with self.lock:
            for queue in self.layout.queues:
                queue.closed = True
            self.idle.wait_for(self._is_idle, timeout_s)
            answers = [answer for queue in self.layout.queues for answer in self._close(queue)]
        _give(answers)
        self._waker.stop()

    def _is_idle(self) -> bool:
        return not self._runs and not any(queue.rows for queue in self.layout.queues)

    def _close(self, queue: ModelQueue) -> list[Answer]:
        queue.closed = True
        error = Draining(f"{queue.model.name} is being closed: send it elsewhere")
        answers = [_fail(request, error) for request in {row.request: None for row in queue.rows}]
        while queue.rows:
            queue.slots.give_back(queue.pop().slot)
        return answers

    def _step(self) -> list[Answer]:
        """Do what the policy decides; returns the answers to give once the lock is free."""
        state, answers = self._state, list[Answer]()
        if not state.free_units and not any(state.lane_idle):
            self._waker.set(None)
            return answers
        now_s = self.clock()
        decision = self.layout.policy.decide(state, now_s)
        for action in decision.actions:
            queue = self.layout.queues[action.model]
            if isinstance(action, Refusal):
                answers += self._refuse(queue, action.count, now_s)
            else:
                answers += self._start(queue, action, now_s)
        self._waker.set(decision.wake_s)
        if self._is_idle():
            self.idle.notify_all()
        return answers

    def _refuse(self, queue: ModelQueue, count: int, now_s: float) -> list[Answer]:
        answers = list[Answer]()
        for row in [queue.pop() for _ in range(count)]:
            queue.slots.give_back(row.slot)
            request = row.request
            if request.is_over:
                continue  # another row of it was refused before
            if request.deadline_s < now_s:
                queue.statistics.expired += 1
            else:
                queue.statistics.refused += 1
            answers.append(_fail(request, _late(queue, request, now_s)))
        return answers

    def _start(self, queue: ModelQueue, start: Start, now_s: float) -> list[Answer]:
        """Give a batch to a lane; rows whose request has ended meanwhile are left out."""
        rows = []
        for row in [queue.pop() for _ in range(start.batch)]:
            request = row.request
            if request.started_s is None and not request.is_over:
                request.started_s = now_s
                if request.future.set_running_or_notify_cancel():
                    queue.statistics.queue.add(now_s - request.arrived_s)
                else:
                    request.is_over = True
            if request.is_over:
                queue.slots.give_back(row.slot)
            else:
                rows.append(row)
        if not rows:
            return []
        layout, busy = self.layout, self._busy()
        lane = (
            self.pool.free(start.units, busy)
            if layout.lanes is None or start.lane is None
            else layout.lanes[start.lane]
        )
        place = start.model, start.units, len(rows)
        end_s, median_s = now_s + layout.planned_s(*place), layout.median_s(*place)
        run = Run(queue, rows, lane, end_s, median_s, self._since_switch(lane))
        self._runs.append(run)
        self._arrange()
        lane.post(functools.partial(self._execute, run))
        return []

    def _since_switch(self, lane: LaneRuns) -> float | None:
        switched_s, self._switched_s = self._switched_s, None
        if switched_s is None:
            return None
        return max(switched_s, *[self._freed_s.get(core, 0.0) for core in lane.cores])

    def _execute(self, run: Run) -> None:
        """In the lane's thread: run a batch, make room for the next one, then give the answers."""
        begin_s = self.clock()
        if run.since_s is not None:
            self.switch_s.append(begin_s - run.since_s)
        queue, rows = run.queue, run.rows
        outputs: list[np.ndarray] = []
        error: RunFailed | None = None
        try:
            variant = queue.model.variant_for(len(rows))
            batch = variant.batch if queue.model.max_batch else 1
            arrays = queue.slots.rows([row.slot for row in rows], batch)
            if not queue.model.max_batch:
                arrays = [array[0] for array in arrays]
            outputs = run.lane.run(variant, arrays)
        except Exception as failure:  # TVM's are of several kinds; the lane goes on
            said = last_line(failure) or type(failure).__name__
            error = RunFailed(f"{queue.model.name} failed ({said}): load it again")
        end_s = self.clock()
        with self.lock:
            self._runs.remove(run)
            self._freed_s.update(dict.fromkeys(run.lane.cores, end_s))
            for row in rows:
                queue.slots.give_back(row.slot)
            queue.statistics.ran(len(rows), end_s - begin_s)
            if run.median_s > 0:
                drift = (end_s - begin_s) / run.median_s
                queue.drift += _DRIFT_WEIGHT * (min(drift, 10.0) - queue.drift)
            answers = self._answers(run, outputs, error, begin_s, end_s)
            self._arrange()
            try:
                answers += self._step()
            except Exception:  # a defect of a policy must not cost the answers of this run
                _log.exception("the policy %s failed", self.layout.policy.name)
        _give(answers)

    def _answers(
        self,
        run: Run,
        outputs: list[np.ndarray],
        error: RunFailed | None,
        begin_s: float,
        end_s: float,
    ) -> list[Answer]:
        """The answers that a run completes."""
        queue, answers = run.queue, list[Answer]()
        counts = queue.statistics
        for place, row in enumerate(run.rows):
            request = row.request
            request.left -= 1
            if request.is_over:
                continue
            if error is not None:
                counts.fail.add(end_s - request.arrived_s)
                queue.drop(request)
                answers.append(_fail(request, error))
                continue
            request.parts.append((row.number, place, outputs))
            if request.left:
                continue
            request.is_over = True
            latency_s = end_s - request.arrived_s
            counts.answered(latency_s, end_s <= request.deadline_s)
            counts.run.add(end_s - begin_s)
            queue.latencies.append(latency_s)
            answers.append(functools.partial(_answer, queue, request))
        return answers

    def _busy(self) -> set[int]:
        return {core for run in self._runs for core in run.lane.cores}

    def _arrange(self) -> None:
        """Bring what the policy sees up to date: which lanes are idle, and until when others run."""
        state, layout = self._state, self.layout
        state.queues = [queue.deadlines for queue in layout.queues]
        lanes = layout.lanes or ()
        numbers = {lane: number for number, lane in enumerate(lanes)}
        models = {id(queue): number for number, queue in enumerate(layout.queues)}
        state.lane_idle, state.lane_free_s = [True] * len(lanes), [0.0] * len(lanes)
        state.running = []
        for run in self._runs:
            model = models.get(id(run.queue))
            if model is not None:
                own = numbers.get(run.lane)
                state.running.append(Running(model, len(run.lane.cores), own, run.end_s))
            for number, lane in enumerate(lanes):
                if not set(lane.cores).isdisjoint(run.lane.cores):
                    state.lane_idle[number] = False
                    state.lane_free_s[number] = max(state.lane_free_s[number], run.end_s)
        free = len(self.pool.cores) - len(self._busy())
        state.free_units = free if layout.lanes is None else 0


def _answer(queue: ModelQueue, request: Request) -> None:
    """Put a request's rows together."""
    names = [spec.name for spec in queue.model.outputs]
    parts = sorted(request.parts, key=lambda part: part[0])
    result = {}
    for number, name in enumerate(names):
        if not queue.model.max_batch:
            result[name] = parts[0][2][number]
            continue
        _, first, outputs = parts[0]
        if all(part[2] is outputs and part[1] == first + i for i, part in enumerate(parts)):
            result[name] = outputs[number][first : first + len(parts)]
        else:
            rows = [outputs[number][place : place + 1] for _, place, outputs in parts]
            result[name] = np.concatenate(rows)
    request.future.set_result(result)


def _late(queue: ModelQueue, request: Request, now_s: float) -> Refused:
    left_ms = max(0.0, 1e3 * (request.deadline_s - now_s))
    return Refused(
        f"{queue.model.name} cannot answer in time ({left_ms:.1f} ms are left of its latency"
        " objective): try later"
    )


def _fail(request: Request, error: Exception) -> Answer:
    """A request ends with an error; the answer is to be given later."""
    request.is_over = True

    def answer() -> None:
        if not request.future.done():  # a caller may have cancelled it
            request.future.set_exception(error)

    return answer


def _give(answers: list[Answer]) -> None:
    for answer in answers:
        answer()
