"""Flags, the one repeat, the sentinel's ratio; and how a worker is replaced after a fault."""

from __future__ import annotations

import pytest
from mock_gpu.devices import fake_gpu, null_device
from mock_gpu.in_process import MockGpu

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure import SEARCH
from gpu_aware_tune.measure.base import reopen
from gpu_aware_tune.measure.quality import DisturbanceMonitor
from gpu_aware_tune.partition import FullPartition, NullPartition, Nvml, Share, Snapshot, nvml

QUIET = Snapshot(sm_clock_mhz=1980, throttle=(), neighbours=())
HOT = Snapshot(sm_clock_mhz=1980, throttle=("heat",), neighbours=())


class Gpu:
    """Snapshots and sentinel times in turn, the last ones for ever; the time goes with the heat."""

    def __init__(self, looks: list[Snapshot], sentinels: list[float] | None = None) -> None:
        self.looks = looks
        self.sentinels = sentinels or [1e-4]
        self.pauses: list[float] = []
        self.calls = 0

    def look(self) -> Snapshot:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def sentinel_s(self) -> float:
        return self.sentinels.pop(0) if len(self.sentinels) > 1 else self.sentinels[0]

    def timer(self, number: int, repeat: int) -> list[float]:
        self.calls += 1
        return [2e-3 if self.looks[0].throttle else 1e-3] * repeat

    def watch(self) -> DisturbanceMonitor:
        return DisturbanceMonitor(self.look, self.sentinel_s, self.pauses.append)


def test_a_quiet_sample_is_taken_once() -> None:
    gpu = Gpu([QUIET])
    result = gpu.watch().measure(gpu.timer, None, SEARCH)
    assert (result.flags, result.seconds, result.sentinel_ratio) == ((), 1e-3, 1.0)
    assert gpu.pauses == []


def test_a_disturbed_sample_is_repeated_once_and_the_quiet_one_counts() -> None:
    gpu = Gpu([HOT, HOT, QUIET])
    result = gpu.watch().measure(gpu.timer, None, SEARCH)
    assert (result.flags, result.seconds) == ((), 1e-3)
    assert len(gpu.pauses) == 1


def test_a_sample_that_stays_disturbed_says_so_and_is_not_waited_for_again() -> None:
    gpu = Gpu([HOT])
    watch = gpu.watch()
    assert watch.measure(gpu.timer, None, SEARCH).flags == ("throttled:heat",)
    calls = gpu.calls
    assert watch.measure(gpu.timer, None, SEARCH).flags == ("throttled:heat",)
    assert gpu.calls == calls + calls // 2, "what lasts would double the time of every trial"
    assert len(gpu.pauses) == 1
    gpu.looks = [QUIET]
    assert watch.measure(gpu.timer, None, SEARCH).flags == ()
    gpu.looks = [HOT]
    watch.measure(gpu.timer, None, SEARCH)
    assert len(gpu.pauses) == 2


def test_the_sentinel_shows_what_no_counter_does() -> None:
    gpu = Gpu([QUIET], [1e-4, 1.2e-4])
    watch = gpu.watch()
    first = watch.measure(gpu.timer, None, SEARCH)
    others = [watch.measure(gpu.timer, None, SEARCH) for _ in range(40)]
    assert first.flags == others[0].flags == ()
    assert others[-1].flags == ("sentinel",)
    assert others[-1].sentinel_ratio == pytest.approx(1.2)
    assert gpu.sentinels == [1.2e-4], "asked twice in 41 jobs"


def test_an_idle_gpu_s_clock_is_no_drift() -> None:
    idle = Snapshot(sm_clock_mhz=345, idle=True)
    assert nvml.disturbances(idle, Snapshot(sm_clock_mhz=1980, idle=False)) == ()
    slow = Snapshot(sm_clock_mhz=1500, idle=False)
    assert nvml.disturbances(slow, Snapshot(sm_clock_mhz=1980, idle=False)) == ("clock-drift",)


def test_a_glance_tells_neighbours_from_the_tuners_own(
    gpu_here: MockGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = {21: 20, 31: 30, 40: 21}
    monkeypatch.setattr(nvml, "_parent", lambda pid: parents.get(pid, 1))
    gpu_here.set(pids="22,31,40", throttle=0x1)
    with Nvml(0, own_pids=(22, 21, 20)) as look:
        assert look.quick_snapshot() == Snapshot(
            sm_clock_mhz=1980, idle=True, throttle=(), neighbours=(31,)
        )
        gpu_here.set(pids="22,40")
        assert look.quick_snapshot().neighbours == ()
        gpu_here.set(pids="5,6")
        assert look.quick_snapshot().neighbours is None, "numbers of another PID namespace"


def test_own_processes_end_with_the_tuner() -> None:
    import os

    own = nvml.own_processes()
    assert own[:2] == (os.getpid(), os.getppid())
    assert nvml._started_by(own[-1:], os.getpid())


def test_a_gpu_is_given_time_to_come_back() -> None:
    tries: list[int] = []
    pauses: list[float] = []

    def opens_the_third_time() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise SetupError("807")

    reopen(opens_the_third_time, FullPartition(Share(100, 132, fake_gpu())), pauses.append)
    assert (len(tries), pauses) == (3, [0.2, 0.5])

    def never() -> None:
        raise SetupError("the device is gone")

    with pytest.raises(SetupError, match="is gone"):
        reopen(never, FullPartition(Share(100, 132, fake_gpu())), pauses.append)
    pauses.clear()
    with pytest.raises(SetupError, match="is gone"):
        reopen(never, NullPartition(Share(100, 10, null_device())), pauses.append)
    assert pauses == [], "a CPU does not come back"
