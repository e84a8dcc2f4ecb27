"""Load for a server or an engine: open-loop arrivals, latency from the planned arrival.

Arrivals are drawn beforehand and do not wait for answers, so a server that falls behind is not spared
(no "coordinated omission"). What comes of them is an `Outcome`, as of a simulation.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_aware_tune.planning.arrivals import merge
from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.outcome import ModelOutcome, Outcome
from gpu_aware_tune.serving.requests import Refused

if TYPE_CHECKING:
    from gpu_aware_tune.serving.engine import Engine

_LEAD_S = 0.1  # until the first planned time
_LAST_ANSWER_S = 60.0
_SPIN_S = 0.0002  # before a planned arrival: a sleep ends late by about 60 us


@dataclass
class Tally:
    """What came of one model's requests so far."""

    latency_s: list[float] = field(default_factory=list)
    good: int = 0
    failed: int = 0

    def answered(self, latency_s: float, slo_s: float) -> None:
        """Count an answer."""
        self.latency_s.append(latency_s)
        self.good += latency_s <= slo_s


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
    before = [_runs(engine, name) for name in models]

    def note(model: int, planned_s: float) -> Callable[[Future[Any]], None]:
        def done(future: Future[Any]) -> None:
            latency_s, error = time.monotonic() - planned_s, future.exception()
            with lock:
                if error is None:
                    tallies[model].answered(latency_s, slo_s[model])
                elif not isinstance(error, Refused):
                    tallies[model].failed += 1
            ended.release()

        return done

    late_s, sent = [], 0
    begin_s = time.monotonic() + _LEAD_S
    for at_s, model in zip(*merge(streams), strict=True):
        planned_s = begin_s + at_s
        wait_until(planned_s)
        late_s.append(time.monotonic() - planned_s)
        name = models[model]
        with contextlib.suppress(Refused):
            future = engine.submit(name, inputs[name], arrived_s=planned_s)
            sent += 1
            future.add_done_callback(note(model, planned_s))
    for _ in range(sent):
        ended.acquire(timeout=_LAST_ANSWER_S)
    runs = [_runs(engine, name) - count for name, count in zip(models, before, strict=True)]
    units = len(engine.status()["cores"])
    policy = engine.planned.policy
    return as_outcome(policy, models, streams, tallies, duration_s, units, runs), p99(late_s)


async def send_as_planned(
    streams: Sequence[Floats], send: Callable[[int, float], Coroutine[Any, Any, None]]
) -> float:
    """Send requests at their times, whether or not answers come, and wait for all answers.

    Args:
        streams: arrival times of each model.
        send: sends one of a model, which was planned for a time on the clock of `time.monotonic`.

    Returns:
        The 99th percentile of how late they were sent, in seconds.
    """
    late_s: list[float] = []
    begin_s = time.monotonic() + _LEAD_S
    async with asyncio.TaskGroup() as sent:
        for at_s, model in zip(*merge(streams), strict=True):
            planned_s = begin_s + at_s
            if (left_s := planned_s - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            late_s.append(time.monotonic() - planned_s)
            sent.create_task(send(model, planned_s))
    return p99(late_s)


def p99(seconds: Sequence[float]) -> float:
    """The 99th percentile; 0 of nothing."""
    return float(np.percentile(seconds, 99)) if seconds else 0.0


def _runs(engine: Engine, model: str) -> int:
    return sum(runs.count for runs in engine.statistics(model).batches.values())


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
