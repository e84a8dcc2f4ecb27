"""What one model must serve: request rate, latency objective, weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from gpu_aware_tune.errors import UserError

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Demand:
    """The load of one model and what its users expect.

    Args:
        model: the name that its curve has.
        rate_per_s: requests a second.
        slo_s: seconds from a request's arrival to its answer.
        percentile: of the requests that must meet `slo_s`, above 50 and below 100.
        weight: how much a request counts against those of other models.
        cv: coefficient of variation of the time between requests that the plan leaves room for;
            0 plans for evenly spaced requests, 1 for Poisson arrivals.
    """

    model: str
    rate_per_s: float
    slo_s: float
    percentile: float = 99.0
    weight: float = 1.0
    cv: float = 0.0

    def __post_init__(self) -> None:
        _check(
            self.model, "rate", self.rate_per_s, self.rate_per_s > 0, "requests a second above 0"
        )
        _check(self.model, "slo", self.slo_s, self.slo_s > 0, "a latency above 0, such as 50ms")
        inside = 50 < self.percentile < 100
        _check(self.model, "percentile", self.percentile, inside, "a number between 50 and 100")
        _check(self.model, "weight", self.weight, self.weight > 0, "a number above 0")
        _check(self.model, "cv", self.cv, self.cv >= 0, "a number from 0 on")

    @property
    def burst(self) -> float:
        """Standard deviations of the requests in a period that a batch has room for, times `cv`."""
        return NormalDist().inv_cdf(self.percentile / 100) * self.cv if self.cv else 0.0

    def batch_for(self, period_s: float, scale: float = 1.0) -> int:
        """The batch that holds the requests of a period, at `scale` times the rate.

        The number of requests of a renewal process in a period has the mean n and, for long
        periods, the variance n cv^2.
        """
        mean = self.rate_per_s * scale * period_s
        return max(1, math.ceil(mean + self.burst * math.sqrt(mean) - _ROUNDING))


def _check(model: str, what: str, value: float, allowed: bool, hint: str) -> None:
    if not (math.isfinite(value) and allowed):
        raise UserError(f"{what} {value:g} of {model} is not allowed: give {hint}")
