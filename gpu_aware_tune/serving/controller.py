"""Watches what comes and how long it takes, and has the engine plan anew where that has changed."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

from gpu_aware_tune.errors import TuneError

if TYPE_CHECKING:
    from gpu_aware_tune.serving.engine import Engine

INTERVAL_S = 0.25
_MEMORY_S = 2.0  # time constant of the estimated rates
_PATIENCE_S = 2.0  # between two plans
_CHANGE = 1.25  # of a rate, either way, that a plan is not kept for
_SIGMAS = 3.0  # by which a rate must differ from the planned one, as Poisson arrivals vary
_DRIFT = 1.2  # of run times, either way
_LEAST_PART = 0.05  # of a model's first rate that is always planned for: it may come back
_ROOM = 1.05  # of rates: plans are made for a little more than what is seen


class Controller:
    """A thread that looks at the engine four times a second.

    Args:
        engine: what it watches.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._first = {demand.model: demand.rate_per_s for demand in engine.planned.work.demands}
        self._rates: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._drift: dict[str, float] = {}
        self._looked_s = self._planned_s = time.monotonic()
        self._suspected = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._thread = threading.Thread(target=self._run, name="tune-serve-control", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def rate(self, model: str) -> float:
        """The estimated requests a second of a model."""
        return self._rates.get(model, 0.0)

    def look(self, now_s: float) -> str | None:
        """Bring the estimates up to date; returns why to plan anew, or None."""
        elapsed_s, self._looked_s = now_s - self._looked_s, now_s
        if elapsed_s <= 0:
            return None
        blend = 1 - math.exp(-elapsed_s / _MEMORY_S)
        dispatcher = self._engine.dispatcher
        with dispatcher.lock:
            arrived = {queue.model.name: queue.arrived for queue in dispatcher.layout.queues}
            drifts = {queue.model.name: queue.drift for queue in dispatcher.layout.queues}
        for name, count in arrived.items():
            fresh = (count - self._seen.get(name, 0)) / elapsed_s
            known = self._rates.get(name, fresh)
            self._rates[name] = known + blend * (fresh - known)
        self._seen = arrived
        for name in set(self._rates) - set(arrived):
            del self._rates[name]
        reason = self._reason(drifts)
        self._suspected = self._suspected + 1 if reason else 0
        patient = self._suspected >= 2 and now_s - self._planned_s >= _PATIENCE_S
        return reason if patient else None

    def wanted_rates(self) -> dict[str, float]:
        """What to plan for: what is seen and a little more, and never quite nothing."""
        return {
            name: max(_ROOM * rate, _LEAST_PART * self._first.get(name, 1.0), 1e-3)
            for name, rate in self._rates.items()
        }

    def _reason(self, drifts: dict[str, float]) -> str | None:
        for demand in self._engine.planned.work.demands:
            name, planned = demand.model, demand.rate_per_s
            seen = self.wanted_rates().get(name, planned)
            noise = _SIGMAS * math.sqrt(max(planned, seen) / _MEMORY_S)
            if abs(seen - planned) > noise and not 1 / _CHANGE < seen / planned < _CHANGE:
                return f"{name}: {seen:.3g} requests a second, planned for {planned:.3g}"
            factor = drifts.get(name, 1.0)
            if not 1 / _DRIFT < factor < _DRIFT:
                return f"{name}: runs take {factor:.2f} times as long as planned"
        return None

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            now_s = time.monotonic()
            reason = self.look(now_s)
            if reason is None:
                continue
            self._planned_s, self._suspected = now_s, 0
            dispatcher = self._engine.dispatcher
            with dispatcher.lock:
                queues = dispatcher.layout.queues
                names = {q.model.name: q.drift for q in queues}
            # Of the curve: what is already planned with, times what has come since.
            drift = {name: self._drift.get(name, 1.0) * more for name, more in names.items()}
            try:
                if self._engine.replan(self.wanted_rates(), drift, reason):
                    self._drift = drift
                    for queue in queues:
                        queue.drift = 1.0  # of the new plan's times
            except TuneError as error:  # an SLO that can no longer be met: keep the plan
                self._engine.note("kept", f"{reason}; the plan stays: {error}")
