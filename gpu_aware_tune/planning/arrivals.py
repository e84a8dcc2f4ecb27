"""When requests arrive: open-loop streams, drawn beforehand and independent of the answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.curve import Floats

ALLOWED = (
    "poisson, uniform, gamma:CV, square:FACTOR or square:FACTOR:PERIOD_S, or the path of a trace"
    " with one arrival time in seconds a line"
)
_SQUARE_PERIOD_S = 10.0


@dataclass(frozen=True)
class Arrivals:
    """A kind of arrival process, at any rate.

    Args:
        kind: "poisson", "uniform", "gamma", "square" or "trace".
        value: of gamma the coefficient of variation, of square how many times the low rate the high
            one is.
        period_s: of square, one high and one low half together.
        trace_s: the arrival times of a trace, ascending from 0.
    """

    kind: str
    value: float = 1.0
    period_s: float = _SQUARE_PERIOD_S
    trace_s: tuple[float, ...] = ()

    def draw(self, rate_per_s: float, duration_s: float, random: np.random.Generator) -> Floats:
        """Arrival times in ascending order, with this mean rate."""
        return _DRAW[self.kind](self, rate_per_s, duration_s, random)


def parse_arrivals(text: str) -> Arrivals:
    """Read what `--arrivals` allows.

    Raises:
        UserError: it is something else, or the trace cannot be used.
    """
    if text in ("poisson", "uniform"):
        return Arrivals(text)
    found = re.fullmatch(r"(gamma|square):([0-9.]+)(?::([0-9.]+))?", text)
    if found is not None and not (found[1] == "gamma" and found[3]):
        try:
            value, period_s = float(found[2]), float(found[3] or _SQUARE_PERIOD_S)
        except ValueError:
            value = period_s = 0.0
        if value > 0 and period_s > 0 and (found[1] == "gamma" or value >= 1):
            return Arrivals(found[1], value, period_s)
    if Path(text).is_file():
        return Arrivals("trace", trace_s=_read_trace(Path(text)))
    raise UserError(f"--arrivals {text!r} is not known; allowed: {ALLOWED}")


def draw_streams(
    arrivals: Arrivals, rates: Sequence[float], duration_s: float, seed: int
) -> list[Floats]:
    """Arrival times of each model, at its rate; another seed draws others."""
    return [
        arrivals.draw(rate, duration_s, np.random.default_rng((seed, model)))
        for model, rate in enumerate(rates)
    ]


def merge(streams: Sequence[Floats]) -> tuple[list[float], list[int]]:
    """The times of all streams in order, and which stream each is of."""
    times = np.concatenate([np.asarray(stream, dtype=np.float64) for stream in streams])
    owners = np.repeat(np.arange(len(streams)), [len(stream) for stream in streams])
    order = np.argsort(times, kind="stable")
    return times[order].tolist(), owners[order].tolist()


def _uniform(_: Arrivals, rate: float, duration_s: float, random: np.random.Generator) -> Floats:
    first = random.uniform(0, 1 / rate)
    return np.asarray(np.arange(first, duration_s, 1 / rate))


def _poisson(_: Arrivals, rate: float, duration_s: float, random: np.random.Generator) -> Floats:
    return _renewal(lambda count: random.exponential(1 / rate, count), rate, duration_s)


def _gamma(about: Arrivals, rate: float, duration_s: float, random: np.random.Generator) -> Floats:
    shape = 1 / about.value**2
    return _renewal(lambda count: random.gamma(shape, 1 / (rate * shape), count), rate, duration_s)


def _square(about: Arrivals, rate: float, duration_s: float, random: np.random.Generator) -> Floats:
    """Poisson at a rate that jumps: drawn at the high one, then thinned in the low halves."""
    high = 2 * rate * about.value / (about.value + 1)
    times = _renewal(lambda count: random.exponential(1 / high, count), high, duration_s)
    is_high = (times % about.period_s) < about.period_s / 2
    return np.asarray(times[is_high | (random.uniform(size=len(times)) < 1 / about.value)])


def _trace(about: Arrivals, rate: float, duration_s: float, random: np.random.Generator) -> Floats:
    """The trace at another speed, so that its mean rate is the one asked for; repeated as needed."""
    times = np.asarray(about.trace_s)
    gap = times[-1] / (len(times) - 1)
    length = times[-1] + gap
    speed = len(times) / length / rate
    start = int(random.integers(len(times)))
    turned = np.sort((times - times[start]) % length) * speed
    repeats = math.ceil(duration_s / (length * speed))
    every = np.concatenate([turned + number * length * speed for number in range(repeats)])
    return np.asarray(every[every < duration_s])


def _renewal(gaps: Callable[[int], Floats], rate: float, duration_s: float) -> Floats:
    """Times from independent gaps, until the duration is reached."""
    count = int(rate * duration_s * 1.1) + 16
    times = np.cumsum(gaps(count))
    while times[-1] < duration_s:
        times = np.concatenate([times, times[-1] + np.cumsum(gaps(count))])
    return np.asarray(times[times < duration_s])


_DRAW: dict[str, Callable[[Arrivals, float, float, np.random.Generator], Floats]] = {
    "uniform": _uniform,
    "poisson": _poisson,
    "gamma": _gamma,
    "square": _square,
    "trace": _trace,
}


def _read_trace(path: Path) -> tuple[float, ...]:
    try:
        lines = path.read_text().split()
        times = np.sort(np.asarray([float(line) for line in lines]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--arrivals {path}: no list of times ({error}): one number a line"
        ) from error
    if len(times) < 2 or not np.isfinite(times).all() or times[0] == times[-1]:
        raise UserError(f"--arrivals {path}: a trace needs at least two different times")
    return tuple((times - times[0]).tolist())
