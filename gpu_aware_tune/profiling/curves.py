"""Points of a curve, measured side by side: what runs where, in turns, and what comes of it.

Every point has a worker process of its own inside its share. The points take turns in short slices,
round after round, so that whatever drifts on the machine (clocks, heat, neighbours) meets all of
them alike; each figure is the median over the rounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import select
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.library.batches import leading_extent
from gpu_aware_tune.measure.timing import quantile
from gpu_aware_tune.partition import Partition
from gpu_aware_tune.partition.nvml import Nvml
from gpu_aware_tune.profiling.knee import efficacy, knees
from gpu_aware_tune.workers import Worker, WorkerHost

_SETTLE_S = 0.02  # idle threads of the point before spin for half of that
_START_TIMEOUT_S = 120.0
_SLICE_TIMEOUT_S = 120.0  # besides what the slice should take: one run of a slow model

Spec = tuple[str, tuple[int, ...], str]  # name, shape and dtype of an input


@dataclass(frozen=True)
class Point:
    """One share and batch size, measured.

    Args:
        units: cores or SMs it ran on; `percent` is the smallest `--gpu-pct` that gives them.
        batch: inferences in one run: the leading extent of the model's first input.
        tuned_at: the units that the library which ran was tuned for.
        latency_ms: median of one run of a whole batch; `p10_ms` and `p90_ms` likewise.
        throughput_per_s: inferences a second, one run after the other.
        efficacy: D-STACK's, see `profiling.knee.efficacy`.
        runs: how many were timed.
        power_w: of the whole GPU while it ran, idle parts included; None on a CPU, or where NVML
            does not tell.
        energy_j: what one inference took of that.
    """

    units: int
    percent: int
    batch: int
    tuned_at: int
    latency_ms: float
    p10_ms: float
    p90_ms: float
    throughput_per_s: float
    efficacy: float
    runs: int
    power_w: float | None = None
    energy_j: float | None = None


@dataclass(frozen=True)
class Curve:
    """A model's points, by batch size and units in ascending order."""

    model: str
    device: str
    backend: str
    unit: str  # "core" or "SM"
    units_total: int
    points: tuple[Point, ...]

    @property
    def knees(self) -> dict[int, int]:
        """The units of the knee (see `profiling.knee`) by batch size."""
        return knees(self.points)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        facts = dataclasses.asdict(self)
        return {**facts, "knees": {str(batch): units for batch, units in self.knees.items()}}


@dataclass(frozen=True)
class Subject:
    """What runs at one point, and where."""

    partition: Partition
    library: Path
    weights: Path
    specs: tuple[Spec, ...]
    tuned_at: int
    entry: str = "main"


def batch_of(specs: Sequence[Spec]) -> int:
    """Inferences in one run."""
    return leading_extent(shape for _, shape, _ in specs)


def measure(
    host: WorkerHost,
    subjects: Sequence[Subject],
    seconds: float,
    rounds: int,
    progress: Callable[[float], None] | None = None,
) -> list[Point]:
    """Measure every subject, all of them in turn, `rounds` times."""
    slices: list[list[_Slice]] = [[] for _ in subjects]
    device = subjects[0].partition.share.device
    meter = Nvml(device.uuid or device.index) if device.kind == "cuda" else None
    with contextlib.ExitStack() as stack:
        if meter is not None:
            stack.enter_context(meter)
        workers = [_start(host, subject, stack) for subject in subjects]
        for worker, subject in zip(workers, subjects, strict=True):
            _receive(worker, subject, _START_TIMEOUT_S)
        done, every = 0, rounds * len(subjects)
        for number in range(rounds):
            order = range(len(subjects))
            for position in order if number % 2 == 0 else reversed(order):  # drift cancels out
                time.sleep(_SETTLE_S)
                slices[position].append(
                    _slice(workers[position], subjects[position], seconds, meter)
                )
                done += 1
                if progress is not None:
                    progress(done / every)
    return [_point(subject, taken) for subject, taken in zip(subjects, slices, strict=True)]


