"""The arithmetic of the measuring benchmark: rank correlation, drift, replayed measurements."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from benchmarks.ranking import (
    Replay,
    Series,
    better_half,
    kendall,
    normalised,
    resample,
    resolvable,
    retest_error,
)
from gpu_aware_tune.measure import SEARCH, TimingPolicy


def test_tau_of_known_rankings() -> None:
    assert kendall([1, 2, 3], [10, 20, 30]) == 1
    assert kendall([3, 2, 1], [10, 20, 30]) == -1
    assert kendall([1, 3, 2, 4], [1, 2, 3, 4]) == pytest.approx(4 / 6), "one of six pairs swapped"
    assert kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3)), "a tie: tau-b"
    assert kendall([1, 1], [1, 2]) is None, "nothing to compare"


def test_tau_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = random.Random(0)
    xs = [generator.randrange(1, 12) for _ in range(40)]
    ys = [generator.randrange(1, 12) for _ in range(40)]
    assert kendall(xs, ys) == pytest.approx(stats.kendalltau(xs, ys).statistic)


def test_pairs_within_the_error_do_not_count() -> None:
    long, fast = [1.00, 1.01, 2.0], [1.01, 1.00, 2.0]
    assert kendall(fast, long) == pytest.approx(1 / 3)
    assert kendall(fast, long, error=0.02) == 1
    assert len(resolvable(long, 0.02)[0]) == 2


def test_the_retest_error_is_a_relative_difference() -> None:
    once = np.linspace(1e-3, 2e-3, 20)
    assert retest_error(once, once) == 0
    assert retest_error(once, 1.05 * once) == pytest.approx(math.log(1.05))


def test_the_sentinel_takes_drift_out() -> None:
    true, slower = [1.0, 1.1, 1.2, 1.3], [1.0, 1.5, 1.0, 1.5]
    seen = [value * factor for value, factor in zip(true, slower, strict=True)]
    assert sorted(seen) != seen
    steady = normalised(seen, [2e-3 * factor for factor in slower])
    assert np.allclose(np.divide(steady, true), steady[0])


def test_a_replay_gives_out_the_series_and_counts_what_it_cost() -> None:
    timer = Replay(Series(10, (1.0, 2.0, 3.0)), start=2)
    assert timer(10, 1) == [3.0]
    assert timer(20, 2) == [1.5, 2.0], "two blocks a repeat, from the start again at the end"
    assert timer(1, 1) == [2.0]
    assert timer.spent_s == 30 + 30 + 40 + 2
    assert timer.given == [3.0, 1.5, 2.0, 2.0]


def test_what_an_effort_would_give() -> None:
    long = [1e-3 * 1.05**i for i in range(12)]
    quiet = [Series(1, (seconds,) * 50) for seconds in long]
    found = resample(quiet, long, SEARCH, rounds=3, seed=0)
    assert set(found["tau"].values()) == {1.0}
    # One call, one probe call, and three repeats of two calls each, of about 1.3 ms.
    assert 0.002 < found["seconds"] < 0.012

    noise = random.Random(0)
    noisy = [Series(1, tuple(s * noise.uniform(1, 1.5) for _ in range(50))) for s in long]
    few, many = TimingPolicy(max_repeats=3), TimingPolicy(min_repeats=12, budget_s=1.0)
    little, much = (resample(noisy, long, timing, 30, 0) for timing in (few, many))
    assert little["tau"]["minimum"] < much["tau"]["minimum"] < 1
    assert little["seconds"] < much["seconds"]


def test_the_better_half_is_the_faster_one() -> None:
    assert better_half([3.0, 1.0, 4.0, 2.0]) == [1, 3]
    assert better_half([2.0, 1.0]) == [1, 0]
