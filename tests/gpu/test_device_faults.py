"""An illegal access, a hang and too little memory each end one candidate, and the run goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from gpu_aware_tune.measure import SEARCH, Job, Measurer, SharedWorker
from gpu_aware_tune.partition import (
    Device,
    Partition,
    open_partitions,
    open_slices,
    probe_backends,
    share_of,
)
from gpu_aware_tune.partition.driver import call, started_driver
from gpu_aware_tune.workers import WorkerHost

BACKENDS = ("green", "full", "mps")


def opened(gpu: Device, backend: str, count: int = 1) -> list[Partition]:
    check = next(each for each in probe_backends() if each.backend == backend)
    if not check.ok:
        pytest.skip(check.reason)
    shares = [share_of(gpu, 100 if backend == "full" else 25, backend)] * count
    return open_partitions(shares, gpu, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "failure"), [("illegal", "run"), ("hang", "timeout"), ("memory", "memory")]
)
def test_a_fault_is_one_candidates(
    host: WorkerHost, gpu: Device, artifacts: dict[str, str], backend: str, kind: str, failure: str
) -> None:
    from gpu.kernels import job

    (partition,) = opened(gpu, backend)
    measurer = Measurer(host, partition, 20 if kind == "memory" else 5, 64 << 30)
    try:
        with hogged(4 << 30) if kind == "memory" else contextlib.nullcontext():
            failed = measurer.measure(
                huge(artifacts["good"]) if kind == "memory" else job(artifacts[kind])
            )
        assert failed.failure is not None and failed.failure.kind == failure, failed.failure
        after = measurer.measure(job(artifacts["good"]))
        assert after.failure is None, after.failure
    finally:
        measurer.close()


def huge(path: str) -> Job:
    """Four buffers of 2 GiB."""
    return Job(path, (((1 << 29,), "int32"),) * 4, "huge", None, SEARCH)


@contextlib.contextmanager
def hogged(left: int) -> Iterator[None]:
    """While it lasts, the GPU has no more than `left` bytes free."""
    driver = started_driver()
    device = call(driver.cuDeviceGet, 0)
    call(driver.cuCtxSetCurrent, call(driver.cuDevicePrimaryCtxRetain, device))
    free, _total = call(driver.cuMemGetInfo)
    taken = call(driver.cuMemAlloc, free - left)
    try:
        yield
    finally:
        call(driver.cuMemFree, taken)
        call(driver.cuDevicePrimaryCtxRelease, device)


def test_a_fault_of_one_mps_client_spares_no_run(
    host: WorkerHost, gpu: Device, artifacts: dict[str, str]
) -> None:
    from gpu.kernels import job

    measurers = [Measurer(host, part, 20, 64 << 30) for part in opened(gpu, "mps", 3)]
    try:
        for measurer in measurers:
            measurer.open()
        assert measurers[0].measure(job(artifacts["illegal"])).failure is not None
        for measurer in measurers:
            assert measurer.measure(job(artifacts["good"])).failure is None
    finally:
        for measurer in measurers:
            measurer.close()


@pytest.mark.parametrize(("kind", "failure"), [("illegal", "run"), ("hang", "timeout")])
def test_a_fault_of_one_green_slice_costs_the_others_nothing(
    host: WorkerHost, gpu: Device, artifacts: dict[str, str], kind: str, failure: str
) -> None:
    from gpu.kernels import job

    shares = [[share_of(gpu, 25, "green")]] * 2
    shared = SharedWorker(host, open_slices(shares, gpu, "green"), 10, 64 << 30)
    measurers = [measurer for (measurer,) in shared.slices]
    try:
        found = []
        for measurer, name in zip(measurers, ("good", kind), strict=True):
            measurer.submit(job(artifacts[name]))
        for measurer in measurers:
            while (result := measurer.collect(0.1)) is None:
                pass
            found.append(result.failure and result.failure.kind)
        assert found == [None, failure]
        assert all(m.measure(job(artifacts["good"])).failure is None for m in measurers)
    finally:
        for measurer in measurers:
            measurer.close()
