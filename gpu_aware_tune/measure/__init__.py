"""Measuring without RPC: adaptive timing in a killable worker that holds one partition or several."""

from __future__ import annotations

from gpu_aware_tune.measure.base import BaseMeasurer
from gpu_aware_tune.measure.measurement import Failure, Measurement
from gpu_aware_tune.measure.measurer import Measurer, Slice
from gpu_aware_tune.measure.shared import SharedMeasurer, SharedWorker
from gpu_aware_tune.measure.timing import LONG, RETIME, SEARCH, TimingPolicy
from gpu_aware_tune.measure.worker import ComparisonJob, Job

__all__ = [
    "LONG",
    "RETIME",
    "SEARCH",
    "BaseMeasurer",
    "ComparisonJob",
    "Failure",
    "Job",
    "Measurement",
    "Measurer",
    "SharedMeasurer",
    "SharedWorker",
    "Slice",
    "TimingPolicy",
]
