"""One object that knows when a search has to stop: trials, time, patience."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gpu_aware_tune.events import StoppedBy


@dataclass
class StopRequest:
    """A wish to end a search early and to export the best so far, such as the first Ctrl-C."""

    requested: bool = False

    def request(self) -> None:
        """End the search after what is under way; may be called from a signal handler."""
        self.requested = True


@dataclass
class Budget:
    """Trials, seconds and patience of a search; the clock is passed in, so that tests need not wait.

    Args:
        trials: most trials, or None.
        time_s: most seconds from the first `start`, or None.
        patience: trials without a better model latency (by at least 0.5 %) after which to stop; 0: never.
    """

    trials: int | None
    time_s: float | None
    patience: int
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    _start: float = field(default=0.0, init=False)
    _best: float = field(default=float("inf"), init=False)
    _best_at: int = field(default=0, init=False)

    def start(self) -> None:
        """Start the clock; patience counts from here, not from what an earlier run has `done`."""
        self._start, self._best_at = self.clock(), self.done

    def elapsed_s(self) -> float:
        """Seconds since `start`."""
        return self.clock() - self._start

    def spend(self, latency: float) -> None:
        """Count one trial; `latency` is the model's after it (any unit)."""
        self.done += 1
        if latency < self._best * 0.995:
            self._best, self._best_at = latency, self.done

    def left(self) -> int:
        """How many more trials may be started; a large number when only time limits."""
        return (1 << 30) if self.trials is None else max(0, self.trials - self.done)

    def stopped_by(self) -> StoppedBy | None:
        """Why the search has to stop now; None to go on."""
        if self.left() == 0:
            return StoppedBy.TRIALS
        if self.time_s is not None and self.elapsed_s() >= self.time_s:
            return StoppedBy.TIME
        if self.patience and self.done - self._best_at >= self.patience:
            return StoppedBy.PATIENCE
        return None

    def eta_s(self, resumed: int = 0, since_s: float = 0.0) -> float | None:
        """Seconds left, judged by this run's trials; None before there is anything to judge by.

        Args:
            resumed: trials of `done` that an earlier run spent.
            since_s: when, on this budget's clock, this run's first trial started.
        """
        elapsed = self.elapsed_s()
        guesses = []
        if self.time_s is not None:
            guesses.append(max(0.0, self.time_s - elapsed))
        if self.trials is not None and self.done > resumed:
            guesses.append((elapsed - since_s) / (self.done - resumed) * self.left())
        return min(guesses) if guesses else None
