"""What measuring one candidate on one partition gives: seconds, or a failure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FailureKind(StrEnum):
    """What went wrong with a candidate, or with a call in a worker."""

    SCHEDULE = "schedule"
    BUILD = "build"
    BUILD_TIMEOUT = "build-timeout"
    LOAD = "load"
    RUN = "run"
    CRASH = "crash"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    WRONG = "wrong"
    LOST = "lost"
    ERROR = "error"  # of the called function, not of a kernel
    ABANDONED = "abandoned"  # the run stopped


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no number; a value, never an exception."""

    kind: FailureKind
    text: str


@dataclass(frozen=True)
class Measurement:
    """Seconds of one call on one partition, or the failure.

    `spread` is half the width of the middle half of the repeats over their median; `coarse` marks a
    candidate that was dropped after the probe because it was clearly slower than the best.
    `flags` says what disturbed the sample, repeat included ("throttled:heat", "neighbour",
    "clock-drift", "sentinel"); `how` the way it was taken ("graph", "cold-l2", "together");
    `sentinel_ratio` how much longer a fixed kernel took at the last look than at the first.
    """

    seconds: float | None
    spread: float = 0.0
    repeats: int = 0
    coarse: bool = False
    failure: Failure | None = None
    flags: tuple[str, ...] = ()
    how: tuple[str, ...] = ()
    sentinel_ratio: float | None = None

    @staticmethod
    def failed(kind: FailureKind, text: str) -> Measurement:
        """A measurement that did not come about."""
        return Measurement(None, failure=Failure(kind, text))
