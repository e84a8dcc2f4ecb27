"""Lane groups: a few equal lanes that run the same cycle of models, staggered.

A group of k lanes, each u units wide, starts a batch of each of its models every period T: lane 0 at
once, lane 1 at T, ..., and lane 0 again at k T. A lane's cycle is k T long, so that

    sum of the models' runs  <=  k T         the cycle fits into the lane
    batch of a model         >=  rate x T    no request is left behind
    T + run of a model       <=  SLO         who just missed a start waits T, then runs

With k = 1 and one model this is D-STACK's rule of SLO / 2, with k = 1 and several models a duty
cycle as in Nexus (SOSP '19). More and narrower lanes let a run take more of the SLO: k / (k + 1) of
it for one model alone, and narrow lanes do more work per unit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpu_aware_tune.planning.curve import Floats, LatencyTable
from gpu_aware_tune.planning.demand import Demand
from gpu_aware_tune.planning.device import PlanDevice

Ints = npt.NDArray[np.int64]

ROUNDING = 1e-9
MOST_PERIODS = 128  # candidates kept for each width


@dataclass(frozen=True)
class Workload:
    """What is planned: a device, and for each model its demand and its latencies."""

    device: PlanDevice
    demands: tuple[Demand, ...]
    tables: tuple[LatencyTable, ...]

    def __len__(self) -> int:
        return len(self.demands)

    def part(self, models: Sequence[int]) -> Workload:
        """The workload of some of the models alone."""
        demands = tuple(self.demands[model] for model in models)
        return Workload(self.device, demands, tuple(self.tables[model] for model in models))


@dataclass(frozen=True)
class LaneGroup:
    """Equal lanes with the same cycle.

    Args:
        models: positions in the workload.
        width: units of each lane.
        lanes: how many.
        period_s: between two starts of a model; a lane's cycle is `lanes` times as long.
        batches: the largest batch of each model.
    """

    models: tuple[int, ...]
    width: int
    lanes: int
    period_s: float
    batches: tuple[int, ...]

    @property
    def units(self) -> int:
        """Units of all its lanes."""
        return self.width * self.lanes


class Occupancy:
    """How long each model keeps a lane busy, at every width and period worth trying.

    Args:
        work: the workload.
        scale: factor on all rates.
        most_periods: candidates kept for each width; None keeps all, which makes the answers exact.
    """

    def __init__(
        self, work: Workload, scale: float = 1.0, most_periods: int | None = MOST_PERIODS
    ) -> None:
        self.work, self.scale = work, scale
        self.widths = np.asarray(work.device.widths, dtype=np.float64)
        self._latency = _stack(work.tables)
        self._rate = scale * np.asarray([demand.rate_per_s for demand in work.demands])
        self._burst = np.asarray([demand.burst for demand in work.demands])
        self._slo = np.asarray([demand.slo_s for demand in work.demands])
        self.periods = self._periods(most_periods)
        self.batches, self.run_s = self._runs(self.periods)
        fits = self.periods[None] + self.run_s <= self._slo[:, None, None] + ROUNDING
        self.busy: Floats = np.full(self.run_s.shape, np.inf)
        np.divide(self.run_s, self.periods[None], out=self.busy, where=fits)

    def part(self, models: Sequence[int]) -> Occupancy:
        """The same of some models alone, at the same periods."""
        part = copy.copy(self)
        part.busy, part.batches = self.busy[list(models)], self.batches[list(models)]
        return part

    def units(self, busy: Floats) -> Floats:
        """The fewest units for the sums of `busy` over groups; infinite where nothing fits."""
        lanes = np.ceil(busy.min(axis=-1) - ROUNDING)
        return np.asarray((lanes * self.widths).min(axis=-1))

    def units_of(self, models: Sequence[int]) -> float:
        """The fewest units that one group of these models needs."""
        return float(self.units(self.busy[list(models)].sum(axis=0)))

    def group(self, models: Sequence[int]) -> LaneGroup | None:
        """The smallest group of these models; of equal ones the least busy. None: nothing fits."""
        busy = self.busy[list(models)].sum(axis=0)
        lanes = np.ceil(busy - ROUNDING)
        units = lanes * self.widths[:, None]
        if not np.isfinite(units).any():
            return None
        area = np.where(units == units.min(), busy * self.widths[:, None], np.inf)
        row, column = np.unravel_index(int(area.argmin()), area.shape)
        batches = tuple(int(self.batches[model, row, column]) for model in models)
        return LaneGroup(
            models=tuple(models),
            width=int(self.widths[row]),
            lanes=int(lanes[row, column]),
            period_s=float(self.periods[row, column]),
            batches=batches,
        )

    def _periods(self, most: int | None) -> Floats:
        """Periods by width at which the best group may be; rows are filled with one that fits none.

        As long as a batch does not grow, a longer period is better. So the best period is where the
        batch of one of the models is just full, or where its SLO is just met.
        """
        sizes = np.arange(self._latency.shape[2])
        # sqrt(mean) from mean + burst sqrt(mean) = size
        root = (np.sqrt(self._burst[:, None] ** 2 + 4 * sizes) - self._burst[:, None]) / 2
        full = (root**2 / self._rate[:, None])[:, None, :]
        run_s = self._latency[:, :, :-1]
        found = np.minimum(full[:, :, 1:], self._slo[:, None, None] - run_s)
        useful = found > full[:, :, :-1] + ROUNDING
        useful &= self.widths[:, None] * run_s <= found * self.work.device.units * (1 + ROUNDING)
        unused = 2 * self._slo.max()
        rows = np.where(useful, found, unused).swapaxes(0, 1).reshape(len(self.widths), -1)
        rows.sort(axis=1)
        rows = rows[:, : max(1, int((rows < unused).sum(axis=1).max()))]
        return rows if most is None or rows.shape[1] <= most else _thin(rows, unused, most)

    def _runs(self, periods: Floats) -> tuple[Ints, Floats]:
        """Batch and seconds of each model's run, by width and period."""
        mean = self._rate[:, None, None] * periods[None]
        if self._burst.any():
            mean = mean + self._burst[:, None, None] * np.sqrt(mean)
        batches = np.ceil(mean - 1e-7)
        most = self._latency.shape[2]  # the last column is infinite
        columns = np.clip(batches, 1, most).astype(np.int64)
        model = np.arange(len(self._rate))[:, None, None]
        row = np.arange(len(self.widths))[None, :, None]
        return columns, np.asarray(self._latency[model, row, columns - 1])


def _stack(tables: Sequence[LatencyTable]) -> Floats:
    """Planned seconds by model, width and batch, with a last column that is infinite."""
    largest = max(table.largest_batch for table in tables)
    stacked = np.full((len(tables), len(tables[0].widths), largest + 1), np.inf)
    for place, table in enumerate(tables):
        stacked[place, :, : table.largest_batch] = table.planned_s
    return stacked


def _thin(periods: Floats, unused: float, most: int) -> Floats:
    """So many periods of each row: the longest up to each of equal ratios."""
    used = periods[periods < unused]
    edges = np.geomspace(used.min(), used.max() * (1 + ROUNDING), most)
    places = [np.searchsorted(row, edges, side="right") - 1 for row in periods]
    return np.asarray(
        [row[np.maximum(place, 0)] for row, place in zip(periods, places, strict=True)]
    )
