"""A thread that calls a function at a time which may be moved."""

from __future__ import annotations

import threading
from collections.abc import Callable

from gpu_aware_tune.serving.requests import Clock


class Waker:
    """Calls a function at a time that may be moved."""

    def __init__(self, function: Callable[[], None], clock: Clock) -> None:
        self._function, self._clock = function, clock
        self._condition = threading.Condition()
        self._at_s: float | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="tune-serve-wake", daemon=True)
        self._thread.start()

    def set(self, at_s: float | None) -> None:
        """Call the function at that time, or not at all."""
        if at_s == self._at_s:
            return
        with self._condition:
            sooner = at_s is not None and (self._at_s is None or at_s < self._at_s)
            self._at_s = at_s
            if sooner:
                self._condition.notify()

    def stop(self) -> None:
        """End the thread."""
        with self._condition:
            self._stopped = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._stopped:
                    at_s = self._at_s
                    left_s = None if at_s is None else at_s - self._clock()
                    if left_s is not None and left_s <= 0:
                        self._at_s = None
                        break
                    self._condition.wait(left_s)
                if self._stopped:
                    return
            self._function()
