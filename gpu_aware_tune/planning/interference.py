"""How much models slow each other down that run at the same time on different lanes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gpu_aware_tune.errors import UserError


@dataclass(frozen=True)
class Interference:
    """Factors on the latency of a run while another model runs beside it.

    Lanes share memory bandwidth and caches. 1.0 says that they do not disturb each other; that holds
    until it is measured.

    Args:
        default: the factor of every pair that is not named.
        pairs: by (model that runs, model beside it).
    """

    default: float = 1.0
    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, factor in [("every pair", self.default), *self.pairs.items()]:
            if not (math.isfinite(factor) and factor >= 1):
                raise UserError(
                    f"interference {factor:g} of {name} is not allowed: give a factor from 1 on"
                )

    def factor(self, model: str, beside: str) -> float:
        """What the latency of a model is multiplied with beside another."""
        return self.pairs.get((model, beside), self.default)

    def worst(self, model: str, others: Iterable[str]) -> float:
        """The largest factor of a model beside any of the others; 1 where it is alone."""
        return max((self.factor(model, other) for other in others), default=1.0)
