"""A curve as the planner uses it: seconds of a run by the width of its lane and by its batch size.

The rules, in this order: a lane runs the best library that is at most as wide as the lane, so that
latency does not rise with units; between two measured batch sizes latency is affine; a batch below
the smallest measured one, or one that a larger batch outruns, runs padded. Nothing is extrapolated:
there is no batch above the largest measured one, and no lane narrower than the narrowest library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MARGIN = 1.1  # planning latency over the measured p90
LARGEST_BATCH = 128  # a batch size above that is not planned with: tables stay small


class Batching(StrEnum):
    """What a batch takes whose size was not measured."""

    AFFINE = "affine"  # interpolated: libraries take any batch
    PADDED = "padded"  # that of the next larger measured size: batch sizes are compiled in


class CurvePoint(Protocol):
    """What is looked at of a measured point; `profiling.curves.Point` is one."""

    @property
    def units(self) -> int:
        """Cores or SMs that it ran on."""

    @property
    def batch(self) -> int:
        """Inferences a run."""

    @property
    def latency_ms(self) -> float:
        """Median of a run."""

    @property
    def p90_ms(self) -> float:
        """90th percentile of a run."""


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Seconds of a run of one model; rows are widths, column `b - 1` is batch size `b`.

    Args:
        model: its name.
        widths: the widths of lanes, ascending.
        median_s: what a run takes; infinite where no library fits.
        p90_s: what nine of ten runs do not exceed.
        planned_s: what a plan reckons with: p90 times the margin.
        measured: the measured batch sizes, ascending.
    """

    model: str
    widths: tuple[int, ...]
    median_s: Floats
    p90_s: Floats
    planned_s: Floats
    measured: tuple[int, ...]

    @property
    def largest_batch(self) -> int:
        """The largest batch of any width."""
        return int(self.planned_s.shape[1])

    @property
    def fastest_s(self) -> float:
        """The planned latency of one request on the best width."""
        return float(self.planned_s[:, 0].min())

    def row(self, width: int) -> int:
        """The row of a width."""
        return self.widths.index(width)


def latency_table(
    model: str,
    points: Iterable[CurvePoint],
    widths: Sequence[int],
    *,
    margin: float = MARGIN,
    batching: Batching = Batching.AFFINE,
) -> LatencyTable:
    """Tabulate a curve for the widths that a device's lanes may have.

    Args:
        model: its name.
        points: the measured points.
        widths: of lanes, ascending.
        margin: factor on the 90th percentile.
        batching: what a batch size that was not measured takes.
    """
    by_batch: dict[int, list[CurvePoint]] = {}
    for point in points:
        if point.batch <= LARGEST_BATCH:
            by_batch.setdefault(point.batch, []).append(point)
    measured = tuple(sorted(by_batch))
    median = _tabulate({b: _best(by_batch[b], widths, tail=False) for b in measured}, batching)
    p90 = _tabulate({b: _best(by_batch[b], widths, tail=True) for b in measured}, batching)
    p90 = np.maximum(median, p90)  # the p90 of one library may lie below the median of another
    return LatencyTable(model, tuple(widths), median, p90, margin * p90, measured)


def _best(points: Sequence[CurvePoint], widths: Sequence[int], tail: bool) -> Floats:
    """Seconds at each width: of the best library that is at most that wide."""
    found = np.full(len(widths), np.inf)
    for point in points:
        seconds = 1e-3 * (point.p90_ms if tail else point.latency_ms)
        fits = np.asarray(widths) >= point.units
        found[fits] = np.minimum(found[fits], seconds)
    return found


def _tabulate(by_batch: Mapping[int, Floats], batching: Batching) -> Floats:
    """Seconds by width and batch size, from those of the measured batch sizes."""
    measured = sorted(by_batch)
    table = np.full((len(by_batch[measured[0]]), measured[-1]), np.inf)
    for row in range(len(table)):
        known = [b for b in measured if np.isfinite(by_batch[b][row])]
        if not known:
            continue
        # Padding makes a larger batch that runs faster an upper limit for the smaller ones.
        seconds = np.minimum.accumulate([by_batch[b][row] for b in reversed(known)])[::-1]
        batches = np.arange(1, known[-1] + 1)
        if batching is Batching.PADDED:
            table[row, : known[-1]] = seconds[np.searchsorted(known, batches)]
        else:
            table[row, : known[-1]] = np.interp(batches, known, seconds)
    return np.asarray(table)
