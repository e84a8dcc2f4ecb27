"""A share of a GPU as a green context: one process, one split of the SMs, a stream for each share.

What confines a kernel is the stream it is launched on, so `timing_context` sets TVM's stream and
nothing else is switched. Memory, modules and events are the primary context's, which TVM uses
anyway.

A fault in one kernel ends the context of the whole process: run these partitions in a worker that
can be replaced.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.driver import call, quietly
from gpu_aware_tune.partition.gpu_partition import GpuPartition
from gpu_aware_tune.partition.shares import Share


@dataclass(frozen=True)
class GreenPlan:
    """What a process splits a GPU into: disjoint slices, and in each the SMs of its shares."""

    index: int
    slices: tuple[tuple[int, ...], ...]


class GreenPartition(GpuPartition):
    """One green context of a plan, and its stream."""

    backend: ClassVar[str] = "green"
    slices_share_worker: ClassVar[bool] = True

    def __init__(self, share: Share, plan: GreenPlan, position: int) -> None:
        super().__init__(share)
        self.ordinal = plan.index
        self._plan = plan
        self._position = position
        self._split: _Split | None = None

    @property
    def stream(self) -> int | None:
        """The raw stream whose kernels stay on this share's SMs, for `tvm_ffi.use_raw_stream`."""
        return None if self._split is None else int(self._split.streams[self._position])

    def env(self) -> dict[str, str]:
        """More hardware queues than the usual eight: shares side by side must not share one."""
        return {**super().env(), "CUDA_DEVICE_MAX_CONNECTIONS": "32"}

    def enter_worker(self) -> None:
        """Split the GPU, unless another partition of the plan did so in this process."""
        super().enter_worker()
        if self._split is None:
            self._split = _acquire(self._plan, self._driver, self.ordinal)

    def verify(self) -> None:
        """Read back the SM count, whose stream it is, and which SMs a kernel on it runs on."""
        driver, split = self._entered(), self._open_split()
        self._check_mps(
            False, "a green context may then grow to the MPS limit; use --partition mps"
        )
        context, stream = split.contexts[self._position], split.streams[self._position]
        got = call(driver.cuGreenCtxGetDevResource, context, _sm_kind(driver)).sm.smCount
        if got != self.share.units:
            raise SetupError(
                f"the green context has {got} SMs where {self.share.units} were promised"
            )
        owner = call(driver.cuStreamGetGreenCtx, stream)
        if int(owner) != int(context):
            raise SetupError(
                "the stream does not belong to the green context: it would use every SM"
            )
        self._probe_sms("the green context's stream")

    def close(self) -> None:
        """Let go of the split; the last partition that does so destroys it."""
        sentinel, self._sentinel = self._sentinel, None
        if sentinel is not None:
            sentinel.close()  # before its stream
        split, self._split = self._split, None
        if split is not None:
            _release(split)
        super().close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_split": None}

    def _make_stream(self) -> None:
        """The stream comes with the split."""

    def _open_split(self) -> _Split:
        self._entered()
        if self._split is None:
            raise SetupError(
                "this process has not entered the partition: call enter_worker() first"
            )
        return self._split


def plan_partitions(shares: Sequence[Share], disjoint: bool) -> list[GreenPartition]:
    """The partitions of one plan, in the order of `shares`, which may overlap or not."""
    slices = [[share] for share in shares] if disjoint else [shares]
    return [partition for own in place_slices(slices) for partition in own]


def place_slices(slices: Sequence[Sequence[Share]]) -> list[list[GreenPartition]]:
    """The partitions of one plan: slices are disjoint, the shares in one of them overlap."""
    device = slices[0][0].device
    sizes = tuple(tuple(share.units for share in own) for own in slices)
    needed = sum(map(max, sizes))
    if needed > device.units_total:
        raise SetupError(
            f"shares side by side need {needed} SMs and {device.name} has {device.units_total}"
        )
    plan = GreenPlan(device.index, sizes)
    position = itertools.count()
    return [[GreenPartition(share, plan, next(position)) for share in own] for own in slices]


@dataclass
class _Split:
    """The green contexts and streams of one plan, and what undoes them."""

    plan: GreenPlan
    contexts: list[Any]
    streams: list[Any]
    undo: contextlib.ExitStack
    users: int = 0


_splits: dict[GreenPlan, _Split] = {}  # of this process: one split serves every partition of a plan


_splitting = threading.Lock()  # shares that measure together enter from a thread each


def _acquire(plan: GreenPlan, driver: Any, ordinal: int) -> _Split:
    with _splitting:
        split = _splits.get(plan)
        if split is None:
            split = _splits[plan] = _open(plan, driver, ordinal)
        split.users += 1
        return split


def _release(split: _Split) -> None:
    with _splitting:
        split.users -= 1
        if split.users == 0:
            _splits.pop(split.plan, None)
            split.undo.close()


def _open(plan: GreenPlan, driver: Any, ordinal: int) -> _Split:
    with contextlib.ExitStack() as undo:
        device = call(driver.cuDeviceGet, ordinal)
        whole = call(driver.cuDeviceGetDevResource, device, _sm_kind(driver))
        contexts, streams = [], []
        for resources in _resources(driver, whole, plan):
            context = _context(driver, device, resources)
            undo.callback(quietly, driver.cuGreenCtxDestroy, context)
            flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
            stream = call(driver.cuGreenCtxStreamCreate, context, flags, 0)
            undo.callback(quietly, driver.cuStreamDestroy, stream)  # before its context
            undo.callback(quietly, driver.cuStreamSynchronize, stream)
            contexts.append(context)
            streams.append(stream)
        return _Split(plan, contexts, streams, undo.pop_all())


def _resources(driver: Any, whole: Any, plan: GreenPlan) -> list[list[Any]]:
    """The SM groups of each share."""
    if len(plan.slices) > 1:
        return _disjoint(driver, whole, plan.slices)
    # Measured one after the other, so they may overlap: a split of its own gives a share the
    # best-connected SMs.
    return [
        [whole] if size == whole.sm.smCount else _groups(driver, whole, 1, size)
        for size in plan.slices[0]
    ]


def _disjoint(driver: Any, whole: Any, slices: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Deal out the equal groups of one split; groups of different splits may overlap."""
    size = math.gcd(*(units for sizes in slices for units in sizes))
    groups = iter(_groups(driver, whole, sum(map(max, slices)) // size, size))
    resources = []
    for sizes in slices:
        own = list(itertools.islice(groups, max(sizes) // size))
        resources += [own[: units // size] for units in sizes]
    return resources


def _groups(driver: Any, whole: Any, count: int, size: int) -> list[Any]:
    groups, made, _rest = call(driver.cuDevSmResourceSplitByCount, count, whole, 0, size)
    got = [group.sm.smCount for group in groups[:made]]
    if got != [size] * count:
        raise SetupError(
            f"the GPU's SMs split into groups of {got or 'nothing'} where {count} of {size} were "
            "asked for: ask for smaller or fewer shares, or fewer --slices"
        )
    return list(groups[:made])


def _context(driver: Any, device: Any, resources: list[Any]) -> Any:
    description = call(driver.cuDevResourceGenerateDesc, resources, len(resources))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM.value
    return call(driver.cuGreenCtxCreate, description, device, flags)


def _sm_kind(driver: Any) -> Any:
    return driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
