"""The probe kernel, the timer and the sentinel on the mock GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
from mock_gpu.devices import fake_gpu
from mock_gpu.in_process import MockGpu

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition import FullPartition, Share, green, probe
from gpu_aware_tune.partition.driver import DriverError, call
from gpu_aware_tune.partition.gpu_partition import GpuPartition


def entered(units: int = 32) -> GpuPartition:
    (part,) = green.plan_partitions([Share(30, units, fake_gpu())], False)
    part.enter_worker()
    return part


def test_the_probe_finds_the_sms_of_the_streams_context(gpu_here: MockGpu) -> None:
    part = entered()
    assert probe.sm_ids(gpu_here.driver, part.stream or 0, 132) == tuple(range(32))
    part.verify()
    seen = part.evidence()
    assert (seen["backend"], seen["units"], seen["sms_seen"]) == ("green", 32, 32)
    assert seen["sm_hash"] == probe.ids_hash(range(31, -1, -1)) != probe.ids_hash(range(33))
    part.close()
    assert gpu_here.alive() == []


@pytest.mark.parametrize(
    ("sms", "text"),
    [
        ("0:132", "ran on 132 SMs where 32 were promised"),  # a stream that escapes
        ("0:0", "did not run to its end"),  # what wrote nothing is no proof
    ],
)
def test_a_probe_that_does_not_confirm_the_share_is_refused(
    gpu_here: MockGpu, sms: str, text: str
) -> None:
    part = entered()
    gpu_here.set(probe=sms)
    with pytest.raises(SetupError, match=text):
        part.verify()
    part.close()


def test_fewer_sms_than_promised_are_within_the_promise(gpu_here: MockGpu) -> None:
    part = entered()
    gpu_here.set(probe="0:30")
    part.verify()
    assert part.evidence()["sms_seen"] == 30
    part.close()


@pytest.mark.parametrize("function", ["cuLaunchKernel", "cuStreamSynchronize", "cuMemAlloc"])
def test_a_failing_probe_leaves_nothing_behind(gpu_here: MockGpu, function: str) -> None:
    part = entered()
    gpu_here.set(fail=f"{function}=700")
    with pytest.raises(DriverError, match=f"{function} failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        part.verify()
    part.close()
    assert gpu_here.alive() == []


def test_full_has_a_stream_of_its_own(gpu_here: MockGpu) -> None:
    part = FullPartition(Share(100, 132, fake_gpu()))
    part.enter_worker()
    part.verify()
    assert part.stream
    assert part.evidence()["sms_seen"] == 132
    part.close()
    assert gpu_here.alive() == []


# The timer ----------------------------------------------------------------------------------------


def launcher(driver: Any, stream: int) -> Callable[[], None]:
    """What a `StreamTimer` is given to launch: a kernel that does nothing."""
    module = call(driver.cuModuleLoadData, b".version 6.3\0")
    kernel = call(driver.cuModuleGetFunction, module, b"nothing")
    call(driver.cuModuleUnload, module)

    def launch() -> None:
        call(driver.cuLaunchKernel, kernel, 1, 1, 1, 1, 1, 1, 0, stream,
             ((1,), (ctypes.c_void_p,)), 0)  # fmt: skip

    return launch


@pytest.fixture
def part(gpu_here: MockGpu) -> GpuPartition:
    return entered()


@pytest.fixture
def launch(gpu_here: MockGpu, part: GpuPartition) -> Callable[[], None]:
    return launcher(gpu_here.driver, part.stream or 0)


def test_one_launch_is_timed_by_events_and_warmed_up_before(
    gpu_here: MockGpu, part: GpuPartition, launch: Callable[[], None]
) -> None:
    gpu_here.set(launch_us="1000000,50,60,70")
    timer = part.launch_timer(launch)
    assert timer(1, 2) == pytest.approx([50e-6, 60e-6])
    assert timer.kind == "events"
    assert timer(10, 1) == pytest.approx([70e-6])
    assert timer.kind == "events", "long kernels need no graph"
    timer.close()
    timer.close()
    part.close()
    assert gpu_here.alive() == []


def test_short_kernels_are_timed_as_a_graph_on_their_own_stream(
    gpu_here: MockGpu, part: GpuPartition, launch: Callable[[], None]
) -> None:
    timer = part.launch_timer(launch)
    timer(1, 1)
    assert timer(250, 2) == pytest.approx([5e-6, 5e-6])
    assert timer.kind == "graph"
    assert gpu_here.calls("cuStreamBeginCapture") == 1
    assert gpu_here.calls("cuGraphLaunch") == 1 + 2 * 3
    timer.close()
    part.close()
    assert gpu_here.alive() == []


def test_what_cannot_be_captured_is_timed_by_events(
    gpu_here: MockGpu, part: GpuPartition, launch: Callable[[], None]
) -> None:
    def waits() -> None:
        launch()
        part.sync()

    timer = part.launch_timer(waits)
    timer(1, 1)
    assert timer(10, 1) == pytest.approx([5e-6])
    assert gpu_here.calls("cuStreamBeginCapture") == 1
    assert timer.kind == "events"
    timer.close()
    part.close()
    assert gpu_here.alive() == []


def test_cold_launches_are_flushed_one_by_one_with_twice_the_l2(
    gpu_here: MockGpu, part: GpuPartition, launch: Callable[[], None]
) -> None:
    free = gpu_here.free_bytes()
    timer = part.launch_timer(launch, cold=True)
    assert timer(1, 1) + timer(3, 1) == pytest.approx([5e-6, 5e-6])
    assert gpu_here.calls("cuMemsetD8Async") == 4
    assert gpu_here.free_bytes() == free - 2 * (1 << 20)
    assert timer.kind == "events"
    timer.close()
    part.close()
    assert gpu_here.alive() == []


def test_the_sentinel_is_the_median_of_a_few_runs(gpu_here: MockGpu, part: GpuPartition) -> None:
    gpu_here.set(launch_us="1000000,300,100,900,200,400,500")
    assert part.sentinel_s() == pytest.approx(3e-4)
    assert part.sentinel_s() == pytest.approx(5e-4)
    part.close()
    assert gpu_here.alive() == []
