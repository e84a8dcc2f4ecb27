"""Statistics of inferences that were timed one by one."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np


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
        ms = np.asarray(seconds) * 1e3
        p10, p90 = (float(value) for value in np.percentile(ms, (10, 90)))
        return LatencyStats(
            statistics.median(ms.tolist()), p10, p90, float(ms.min()), float(ms.mean()), len(ms)
        )
