"""The timing policy, on timers that answer what the test says."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from gpu_aware_tune.measure.timing import RETIME, SEARCH, Timer, compare, measure, spread_of


class FakeTimer:
    """A kernel of `seconds`, each repeat off by the next of `noise`; counts its calls."""

    def __init__(self, seconds: float, noise: tuple[float, ...] = (0.0,)) -> None:
        self.calls = 0
        self._seconds = seconds
        self._noise = itertools.cycle(noise)

    def __call__(self, number: int, repeat: int) -> list[float]:
        self.calls += number * repeat
        return [self._seconds * (1 + next(self._noise)) for _ in range(repeat)]


def test_a_quiet_kernel_stops_after_the_least_repeats() -> None:
    result = measure(FakeTimer(1e-3), None)
    assert result.seconds == pytest.approx(1e-3)
    assert result.repeats == SEARCH.min_repeats
    assert not result.coarse


def test_a_clearly_slower_candidate_stops_at_the_probe() -> None:
    timer = FakeTimer(10e-3)
    result = measure(timer, best_s=1e-3)
    assert result.coarse
    assert timer.calls <= 2


def test_a_candidate_near_the_best_is_measured_in_full() -> None:
    result = measure(FakeTimer(1.2e-3), best_s=1e-3)
    assert not result.coarse
    assert result.repeats >= SEARCH.min_repeats


def test_noise_buys_more_repeats_up_to_the_limit() -> None:
    result = measure(FakeTimer(1e-4, noise=(0.0, 0.5, 0.1, 0.9)), None)
    assert result.repeats == SEARCH.max_repeats


def test_one_disturbed_repeat_does_not_move_the_result() -> None:
    result = measure(FakeTimer(1e-3, noise=(0.0, 0.01, 3.0, 0.0, 0.01, 0.0, 0.01)), None)
    assert result.seconds == pytest.approx(1e-3, rel=0.02)


def test_a_short_kernel_runs_often_enough_to_be_seen() -> None:
    timer = FakeTimer(1e-6)
    measure(timer, None)
    assert timer.calls * 1e-6 > SEARCH.min_repeats * SEARCH.repeat_s * 0.9


def test_a_long_kernel_does_not_use_up_the_run() -> None:
    timer = FakeTimer(0.5, noise=(0.0, 0.3, 0.6))
    measure(timer, None)
    assert timer.calls <= 6


def test_measuring_again_takes_longer_than_searching() -> None:
    search, again = FakeTimer(1e-3), FakeTimer(1e-3)
    measure(search, None, SEARCH)
    measure(again, None, RETIME)
    assert again.calls > 2 * search.calls


def test_spread_needs_three_samples() -> None:
    assert spread_of([1.0, 1.0]) == float("inf")
    assert spread_of([1.0, 1.0, 1.0]) == 0.0


def test_compared_kernels_take_turns_and_drift_meets_all_of_them() -> None:
    now = [0.0]
    order: list[int] = []

    def timer_of(place: int, seconds: float) -> Timer:
        def timer(number: int, repeat: int) -> list[float]:
            samples = []
            for _ in range(repeat):
                drift = 1 + now[0] / 2  # the machine gets slower as time passes
                now[0] += seconds * number * drift
                samples.append(seconds * drift)
            order.append(place)
            return samples

        return timer

    timers = [timer_of(0, 1.00e-3), timer_of(1, 0.99e-3), timer_of(2, 1.02e-3)]
    results = compare(timers, RETIME)
    seconds = [result.seconds or 0.0 for result in results]
    assert sorted(range(3), key=lambda place: seconds[place]) == [1, 0, 2]
    assert len({result.repeats for result in results}) == 1
    assert results[0].repeats >= RETIME.min_repeats
    assert order[3:9] == [0, 1, 2, 2, 1, 0]


def test_a_kernel_that_is_behind_leaves_the_comparison_and_stays_behind() -> None:
    """The machine gets slower after the least number of repeats; who left never met that."""
    timing = dataclasses.replace(RETIME, min_repeats=5, max_repeats=101, budget_s=9.0)

    def timer_of(seconds: float) -> Timer:
        turns = itertools.count()

        def timer(number: int, repeat: int) -> list[float]:
            if repeat > 1:  # the probe
                return [seconds] * repeat
            turn = next(turns)
            slow = 1.5 if turn >= timing.min_repeats else 1.0
            noise = 1 + 0.01 * (turn % 3)  # never as quiet as the timing asks for
            return [seconds * slow * noise]

        return timer

    best, near, behind = compare([timer_of(1.00e-3), timer_of(1.01e-3), timer_of(1.10e-3)], timing)
    assert best.seconds and near.seconds and behind.seconds
    assert behind.repeats == timing.min_repeats < near.repeats == best.repeats
    assert best.seconds < near.seconds < behind.seconds
    assert behind.seconds / best.seconds == pytest.approx(1.10, rel=0.02)


def test_a_comparison_ends_when_all_but_one_are_behind() -> None:
    noise = (0.0, 0.01, 0.02)
    best, behind = compare([FakeTimer(1e-3, noise), FakeTimer(2e-3, noise)], RETIME)
    assert best.repeats == behind.repeats == RETIME.min_repeats


def test_a_comparison_ends_when_its_budget_is_used() -> None:
    slow = compare([lambda number, repeat: [0.3] * repeat] * 2, RETIME)
    assert [result.repeats for result in slow] == [RETIME.min_repeats] * 2
