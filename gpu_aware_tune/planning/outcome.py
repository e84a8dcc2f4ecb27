"""What came of a served or simulated load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpu_aware_tune.planning.curve import Floats


@dataclass(frozen=True, eq=False)
class ModelOutcome:
    """What came of one model's requests.

    Args:
        model: its name.
        offered: requests that arrived.
        good: answered within the SLO.
        refused: not served at all.
        runs: batches.
        unit_seconds: that its runs took.
        latency_s: of what was answered, in ascending order.
    """

    model: str
    offered: int
    good: int
    refused: int
    runs: int
    unit_seconds: float
    latency_s: Floats

    @property
    def attainment(self) -> float:
        """The part of the requests that was answered within the SLO."""
        return self.good / self.offered if self.offered else 1.0

    @property
    def batch(self) -> float:
        """Mean requests a run."""
        return len(self.latency_s) / self.runs if self.runs else 0.0

    def latency_at(self, percentile: float) -> float:
        """A percentile of the answers' latencies; 0 where there is none."""
        if not len(self.latency_s):
            return 0.0
        place = round(percentile / 100 * (len(self.latency_s) - 1))
        return float(self.latency_s[place])


@dataclass(frozen=True)
class Outcome:
    """What came of a load under one policy.

    Args:
        policy: its name.
        duration_s: over which rates are taken.
        units: of the device.
        models: in the order of the demands.
    """

    policy: str
    duration_s: float
    units: int
    models: tuple[ModelOutcome, ...]

    @property
    def goodput_per_s(self) -> float:
        """Answers within their SLO, a second."""
        return sum(model.good for model in self.models) / self.duration_s

    @property
    def attainment(self) -> float:
        """The part of all requests that was answered within the SLO."""
        offered = sum(model.offered for model in self.models)
        return sum(model.good for model in self.models) / offered if offered else 1.0

    @property
    def utilisation(self) -> float:
        """The part of the device's unit-seconds that runs took."""
        return sum(model.unit_seconds for model in self.models) / (self.units * self.duration_s)

    @property
    def fairness(self) -> float:
        """Jain's index of the models' attainments: 1 where all fare alike, 1/n where one gets all."""
        return jain_index([model.attainment for model in self.models])

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "policy": self.policy,
            "duration_s": self.duration_s,
            "goodput_per_s": self.goodput_per_s,
            "attainment": self.attainment,
            "utilisation": self.utilisation,
            "fairness": self.fairness,
            "models": [
                {
                    "model": model.model,
                    "offered": model.offered,
                    "good": model.good,
                    "refused": model.refused,
                    "attainment": model.attainment,
                    "mean_batch": model.batch,
                    "p50_s": model.latency_at(50),
                    "p99_s": model.latency_at(99),
                }
                for model in self.models
            ],
        }


def jain_index(values: Sequence[float]) -> float:
    """Jain's fairness index (Jain, Chiu, Hawe 1984) of values from 0 on."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0
