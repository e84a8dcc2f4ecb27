"""The waiting rows of one model, the earliest deadline first, and what is counted of them."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from math import prod

from gpu_aware_tune.serving.requests import Request
from gpu_aware_tune.serving.served_model import ServedModel
from gpu_aware_tune.serving.slots import SlotRing
from gpu_aware_tune.serving.statistics import ModelStatistics

_LARGEST_RING_BYTES = 256 << 20
_RECENT = 1000  # answers whose latency is kept
# By how much sooner a policy wants a row answered than it is due: handing a run over, waking up at a
# time and giving the answer take a while. Seconds, and at most so much of the objective.
_LEAD_S, _LEAD_PART = 1e-3, 0.05


@dataclass(eq=False, slots=True)
class Row:
    """One row of a request; `number` counts within it."""

    request: Request
    number: int

    @property
    def slot(self) -> int:
        """Where its inputs lie."""
        return self.request.first_slot + self.number


class ModelQueue:
    """One model's rows; only touched under the dispatcher's lock.

    Args:
        model: whose rows.
        most_rows: that may wait at once, less where they would take more than 256 MiB.
    """

    def __init__(self, model: ServedModel, most_rows: int) -> None:
        self.model = model
        shapes, dtypes = model.row_shapes, model.dtypes
        pairs = zip(shapes, dtypes, strict=True)
        row_bytes = sum(prod(shape) * dtype.itemsize for shape, dtype in pairs)
        fitting = _LARGEST_RING_BYTES // max(1, row_bytes)
        self.slots = SlotRing(
            shapes,
            dtypes,
            max(2 * model.largest_run, min(most_rows, fitting), 2),
            in_order=model.max_batch > 1,
        )
        self.rows: deque[Row] = deque()
        self.deadlines: deque[float] = deque()  # of the same rows: what a policy sees
        self._lead_s = min(_LEAD_S, _LEAD_PART * model.slo_s)
        self.statistics = ModelStatistics()
        self.arrived = 0  # rows, for the estimate of the rate
        self.latencies: deque[float] = deque(maxlen=_RECENT)
        self.drift = 1.0  # of run times against the curve, averaged over the last runs
        self.closed = False

    def push(self, request: Request) -> None:
        """Add a request's rows in order of deadlines, behind those with the same one."""
        rows = [Row(request, number) for number in range(request.rows)]
        due_s = request.deadline_s - self._lead_s
        if not self.deadlines or self.deadlines[-1] <= due_s:
            self.rows.extend(rows)
            self.deadlines.extend([due_s] * len(rows))
            return
        place = bisect_right(self.deadlines, due_s)
        for offset, row in enumerate(rows):
            self.rows.insert(place + offset, row)
            self.deadlines.insert(place + offset, due_s)

    def pop(self) -> Row:
        """Take the row with the earliest deadline."""
        self.deadlines.popleft()
        return self.rows.popleft()

    def adopt(self, old: ModelQueue) -> None:
        """Take over what waits in the queue of the same model that this one replaces.

        What is left there afterwards found no room here, or has run in part.
        """
        if (old.model.row_shapes, old.model.dtypes) != (self.model.row_shapes, self.model.dtypes):
            return
        waiting: dict[Request, int] = {}
        for row in old.rows:
            waiting[row.request] = waiting.get(row.request, 0) + 1
        for request, rows in waiting.items():
            first = self.slots.take(request.rows) if rows == request.rows else None
            if first is None:
                continue
            self.slots.copy(first, old.slots, request.first_slot, rows)
            old.drop(request)
            request.first_slot = first
            self.push(request)

    def drop(self, request: Request) -> None:
        """Take out a request's rows that have not run."""
        kept = [row for row in self.rows if row.request is not request]
        if len(kept) == len(self.rows):
            return
        for row in self.rows:
            if row.request is request:
                self.slots.give_back(row.slot)
        self.rows = deque(kept)
        self.deadlines.clear()  # the same object: a policy's state refers to it
        self.deadlines.extend(row.request.deadline_s - self._lead_s for row in kept)
