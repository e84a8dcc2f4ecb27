"""The probe kernel, the timer and the sentinel against the fake driver."""

from __future__ import annotations

import pytest

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition import FullPartition, Share, driver, green, probe
from gpu_aware_tune.partition.gpu import GpuPartition
from gpu_aware_tune.partition.timer import StreamTimer
from gpu_aware_tune.testing import Code, FakeDriver, fake_gpu


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    monkeypatch.setattr(driver, "load_driver", lambda: made)
    return made


def stream(fake: FakeDriver) -> int:
    return int(fake.cuStreamCreate(1)[1])


def entered(units: int = 32) -> GpuPartition:
    (part,) = green.plan_partitions([Share(30, units, fake_gpu())], False)
    part.enter_worker()
    return part


def test_the_probe_finds_the_sms_of_the_streams_context(fake: FakeDriver) -> None:
    part = entered()
    assert probe.sm_ids(fake, part.stream or 0, 132) == tuple(range(32))
    part.verify()
    seen = part.evidence()
    assert (seen["backend"], seen["units"], seen["sms_seen"]) == ("green", 32, 32)
    assert seen["sm_hash"] == probe.ids_hash(range(31, -1, -1)) != probe.ids_hash(range(33))
    part.close()
    assert fake.leaks() == []


def test_a_stream_that_escapes_is_refused(fake: FakeDriver) -> None:
    part = entered()
    fake.probe_ids = list(range(132))
    with pytest.raises(SetupError, match="ran on 132 SMs where 32 were promised"):
        part.verify()
    part.close()


def test_fewer_sms_than_promised_are_within_the_promise(fake: FakeDriver) -> None:
    part = entered()
    fake.probe_ids = list(range(30))
    part.verify()
    assert part.evidence()["sms_seen"] == 30
    part.close()


def test_a_probe_that_wrote_nothing_is_no_proof(fake: FakeDriver) -> None:
    part = entered()
    fake.probe_ids = []
    with pytest.raises(SetupError, match="did not run to its end"):
        part.verify()
    part.close()


@pytest.mark.parametrize("function", ["cuLaunchKernel", "cuStreamSynchronize", "cuMemAlloc"])
def test_a_failing_probe_leaves_nothing_behind(fake: FakeDriver, function: str) -> None:
    part = entered()
    fake.fail[function] = Code.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(SetupError, match=function):
        part.verify()
    part.close()
    assert fake.leaks() == []


def test_full_has_a_stream_of_its_own(fake: FakeDriver) -> None:
    part = FullPartition(Share(100, 132, fake_gpu()))
    part.enter_worker()
    part.verify()
    assert part.stream
    assert part.evidence()["sms_seen"] == 132
    part.close()
    assert fake.leaks() == []


# The timer ----------------------------------------------------------------------------------------


def test_one_launch_is_timed_by_events_and_warmed_up_before(fake: FakeDriver) -> None:
    where = stream(fake)
    fake.launch_s = [1.0, 50e-6, 60e-6, 70e-6]
    timer = StreamTimer(fake, where, fake.launcher(where))
    assert timer(1, 2) == pytest.approx([50e-6, 60e-6])
    assert timer.kind == "events"
    assert timer(10, 1) == pytest.approx([70e-6])
    assert timer.kind == "events", "long kernels need no graph"
    timer.close()
    timer.close()
    assert not fake.alive


def test_short_kernels_are_timed_as_a_graph_on_their_own_stream(fake: FakeDriver) -> None:
    where = stream(fake)
    fake.launch_s = [5e-6]
    timer = StreamTimer(fake, where, fake.launcher(where))
    timer(1, 1)
    assert timer(250, 2) == pytest.approx([5e-6, 5e-6])
    assert timer.kind == "graph"
    assert fake.calls.count("cuStreamBeginCapture") == 1
    assert fake.calls.count("cuGraphLaunch") == 1 + 2 * 3
    timer.close()
    assert not fake.alive


def test_what_cannot_be_captured_is_timed_by_events(fake: FakeDriver) -> None:
    where = stream(fake)
    fake.launch_s = [5e-6]
    launch = fake.launcher(where)

    def waits() -> None:
        if where in fake._captured:
            raise RuntimeError("operation not permitted when stream is capturing")
        launch()

    timer = StreamTimer(fake, where, waits)
    timer(1, 1)
    assert timer(10, 1) == pytest.approx([5e-6])
    assert timer.kind == "events"
    timer.close()
    assert not fake.alive


def test_cold_launches_are_flushed_one_by_one(fake: FakeDriver) -> None:
    where = stream(fake)
    fake.launch_s = [5e-6]
    timer = StreamTimer(fake, where, fake.launcher(where), flush_bytes=64)
    assert timer(1, 1) + timer(3, 1) == pytest.approx([5e-6, 5e-6])
    assert fake.calls.count("cuMemsetD8Async") == 4
    assert timer.kind == "events"
    timer.close()
    assert not fake.alive


def test_cold_means_twice_the_l2(fake: FakeDriver) -> None:
    part = entered()
    timer = part.launch_timer(fake.launcher(part.stream or 0), cold=True)
    timer(1, 1)
    assert f"{100 << 20} bytes" in fake.alive.values()
    timer.close()
    part.close()
    assert fake.leaks() == []


def test_the_sentinel_is_the_median_of_a_few_runs(fake: FakeDriver) -> None:
    part = entered()
    fake.launch_s = [1.0, 3e-4, 1e-4, 9e-4, 2e-4, 4e-4, 5e-4]
    assert part.sentinel_s() == pytest.approx(3e-4)
    assert part.sentinel_s() == pytest.approx(5e-4)
    part.close()
    assert fake.leaks() == []
