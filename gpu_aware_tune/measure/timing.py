"""Adaptive timing: measure as little as decides.

A probe of about a millisecond comes first. A candidate clearly slower than the best one known stops
there; the others are repeated until the spread is small or the time is used up. The timer is passed
in, so that the policy is tested without a device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu_aware_tune.measure.measurement import Measurement

# (number, repeat) -> seconds of one call, one value a repeat; TVM's time_evaluator has this shape.
Timer = Callable[[int, int], Sequence[float]]


@dataclass(frozen=True)
class TimingPolicy:
    """How often and how long one candidate is timed.

    Args:
        probe_s: length of the probe.
        repeat_s: least length of one repeat.
        min_repeats, max_repeats: how many repeats a promising candidate gets.
        budget_s: the repeats stop when they took this long together.
        spread: they also stop when the relative spread is below this.
        drop_ratio: a probe this many times slower than the best is not looked at further.
        leave_ratio: kernels that are compared leave when they are this many times slower than the
            best, and their own spread on top.
        cold: empty a GPU's L2 before each call; by default a call finds it as the one before left
            it, which is how the kernels of a model that fits follow one another.
    """

    probe_s: float = 0.001
    repeat_s: float = 0.002
    min_repeats: int = 3
    max_repeats: int = 12
    budget_s: float = 0.05
    spread: float = 0.01
    drop_ratio: float = 1.4
    leave_ratio: float = 1.03
    cold: bool = False


SEARCH = TimingPolicy()
RETIME = TimingPolicy(
    probe_s=0.005, repeat_s=0.002, min_repeats=15, max_repeats=151, budget_s=0.4, spread=0.002
)
LONG = TimingPolicy(
    probe_s=0.01, repeat_s=0.1, min_repeats=10, max_repeats=10, budget_s=60, spread=0.0
)


def compare(timers: Sequence[Timer], timing: TimingPolicy) -> list[Measurement]:
    """Time several kernels in turns, so that what drifts on the machine meets all of them alike.

    A kernel that is clearly behind after the least number of repeats leaves; what it took is then
    told against the best of those turns, since the later ones may meet another machine.

    Args:
        timers: one for each kernel, see `measure`.
        timing: length and number of the repeats.
    """
    numbers = []
    for timer in timers:
        probe = min(timer(1, 3))
        numbers.append(max(1, math.ceil(timing.repeat_s / max(probe, 1e-9))))
    samples: list[list[float]] = [[] for _ in timers]
    behind: dict[int, float] = {}  # how many times the best's seconds, of those that have left
    racing = list(range(len(timers)))
    used_s = 0.0
    for turn in range(timing.max_repeats):
        for place in racing if turn % 2 == 0 else reversed(racing):
            (seconds,) = timers[place](numbers[place], 1)
            samples[place].append(seconds)
            used_s += seconds * numbers[place]
        if turn + 1 < timing.min_repeats:
            continue
        best_s = min(percentile_10(samples[place]) for place in racing)
        for place in list(racing):
            ratio = percentile_10(samples[place]) / best_s
            if ratio > timing.leave_ratio + spread_of(samples[place]):
                behind[place] = ratio
                racing.remove(place)
        decided = len(racing) == 1 or all(spread_of(samples[p]) < timing.spread for p in racing)
        if decided or used_s > timing.budget_s * len(timers):
            break
    best_s = min(percentile_10(samples[place]) for place in racing)
    return [
        Measurement(
            best_s * behind[place] if place in behind else percentile_10(each),
            spread_of(each),
            len(each),
        )
        for place, each in enumerate(samples)
    ]


def spread_of(samples: Sequence[float]) -> float:
    """Half the interquartile range over the median; infinite for fewer than three samples."""
    if len(samples) < 3:
        return math.inf
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / middle


def percentile_10(samples: Sequence[float]) -> float:
    """What a call takes undisturbed: on a shared machine disturbances only ever add time."""
    return min(samples) if len(samples) < 3 else quantile(samples, 0.1)


def quantile(samples: Sequence[float], part: float) -> float:
    """What this part of the samples stays below, by linear interpolation as NumPy's."""
    ordered = sorted(samples)
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(timer: Timer, best_s: float | None, timing: TimingPolicy = SEARCH) -> Measurement:
    """Time one candidate.

    Args:
        timer: runs `number` calls `repeat` times and gives seconds a call for each repeat.
        best_s: the best seconds known for this task on this partition, or None.
        timing: when to stop.
    """
    first = min(timer(1, 1))
    number = max(1, min(10_000, math.ceil(timing.probe_s / max(first, 1e-9))))
    probe = first if number == 1 else min(timer(number, 1))
    if best_s is not None and probe > timing.drop_ratio * best_s:
        return Measurement(probe, repeats=1, coarse=True)
    number = max(1, math.ceil(timing.repeat_s / max(probe, 1e-9)))
    samples: list[float] = []
    while len(samples) < timing.max_repeats:
        batch = timing.min_repeats if not samples else 2
        samples.extend(timer(number, min(batch, timing.max_repeats - len(samples))))
        used_s = sum(samples) * number
        if used_s > timing.budget_s or spread_of(samples) < timing.spread:
            break
    return Measurement(percentile_10(samples), spread_of(samples), len(samples))
