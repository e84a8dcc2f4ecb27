"""The curve of a served model, measured on its lanes where `tune profile` has left none."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from gpu_aware_tune.planning.curve_file import MeasuredCurve, MeasuredPoint
from gpu_aware_tune.serving.lanes import LanePool, LaneRuns
from gpu_aware_tune.serving.served_model import ServedModel, Variant

SECONDS = 0.3  # of one width and batch size
_LEAST_RUNS = 5
_UNMEASURED = 2  # first runs that are not counted


def measure_curve(
    model: ServedModel, pool: LanePool, widths: Sequence[int], seconds: float = SECONDS
) -> MeasuredCurve:
    """Time a model at each width, with as many lanes at once as the device has room for.

    So a curve holds how much lanes slow each other down that run the same model: they share caches
    and memory bandwidth, and a plan that reckoned with idle neighbours would be late.

    Args:
        model: what to time, on zeros.
        pool: of the device.
        widths: of lanes.
        seconds: for each width and batch size; at least five runs are made.
    """
    device = model.variants[0].manifest.device
    points = []
    for width in widths:
        lanes = pool.side_by_side([width] * (len(pool.cores) // width))
        for variant in model.variants:
            batch = variant.batch if model.max_batch else 1
            samples_ms = 1e3 * np.asarray(_samples(model, variant, lanes, seconds))
            median, p90 = np.percentile(samples_ms, (50, 90))
            points.append(MeasuredPoint(width, batch, float(median), float(p90)))
    return MeasuredCurve(model.name, device, "core", len(pool.cores), tuple(points))


def _samples(
    model: ServedModel, variant: Variant, lanes: Sequence[LaneRuns], seconds: float
) -> list[float]:
    """Seconds of runs of all lanes at once."""
    samples: list[float] = []
    ended = threading.Semaphore(0)
    errors: list[Exception] = []

    def sample(lane: LaneRuns) -> None:
        try:
            samples.extend(_time(model, variant, lane, seconds))
        except Exception as error:  # belongs to the caller
            errors.append(error)
        ended.release()

    for lane in lanes:
        lane.warm_up(model, variant)
    for lane in lanes:
        lane.post(lambda lane=lane: sample(lane))  # type: ignore[misc]
    for _ in lanes:
        ended.acquire()
    if errors:
        raise errors[0]
    return samples


def _time(model: ServedModel, variant: Variant, lane: LaneRuns, seconds: float) -> list[float]:
    """In a lane's thread: seconds of runs one after the other."""
    zeros = model.zeros(variant)
    found: list[float] = []
    end_s = time.monotonic() + seconds
    while len(found) < _UNMEASURED + _LEAST_RUNS or time.monotonic() < end_s:
        begin_s = time.monotonic()
        lane.run(variant, zeros)
        found.append(time.monotonic() - begin_s)
    return found[_UNMEASURED:]
