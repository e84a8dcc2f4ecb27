"""How far two rankings of candidates agree, and what other ways to measure would have given.

`benchmarks.measuring` measures; this is the arithmetic behind its tables.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_aware_tune.measure import SEARCH, TimingPolicy
from gpu_aware_tune.measure.timing import measure, percentile_10

# What a candidate's repeats are summed up to. The lowest tenth is what the search takes.
STATISTICS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "lowest tenth": percentile_10,
    "lower quartile": lambda samples: float(np.percentile(samples, 25)),
    "minimum": min,
    "median": statistics.median,
}
TIMING_POLICIES: Mapping[str, TimingPolicy] = {
    "search": SEARCH,
    "probe 5 ms": dataclasses.replace(SEARCH, probe_s=0.005),
    "drop ratio 2": dataclasses.replace(SEARCH, drop_ratio=2.0),
    "at least 6 repeats": dataclasses.replace(SEARCH, min_repeats=6),
    "at least 12 repeats": dataclasses.replace(SEARCH, min_repeats=12),
    "spread 0.3 %": dataclasses.replace(SEARCH, spread=0.003),
    "repeats of 5 ms": dataclasses.replace(SEARCH, repeat_s=0.005),
    "12 repeats of 5 ms, 100 ms": dataclasses.replace(
        SEARCH, repeat_s=0.005, min_repeats=12, budget_s=0.1
    ),
    "20 repeats of 5 ms, 200 ms, drop ratio 2": dataclasses.replace(
        SEARCH, repeat_s=0.005, min_repeats=20, max_repeats=20, budget_s=0.2, drop_ratio=2.0
    ),
}


def kendall(xs: Sequence[float], ys: Sequence[float], error: float = 0.0) -> float | None:
    """Return Kendall's tau-b of two rankings; None where no pair is left to compare.

    Args:
        xs, ys: seconds of the same candidates.
        error: pairs whose `ys` differ by no more than this (as a logarithm) do not count.
    """
    pairs = resolvable(ys, error)
    x, y = (np.asarray(values, float) for values in (xs, ys))
    first, second = pairs
    dx, dy = np.sign(x[first] - x[second]), np.sign(y[first] - y[second])
    scale = float(np.sqrt((dx**2).sum() * (dy**2).sum()))
    return float((dx * dy).sum()) / scale if scale else None


def resolvable(ys: Sequence[float], error: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of candidates whose seconds differ by more than `error`, as a logarithm."""
    logs = np.log(np.asarray(ys, float))
    first, second = np.triu_indices(len(logs), k=1)
    kept = np.abs(logs[first] - logs[second]) > error if error else np.ones(len(first), bool)
    return first[kept], second[kept]


def retest_error(once: Sequence[float] | np.ndarray, again: Sequence[float] | np.ndarray) -> float:
    """Return what nine of ten repetitions of a measurement stay within, as a logarithm."""
    return float(np.percentile(np.abs(np.log(np.asarray(again) / np.asarray(once))), 90))


def normalised(seconds: Sequence[float], sentinel: Sequence[float]) -> list[float]:
    """Return seconds as they were had the machine been as fast all along as it was typically."""
    typical = statistics.median(sentinel)
    return [value * typical / own for value, own in zip(seconds, sentinel, strict=True)]


@dataclass(frozen=True)
class Series:
    """One candidate's recorded timings: means of blocks of `per_block` calls, one after another."""

    per_block: int
    blocks: tuple[float, ...]


class Replay:
    """A timer that gives out a recorded series from some block on, starting over at its end.

    It knows nothing shorter than a block, so a probe of one call looks steadier than it is.
    """

    def __init__(self, series: Series, start: int) -> None:
        self._series = series
        self._at = start
        self.given: list[float] = []
        self.spent_s = 0.0

    def __call__(self, number: int, repeat: int) -> list[float]:
        """Give the seconds of one call for each repeat of `number` calls."""
        blocks = self._series.blocks
        count = -(-number // self._series.per_block)
        found = []
        for _ in range(repeat):
            taken = [blocks[(self._at + i) % len(blocks)] for i in range(count)]
            self._at += count
            found.append(sum(taken) / count)
            self.spent_s += found[-1] * number
        self.given += found
        return found


def resample(
    series: Sequence[Series], long: Sequence[float], timing: TimingPolicy, rounds: int, seed: int
) -> dict[str, Any]:
    """Tell what a timing policy would have given on recorded series, with each statistic.

    Every round measures the candidates in an order of its own, from a place of its own in each
    series, with the search's rule for dropping slow ones.

    Returns:
        Kendall's tau against the long measurement among the better half by statistic, and seconds
        of measuring a candidate, both as means over the rounds.
    """
    generator = random.Random(seed)
    better = better_half(long)
    taus: dict[str, list[float]] = {name: [] for name in STATISTICS}
    spent = 0.0
    for _ in range(rounds):
        order = generator.sample(range(len(series)), len(series))
        best: float | None = None
        values: dict[str, dict[int, float]] = {name: {} for name in STATISTICS}
        for index in order:
            timer = Replay(series[index], generator.randrange(len(series[index].blocks)))
            result = measure(timer, best, timing)
            assert result.seconds is not None
            best = result.seconds if best is None else min(best, result.seconds)
            for name, statistic in STATISTICS.items():
                values[name][index] = statistic(timer.given[-result.repeats :])
            spent += timer.spent_s
        for name, found in values.items():
            tau = kendall([found[i] for i in better], [long[i] for i in better])
            taus[name].append(0.0 if tau is None else tau)
    return {
        "tau": {name: statistics.fmean(found) for name, found in taus.items()},
        "seconds": spent / rounds / len(series),
    }


def better_half(long: Sequence[float]) -> list[int]:
    """Return the places of the faster half, fastest first, but of two candidates at least."""
    return sorted(range(len(long)), key=long.__getitem__)[: max(2, len(long) // 2)]
