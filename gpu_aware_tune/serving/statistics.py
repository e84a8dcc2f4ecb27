"""Counts of a model's requests and runs, as Triton's statistics extension and Prometheus have them.

Counters only grow. They are written under the engine's lock and copied by `Engine.statistics`.
"""

from __future__ import annotations

import copy
import time
from bisect import bisect_left
from dataclasses import dataclass, field

# Upper bounds of latency classes, seconds; what takes longer is in one more class.
LATENCY_BOUNDS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
)  # fmt: skip


@dataclass(slots=True)
class Duration:
    """How often something happened, and how long it took in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count events that took so long together."""
        self.count += count
        self.seconds += seconds


@dataclass(slots=True)
class ModelStatistics:
    """What came of one model's requests since it was added.

    Args:
        success: requests answered, from arrival to answer.
        fail: requests whose run failed, likewise.
        refused: requests refused at once because they could not be answered in time.
        full: requests refused because the queue was full.
        expired: requests whose deadline had passed before they could run.
        cancelled: requests given up by their callers before they ran.
        good: requests answered within their deadline.
        queue: requests that ran, from arrival to the start of their run.
        run: requests that ran, from the start of their run to its end.
        latency: answered requests by latency, one class for each of `LATENCY_BOUNDS_S` and one more.
        batches: runs by their number of rows.
        rows: rows that ran.
        last_run_s: the wall clock (seconds since 1970) at the end of the last run; 0.0 before it.
    """

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    refused: int = 0
    full: int = 0
    expired: int = 0
    cancelled: int = 0
    good: int = 0
    queue: Duration = field(default_factory=Duration)
    run: Duration = field(default_factory=Duration)
    latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    batches: dict[int, Duration] = field(default_factory=dict)
    rows: int = 0
    last_run_s: float = 0.0

    def answered(self, latency_s: float, in_time: bool) -> None:
        """Count a request that was answered."""
        self.success.add(latency_s)
        self.latency[bisect_left(LATENCY_BOUNDS_S, latency_s)] += 1
        self.good += in_time

    def ran(self, rows: int, seconds: float) -> None:
        """Count a run."""
        self.batches.setdefault(rows, Duration()).add(seconds)
        self.rows += rows
        self.last_run_s = time.time()

    def snapshot(self) -> ModelStatistics:
        """A copy that no longer changes."""
        return copy.deepcopy(self)
