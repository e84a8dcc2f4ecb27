"""The knee, the efficacy and the choice of a share, on curves whose answer is known."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from gpu_aware_tune.profiling.knee import choose_share, efficacy, knee, knees, marginal_gains

SMS = [8, 16, 24, 32, 48, 64, 80, 96, 112, 132]


@dataclass(frozen=True)
class Point:
    units: int
    latency_ms: float
    percent: int = 0
    batch: int = 1
    efficacy: float = 0.0


def amdahl(serial: float, units: list[int] = SMS) -> dict[int, float]:
    """10 ms on one unit, of which the serial part never gets faster."""
    return {n: 10 * (serial + (1 - serial) / n) for n in units}


@pytest.mark.parametrize("serial", [0.0, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0])
def test_amdahls_knee_is_where_the_formula_puts_it(serial: float) -> None:
    """latency(s) <= 1.05 latency(N) solved for s."""
    units = list(range(1, 133))
    curve = amdahl(serial, units)
    limit = 1.05 * curve[132] / 10
    exact = 1 if limit >= 1 else (1 - serial) / (limit - serial)
    found = knee(curve)
    assert exact <= found + 1e-9
    assert found < exact + 1 + 1e-9


def test_a_model_that_always_gains_has_its_knee_at_the_end() -> None:
    assert knee(amdahl(0.0)) == 132
    assert knee({1: 10.0, 2: 5.5}) == 2


def test_a_saturating_curve_has_its_knee_where_it_saturates() -> None:
    flat_from_48 = {n: max(1.0, 48 / n) for n in SMS}
    assert knee(flat_from_48) == 48
    assert knee(dict.fromkeys(SMS, 3.0)) == 8


def test_the_threshold_is_five_percent_and_can_be_set() -> None:
    assert knee({1: 1.0499, 2: 1.0}) == 1
    assert knee({1: 1.0501, 2: 1.0}) == 2
    assert knee({1: 1.0501, 2: 1.0}, within=0.1) == 1
    assert knee({1: 1.0499, 2: 1.0}, within=0.01) == 2


def test_a_plateau_before_a_further_drop_is_not_the_end() -> None:
    staircase = {8: 8.0, 16: 4.0, 24: 3.98, 32: 3.97, 48: 3.96, 64: 2.0, 80: 1.99, 132: 1.98}
    assert knee(staircase) == 64


def test_many_small_steps_add_up() -> None:
    """No step gains 5 %, all of them together do."""
    slow = {n: 1.02**-n for n in range(10)}
    assert knee(slow) == 7


def test_a_curve_that_gets_worse_again_ends_near_its_best() -> None:
    assert knee({8: 4.0, 16: 2.0, 32: 1.0, 64: 1.3, 132: 1.6}) == 32
    assert knee({8: 4.0, 16: 1.04, 32: 1.0, 64: 1.3, 132: 1.6}) == 16
    assert knee({1: 1.0, 2: 2.0}) == 1  # threads that only cost


def test_noise_below_the_threshold_moves_the_knee_by_no_more_than_its_size_allows() -> None:
    generator = random.Random(3)
    smooth = {n: max(1.0, 48 / n) for n in SMS}
    for _ in range(200):
        noisy = {n: ms * generator.uniform(0.985, 1.015) for n, ms in smooth.items()}
        assert knee(noisy) == 48


def test_one_point_is_its_own_knee() -> None:
    assert knee({132: 2.0}) == 132
    assert choose_share([Point(2, 5.0, 100)]) == (
        100,
        "100 % (2 units, 5 ms) is the only share measured",
    )


def test_order_does_not_matter() -> None:
    curve = amdahl(0.2)
    shuffled = list(curve.items())
    random.Random(1).shuffle(shuffled)
    assert knee(dict(shuffled)) == knee(curve)


def test_marginal_gain_is_against_the_best_larger_share() -> None:
    gains = marginal_gains({4: 1.5, 1: 4.0, 2: 2.0, 8: 1.0, 16: 1.25})
    assert gains == {1: 3.0, 2: 1.0, 4: 0.5, 8: 0.0, 16: 0.0}
    assert list(gains) == [1, 2, 4, 8, 16]


def test_each_batch_size_has_a_knee_of_its_own() -> None:
    small = [Point(n, max(1.0, 16 / n)) for n in SMS]
    large = [Point(n, max(4.0, 384 / n), batch=8) for n in SMS]
    assert knees([*large, *small]) == {1: 16, 8: 96}


def test_efficacy_is_dstacks() -> None:
    assert efficacy(100.0, 0.01, 0.5) == pytest.approx(20000)
    # Half the share at the same speed is worth twice, half the share at half the speed a half.
    assert efficacy(100.0, 0.01, 0.25) == pytest.approx(2 * efficacy(100.0, 0.01, 0.5))
    assert efficacy(50.0, 0.02, 0.25) == pytest.approx(0.5 * efficacy(100.0, 0.01, 0.5))


def test_the_share_chosen_is_the_knee_and_the_reason_names_both_neighbours() -> None:
    curve = [Point(n, max(1.0, 48 / n), percent=-(-100 * n // 132)) for n in SMS]
    percent, why = choose_share(curve)
    assert percent == 37
    assert why == (
        "37 % (48 units, 1 ms) is the knee: 50% faster than 25 %,"
        " and no larger share is more than 5% faster (at most 0.0%)"
    )


def test_the_reason_says_when_the_knee_is_an_end_of_what_was_measured() -> None:
    first = choose_share([Point(1, 1.0, 50), Point(2, 0.99, 100)])
    assert first == (
        50,
        "50 % (1 unit, 1 ms) is the smallest share measured,"
        " and no larger share is more than 5% faster (at most 1.0%)",
    )
    last = choose_share([Point(1, 10.0, 50), Point(2, 5.0, 100)])
    assert last == (
        100,
        "100 % (2 units, 5 ms) is the knee: 100% faster than 50 %, and there is no larger share",
    )


def test_the_smallest_batch_decides() -> None:
    points = [Point(1, 1.0, 50, 1), Point(2, 1.0, 100, 1), Point(1, 8.0, 50, 4)]
    assert choose_share([*points, Point(2, 4.0, 100, 4)])[0] == 50
