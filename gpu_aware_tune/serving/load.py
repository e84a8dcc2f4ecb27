"""Load for a server or an engine: open-loop arrivals, latency from the planned arrival.

Arrivals are drawn beforehand and do not wait for answers, so a server that falls behind is not spared
(no "coordinated omission"). What comes of them is an `Outcome`, as of a simulation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_aware_tune.planning.arrivals import Arrivals, merge
from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.outcome import ModelOutcome, Outcome
from gpu_aware_tune.serving.requests import Refused

if TYPE_CHECKING:
    from gpu_aware_tune.serving.engine import Engine

_LAST_ANSWER_S = 60.0
_SPIN_S = 0.0002  # before a planned arrival: a sleep ends late by about 60 us


@dataclass
class Tally:
    """What came of one model's requests so far."""

    latency_s: list[float] = field(default_factory=list)
    good: int = 0
    refused: int = 0
    failed: int = 0

    def answered(self, latency_s: float, slo_s: float) -> None:
        """Count an answer."""
        self.latency_s.append(latency_s)
        self.good += latency_s <= slo_s


def draw(rates: Sequence[float], arrivals: Arrivals, duration_s: float, seed: int) -> list[Floats]:
    """Arrival times of each model."""
    return [
        arrivals.draw(rate, duration_s, np.random.default_rng((seed, model)))
        for model, rate in enumerate(rates)
    ]


def drive_engine(
    engine: Engine,
    models: Sequence[str],
    streams: Sequence[Floats],
    inputs: Mapping[str, Mapping[str, np.ndarray]],
    duration_s: float,
) -> tuple[Outcome, float]:
    """Send requests to an engine in this process.

    Args:
        engine: serves them.
        models: their names, one for each stream.
        streams: arrival times in seconds, ascending.
        inputs: what is sent to each model.
        duration_s: over which rates are taken.

    Returns:
        What came of them, and the 99th percentile of how late they were sent, in seconds: a
        generator that is late measures itself.
    """
    slo_s = [engine.model(name).slo_s for name in models]
    tallies, lock = [Tally() for _ in models], threading.Lock()
    ended = threading.Semaphore(0)
    before = {name: engine.statistics(name) for name in models}

    def note(model: int, planned_s: float) -> Callable[[Future[Any]], None]:
        def done(future: Future[Any]) -> None:
            latency_s, error = time.monotonic() - planned_s, future.exception()
            with lock:
                if error is None:
                    tallies[model].answered(latency_s, slo_s[model])
                elif isinstance(error, Refused):
                    tallies[model].refused += 1
                else:
                    tallies[model].failed += 1
            ended.release()

        return done

    late_s, sent = [], 0
    begin_s = time.monotonic() + 0.05
    for at_s, model in zip(*merge(streams), strict=True):
        planned_s = begin_s + at_s
        wait_until(planned_s)
        late_s.append(time.monotonic() - planned_s)
        name = models[model]
        try:
            future = engine.submit(name, inputs[name], arrived_s=planned_s)
        except Refused:
            with lock:
                tallies[model].refused += 1
            continue
        sent += 1
        future.add_done_callback(note(model, planned_s))
    for _ in range(sent):
        ended.acquire(timeout=_LAST_ANSWER_S)
    after = {name: engine.statistics(name) for name in models}
    runs = [
        {
            rows: each.count
            - (before[name].batches[rows].count if rows in before[name].batches else 0)
            for rows, each in after[name].batches.items()
        }
        for name in models
    ]
    outcome = as_outcome(
        engine.planned.policy,
        models,
        streams,
        tallies,
        duration_s,
        units=len(engine.status()["cores"]),
        runs=[sum(each.values()) for each in runs],
    )
    return outcome, float(np.percentile(late_s, 99)) if late_s else 0.0


def wait_until(planned_s: float) -> None:
    """Sleep until a time on the clock of `time.monotonic`."""
    while (left_s := planned_s - time.monotonic()) > 0:
        if left_s > _SPIN_S:
            time.sleep(left_s - _SPIN_S)


def as_outcome(
    policy: str,
    models: Sequence[str],
    streams: Sequence[Floats],
    tallies: Sequence[Tally],
    duration_s: float,
    units: int = 1,
    runs: Sequence[int] | None = None,
) -> Outcome:
    """What came of a load; of units and what runs took of them a client knows nothing."""
    counts = runs or [len(tally.latency_s) for tally in tallies]
    rows = zip(models, streams, tallies, counts, strict=True)
    return Outcome(
        policy=policy,
        duration_s=duration_s,
        units=units,
        models=tuple(
            ModelOutcome(
                model=name,
                offered=len(stream),
                good=tally.good,
                refused=len(stream) - len(tally.latency_s),
                runs=count,
                unit_seconds=0.0,
                latency_s=np.sort(np.asarray(tally.latency_s)),
            )
            for name, stream, tally, count in rows
        ),
    )


def random_arrays(engine: Engine, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """An input for each model of an engine."""
    from gpu_aware_tune.model.importer import TensorSpec, random_inputs

    found = {}
    for model in engine.models:
        specs = [TensorSpec(s.name, tuple(abs(n) for n in s.shape), s.dtype) for s in model.inputs]
        found[model.name] = random_inputs(specs, seed)
    return found
