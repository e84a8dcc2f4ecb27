"""From measured points to a share: efficacy, the knee of a curve, and the share to tune for.

Pure functions over what `profiles` measures. The words are those of GSLICE (Dhakal, Kulkarni,
Ramakrishnan, SoCC '20) and of D-STACK by the same authors (arXiv:2304.13541): a model's latency
falls with its share of a GPU up to a knee, beyond which more SMs bring next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

WITHIN = 0.05


class Measured(Protocol):
    """What is looked at of one point of a curve."""

    @property
    def units(self) -> int:
        """Cores or SMs."""

    @property
    def percent(self) -> int:
        """Of the device."""

    @property
    def batch(self) -> int:
        """Inferences a run."""

    @property
    def latency_ms(self) -> float:
        """The median of a run."""

    @property
    def efficacy(self) -> float:
        """See `efficacy`."""


def efficacy(throughput_per_s: float, latency_s: float, share: float) -> float:
    """D-STACK's efficacy: throughput / (latency x share).

    High where a share is well used: much work, soon, on little of the device. The batch size and
    the share with the highest efficacy are the ones that D-STACK schedules with.

    Args:
        throughput_per_s: inferences a second.
        latency_s: seconds of one run, a whole batch.
        share: the fraction of the device, above 0 and at most 1.
    """
    return throughput_per_s / (latency_s * share)


def marginal_gains(latency_ms: Mapping[int, float]) -> dict[int, float]:
    """What is still to be gained beyond each number of units.

    Args:
        latency_ms: latency by units.

    Returns:
        By units in ascending order: how much faster the best larger share is, so 0.25 where it
        runs a quarter more often; 0 where every larger share is slower, and for the largest.
    """
    gains: dict[int, float] = {}
    best_ms = float("inf")  # of the shares larger than the one looked at
    for units in sorted(latency_ms, reverse=True):
        gains[units] = max(0.0, latency_ms[units] / best_ms - 1)
        best_ms = min(best_ms, latency_ms[units])
    return dict(sorted(gains.items()))


def knee(latency_ms: Mapping[int, float], within: float = WITHIN) -> int:
    """The knee of a curve: the smallest share beyond which nothing gains more than 5 %.

    Exactly: with the marginal gain of a share `s` being ``latency(s) / min(latency(t) for t > s)
    - 1``, the speed that the best larger share adds to it, the knee is the smallest measured `s`
    whose marginal gain is at most `within`. Each share is held against all larger ones and not
    against the next one, so that a plateau before a further drop (whole waves of blocks make
    latency a staircase on a GPU) does not count as the end, and neither does a small step only
    because the shares lie close together. A curve that gets worse again has its knee where it is
    still near its best. The largest share always qualifies: a knee there says that the model may
    gain from still more.

    Args:
        latency_ms: latency by units, at least one.
        within: how much of a gain counts as none.

    Returns:
        The units of the knee.
    """
    return next(units for units, gain in marginal_gains(latency_ms).items() if gain <= within)


def knees(points: Iterable[Measured], within: float = WITHIN) -> dict[int, int]:
    """The knee (in units) of each batch size among the points."""
    curves: dict[int, dict[int, float]] = {}
    for point in points:
        curves.setdefault(point.batch, {})[point.units] = point.latency_ms
    return {batch: knee(latency_ms, within) for batch, latency_ms in sorted(curves.items())}


def choose_share(points: Iterable[Measured], within: float = WITHIN) -> tuple[int, str]:
    """The share to tune for, in percent of the device, and why, in one phrase.

    It is the knee of the smallest batch size: a model that gets less loses speed, a model that
    gets more keeps units from others for nothing.
    """
    found = list(points)
    batch = min(point.batch for point in found)
    curve = {point.units: point for point in found if point.batch == batch}
    latency_ms = {units: point.latency_ms for units, point in curve.items()}
    at = curve[knee(latency_ms, within)]
    return at.percent, _why(at, curve, marginal_gains(latency_ms)[at.units], within)


def _why(at: Measured, curve: Mapping[int, Measured], gain: float, within: float) -> str:
    units = f"{at.units} unit{'' if at.units == 1 else 's'}"
    here = f"{at.percent} % ({units}, {at.latency_ms:.3g} ms)"
    smaller = [point for point in curve.values() if point.units < at.units]
    before = max(smaller, key=lambda point: point.units, default=None)
    if len(curve) == 1:
        return f"{here} is the only share measured"
    if before is None:
        text = f"{here} is the smallest share measured"
    else:
        faster = before.latency_ms / at.latency_ms - 1
        text = f"{here} is the knee: {faster:.0%} faster than {before.percent} %"
    if at.units == max(curve):
        return f"{text}, and there is no larger share"
    return f"{text}, and no larger share is more than {within:.0%} faster (at most {gain:.1%})"
