"""Statistics of inferences that were timed one by one."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from gpu_aware_tune.measure.timing import quantile


@dataclass(frozen=True)
class LatencyStats:
    """Milliseconds of one inference over `n` runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    mean_ms: float
    n: int

    @staticmethod
    def of(seconds: list[float]) -> LatencyStats:
        """Sum up the seconds of single runs, of which there is one at least."""
        ms = [1e3 * each for each in seconds]
        p10, p90 = (quantile(ms, part) for part in (0.1, 0.9))
        return LatencyStats(statistics.median(ms), p10, p90, min(ms), statistics.fmean(ms), len(ms))