def serve(
    connection: Connection,
    partition: Partition,
    library: str,
    weights: str,
    specs: Sequence[Spec],
    entry: str,
) -> None:
    """Run one point's library inside its share, a slice for each request (in the worker)."""
    from gpu_aware_tune.library import open_vm
    from gpu_aware_tune.model.importer import TensorSpec, random_inputs

    partition.enter_worker()
    partition.verify()
    inputs = random_inputs([TensorSpec(*spec) for spec in specs], seed=0)
    with partition.timing_context():
        timer = open_vm(library, weights, partition.ordinal, entry).timer(inputs)
        connection.send(None)
        gc.disable()  # no collection in the middle of a timing
        while True:
            connection.send(timer(connection.recv()))


@dataclass(frozen=True)
class _Slice:
    """The runs of one slice; `energy_j` is the whole GPU's over `elapsed_s`."""

    samples_s: list[float]
    elapsed_s: float
    energy_j: float | None


def _start(host: WorkerHost, subject: Subject, stack: contextlib.ExitStack) -> Worker:
    partition = subject.partition
    args = (str(subject.library), str(subject.weights), subject.specs, subject.entry)
    worker = host.spawn(serve, partition, *args, env=partition.env())
    stack.callback(worker.kill)
    return worker


def _receive(worker: Worker, subject: Subject, timeout_s: float) -> Any:
    """A worker's answer; a worker that died or hangs ends the profile with its last words."""
    if not select.select([worker], [], [], timeout_s)[0]:
        raise TuneError(
            f"profiling {subject.library.name} on {subject.partition} gave no answer in"
            f" {timeout_s:.0f} s"
        )
    try:
        return worker.recv()
    except EOFError:
        raise TuneError(
            f"profiling {subject.library.name} on {subject.partition} failed: {worker.kill().text}"
        ) from None


def _slice(worker: Worker, subject: Subject, seconds: float, meter: Nvml | None) -> _Slice:
    before_j = _energy_j(meter)
    start = time.perf_counter()
    worker.send(seconds)
    samples: list[float] = _receive(worker, subject, seconds + _SLICE_TIMEOUT_S)
    elapsed_s = time.perf_counter() - start
    after_j = _energy_j(meter)
    spent_j = None if before_j is None or after_j is None else after_j - before_j
    return _Slice(samples, elapsed_s, spent_j)


def _energy_j(meter: Nvml | None) -> float | None:
    return None if meter is None else meter.snapshot().energy_j


def _point(subject: Subject, slices: Sequence[_Slice]) -> Point:
    share, batch = subject.partition.share, batch_of(subject.specs)
    medians, p10s, p90s, rates = [], [], [], []
    for taken in slices:
        timed = taken.samples_s[1:] or taken.samples_s  # the first finds cold caches
        medians.append(statistics.median(timed))
        p10s.append(quantile(timed, 0.1))
        p90s.append(quantile(timed, 0.9))
        rates.append(batch * len(timed) / sum(timed))
    latency_s, rate = statistics.median(medians), statistics.median(rates)
    power_w, energy_j = _power(slices, batch)
    return Point(
        units=share.units,
        percent=share.percent,
        batch=batch,
        tuned_at=subject.tuned_at,
        latency_ms=1e3 * latency_s,
        p10_ms=1e3 * statistics.median(p10s),
        p90_ms=1e3 * statistics.median(p90s),
        throughput_per_s=rate,
        efficacy=efficacy(rate, latency_s, share.units / share.device.units_total),
        runs=sum(len(taken.samples_s) for taken in slices),
        power_w=power_w,
        energy_j=energy_j,
    )


def _power(slices: Sequence[_Slice], batch: int) -> tuple[float | None, float | None]:
    """Watts and joules an inference: over all rounds, as the GPU's counter moves in coarse steps."""
    spent = [taken.energy_j for taken in slices if taken.energy_j is not None]
    if len(spent) < len(slices) or not spent:
        return None, None
    inferences = batch * sum(len(taken.samples_s) for taken in slices)
    return sum(spent) / sum(taken.elapsed_s for taken in slices), sum(spent) / inferences
