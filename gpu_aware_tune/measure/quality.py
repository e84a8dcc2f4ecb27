"""Whether a sample can be believed: looks at the GPU around it, repeats it once, says what stays.

Nothing can be locked without root, so what disturbs is noticed instead: throttling, neighbours,
clocks that move, and, by a fixed sentinel kernel every now and then, whatever else makes the GPU
slower than it was.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from gpu_aware_tune.measure.measurement import Measurement
from gpu_aware_tune.measure.timing import Timer, TimingPolicy, measure
from gpu_aware_tune.partition import Snapshot, disturbances

_SENTINEL_EVERY = 32  # jobs
SENTINEL_DRIFT = 0.03  # a sentinel further from its first time than this flags the samples
_PAUSE_S = 0.05  # before a repeat: clocks that fell come back


class DisturbanceMonitor:
    """Takes samples of one share and flags the disturbed ones.

    Args:
        look: one quick_snapshot at the GPU.
        sentinel_s: seconds of the sentinel kernel now, or None where there is none.
        pause: waits so many seconds before a repeat.
    """

    def __init__(
        self,
        look: Callable[[], Snapshot],
        sentinel_s: Callable[[], float | None],
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._look = look
        self._sentinel_s = sentinel_s
        self._pause = pause
        self._jobs = 0
        self._first_sentinel_s: float | None = None
        self._ratio: float | None = None
        self._lasting: tuple[str, ...] = ()  # flags that a repeat did not get rid of

    def measure(self, timer: Timer, best_s: float | None, timing: TimingPolicy) -> Measurement:
        """Like `timing.measure`, with flags; a flagged sample is taken again once.

        A disturbance that outlasted a repeat is not waited for again until a sample was without it.
        """
        self._check_sentinel()
        result = self._attempt(timer, best_s, timing)
        if result.flags and result.flags != self._lasting:
            self._pause(_PAUSE_S)
            again = self._attempt(timer, best_s, timing)
            result = min(result, again, key=_trust)
        self._lasting = result.flags
        return dataclasses.replace(
            result, flags=(*result.flags, *self._sentinel_flags()), sentinel_ratio=self._ratio
        )

    def _attempt(self, timer: Timer, best_s: float | None, timing: TimingPolicy) -> Measurement:
        before: list[Snapshot] = []

        def looked(number: int, repeat: int) -> Sequence[float]:
            samples = timer(number, repeat)
            if not before:  # not earlier: an idle GPU's clocks are down
                before.append(self._look())
            return samples

        result = measure(looked, best_s, timing)
        return dataclasses.replace(result, flags=disturbances(before[0], self._look()))

    def _check_sentinel(self) -> None:
        due = self._jobs % _SENTINEL_EVERY == 0
        self._jobs += 1
        seconds = self._sentinel_s() if due else None
        if seconds is None:
            return
        self._first_sentinel_s = self._first_sentinel_s or seconds
        self._ratio = seconds / self._first_sentinel_s

    def _sentinel_flags(self) -> tuple[str, ...]:
        far = self._ratio is not None and abs(self._ratio - 1) > SENTINEL_DRIFT
        return ("sentinel",) if far else ()


def _trust(result: Measurement) -> tuple[int, float]:
    """Fewer flags first, then the faster one: disturbances only ever add time."""
    return len(result.flags), result.seconds or 0.0
