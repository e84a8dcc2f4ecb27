"""Every worker that one machine gives to a run: searchers, build workers, measuring workers.

What a machine needs to know to start them is `PoolSettings`, which can be sent to another one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from gpu_aware_tune.codegen.build_pool import BuildPool
from gpu_aware_tune.codegen.cuda_toolchain import environment
from gpu_aware_tune.measure import BaseMeasurer, Measurer, SharedWorker, Slice
from gpu_aware_tune.partition import Device, Partition, Share, open_slices, usable_cores
from gpu_aware_tune.search.best_artifacts import BestArtifacts
from gpu_aware_tune.search.candidates import Searcher, SearchSettings
from gpu_aware_tune.search.pipeline import Pipeline, TaskSpec
from gpu_aware_tune.workers import WorkerHost


@dataclass(frozen=True)
class PoolSettings:
    """What the workers of one machine are started with.

    Args:
        device: what is tuned on.
        backend: of the partitions.
        slices: for each slice the shares that are measured in it, the largest first; none: kernels
            are only built here, and the device need not be here.
        target: JSON of TVM's target.
        search: how TVM's search is run.
        build_timeout_s, run_timeout_s: limits of one build and one measurement.
        memory_bytes: limit of one worker.
    """

    device: Device
    backend: str
    slices: tuple[tuple[Share, ...], ...]
    target: Mapping[str, Any]
    search: SearchSettings
    build_timeout_s: float
    run_timeout_s: float
    memory_bytes: int


class Pools:
    """The workers, started, and the best of what they have built; a context manager that ends them."""

    partitions: list[Partition]
    builders: BuildPool
    pipeline: Pipeline

    def __init__(self, host: WorkerHost, settings: PoolSettings) -> None:
        self._host = host
        self._settings = settings
        self._stack = contextlib.ExitStack()
        self._measurers: list[BaseMeasurer] = []
        self.best = BestArtifacts()

    def __enter__(self) -> Pools:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def start(self, tasks: Mapping[str, TaskSpec], modules: Mapping[str, str]) -> str:
        """Start every worker.

        Args:
            tasks: what is going to be measured, by hash.
            modules: JSON of each task's unscheduled module.

        Returns:
            One line for people: how many workers of which kind.

        Raises:
            SetupError: a partition cannot be had, or is not what it should be.
        """
        settings = self._settings
        opened = (
            open_slices(settings.slices, settings.device, settings.backend)
            if settings.slices
            else []
        )
        self.partitions = [partition for group in opened for partition in group]
        for partition in self.partitions:
            self._stack.callback(partition.close)
        shared = len(opened) > 1 and opened[0][0].slices_share_worker
        slices = [Slice(measurers) for measurers in self._measurers_on(opened, shared)]
        cores = available_cores()
        searchers, builders = worker_counts(cores)
        target = dict(settings.target)
        self._host.load_intrinsics(str(target["kind"]))
        self.builders = BuildPool(
            self._host,
            target,
            builders,
            settings.build_timeout_s,
            settings.memory_bytes,
            _build_environment(settings.device),
        )
        self._stack.callback(self.builders.close)
        for task, module_json in modules.items():
            self.builders.add_task(task, module_json)
        self.pipeline = Pipeline(
            tasks,
            [Searcher(self._host, target, settings.search, n) for n in range(searchers)],
            self.builders,
            slices,
            cores,
            low_water=max(2 * builders, settings.search.per_draft // 2),
            best=self.best,
        )
        text = f"{builders} build workers, {searchers} search workers"
        if slices:
            text += f", partition {settings.backend}"
        if len(slices) > 1:
            text += f", {len(slices)} slices"
        return text + " in one worker" if shared else text

    @property
    def target(self) -> Mapping[str, Any]:
        """JSON of the target that kernels are built for."""
        return self._settings.target

    def partition_of(self, units: int) -> Partition:
        """A partition with so many units."""
        return next(p for p in self.partitions if p.share.units == units)

    def measurer_of(self, units: int) -> BaseMeasurer:
        """A worker that measures on so many units."""
        return next(measurer for measurer in self._measurers if measurer.units == units)

    def evidence(self, units: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
        """What the partitions' checks saw, by units: one for each slice that has them."""
        return {
            str(wanted): [m.evidence for m in self._measurers if m.units == wanted]
            for wanted in units
        }

    def _measurers_on(
        self, slices: Sequence[Sequence[Partition]], shared: bool
    ) -> Sequence[Sequence[BaseMeasurer]]:
        """What measures on the partitions: a worker for each, or a shared one."""
        settings = self._settings
        limits = settings.run_timeout_s, settings.memory_bytes
        groups: Sequence[Sequence[BaseMeasurer]]
        if shared:
            groups = SharedWorker(self._host, slices, *limits).slices
        else:
            groups = [[Measurer(self._host, part, *limits) for part in own] for own in slices]
        for measurer in (measurer for group in groups for measurer in group):
            self._stack.callback(measurer.close)
            measurer.open()
            self._measurers.append(measurer)
        return groups


def _build_environment(device: Device) -> dict[str, str]:
    """What build workers need besides; they also run kernels to check them, on the run's own GPU."""
    if device.kind != "cuda":
        return {}
    shown = {"CUDA_VISIBLE_DEVICES": device.uuid} if device.uuid else {}
    return {**environment(), **shown}


def plan_slices(
    shares: Sequence[Share], device: Device, most: int, instances: Sequence[int] | None = None
) -> tuple[tuple[Share, ...], ...]:
    """Divide a device into slices that measure side by side.

    The largest shares come first; a share that finds no room of its own is measured in a slice that
    is at least as large. Where room is left, more slices of the smallest share follow.

    Args:
        shares: one for each model; equal ones may be given several times.
        device: what is divided.
        most: how many slices at most.
        instances: the units of each part, where the device is divided already (MIG).

    Returns:
        For each slice the shares that can be measured in it, the largest first.
    """
    ordered = sorted(shares, key=lambda share: -share.units)
    distinct = list({share.units: share for share in ordered}.values())
    if instances is not None:
        return _deal_instances(ordered, distinct, list(instances), most)
    widest: list[Share] = []
    free = device.units_total
    for share in ordered:
        if share.units <= free and len(widest) < most:
            widest.append(share)
            free -= share.units
    while widest and len(widest) < most and ordered[-1].units <= free:
        widest.append(ordered[-1])
        free -= ordered[-1].units
    return tuple(tuple(s for s in distinct if s.units <= own.units) for own in widest)


def _deal_instances(
    ordered: Sequence[Share], distinct: Sequence[Share], free: list[int], most: int
) -> tuple[tuple[Share, ...], ...]:
    """A slice for each share, in an instance of its size; equal ones may have to take turns.

    Sizes that are left when there are `most` slices are measured in turns with the last slice,
    each in an instance of its own.
    """
    slices: list[list[Share]] = []
    for share in distinct:  # every size has an instance before any has a second one
        if share.units in free:
            free.remove(share.units)
        if len(slices) < most:
            slices.append([share])
        else:
            slices[-1].append(share)
    again = [share for share in ordered if not any(share is first for first in distinct)]
    for share in [*again, *[ordered[-1]] * most]:
        if len(slices) < most and share.units in free:
            free.remove(share.units)
            slices.append([share])
    return tuple(tuple(own) for own in slices)


def worker_counts(cores: int) -> tuple[int, int]:
    """How many searchers and builders to start: every core can build, a quarter can search."""
    return max(1, cores // 4), max(1, cores)


def available_cores() -> int:
    """The cores this process may run on: its affinity and its group's quota."""
    return len(usable_cores())
