"""When a run stops, with a clock that the test moves."""

from __future__ import annotations

from gpu_aware_tune.search.budget import Budget


class Clock:
    """A clock that stands still until told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def budget(
    trials: int | None = None, time_s: float | None = None, patience: int = 0
) -> tuple[Budget, Clock]:
    clock = Clock()
    made = Budget(trials, time_s, patience, clock)
    made.start()
    return made, clock


def test_trials_run_out() -> None:
    made, _ = budget(trials=2)
    made.spend(1.0)
    assert made.stopped_by() is None
    made.spend(1.0)
    assert made.stopped_by() == "trials"
    assert made.left() == 0


def test_time_runs_out() -> None:
    made, clock = budget(time_s=10)
    clock.now = 9.9
    assert made.stopped_by() is None
    clock.now = 10.0
    assert made.stopped_by() == "time"


def test_patience_does_not_count_trials_of_an_earlier_run() -> None:
    made, _ = budget(patience=3)
    made.done = 1000
    made.start()
    assert made.stopped_by() is None
    for _ in range(4):
        made.spend(1.0)
    assert made.stopped_by() == "patience"


def test_patience_counts_trials_without_a_gain() -> None:
    made, _ = budget(patience=3)
    made.spend(1.0)
    made.spend(0.999)  # below half a percent: no gain
    made.spend(0.9)
    made.spend(0.9)
    made.spend(0.9)
    assert made.stopped_by() is None
    made.spend(0.9)
    assert made.stopped_by() == "patience"


def test_the_time_left_is_judged_by_this_runs_trials_only() -> None:
    made, clock = budget(trials=100)
    made.done = 50  # an earlier run's
    assert made.eta_s(resumed=50) is None
    clock.now = 20.0
    for _ in range(10):
        made.spend(1.0)
    assert made.eta_s(resumed=50, since_s=10.0) == 40.0


def test_without_a_limit_there_is_no_end() -> None:
    made, clock = budget()
    clock.now = 1e6
    made.spend(1.0)
    assert made.stopped_by() is None
    assert made.eta_s() is None
