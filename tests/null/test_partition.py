"""Shares and partitions: arithmetic, the contract of every backend, and what each one adds.

The GPU backends run on the mock GPU; the CPU backend binds real threads, with TVM's pool replaced by
Python threads.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from mock_gpu.devices import MOCK_UUID, fake_gpu, null_device
from mock_gpu.in_process import MockGpu

from gpu_aware_tune.errors import SetupError, TuneError, UserError
from gpu_aware_tune.partition import (
    BACKENDS,
    SIDE_BY_SIDE,
    Device,
    NullPartition,
    Partition,
    Share,
    backends,
    check_disjoint,
    choose_backend,
    cores,
    device,
    driver,
    find_device,
    gpu_query,
    green,
    instance_units,
    mig,
    mps,
    nvml,
    open_partitions,
    open_slices,
    probe_backends,
    share_of,
    topology,
)
from gpu_aware_tune.partition.driver import DriverError, call
from gpu_aware_tune.partition.gpu_query import GpuFacts
from gpu_aware_tune.partition.shares import mps_percentage
from gpu_aware_tune.partition.thread_pool import ThreadPools, thread_pools
from gpu_aware_tune.settings import PARTITIONS

ALL = ("cores", "null", "full", "green", "mps", "mig")
CORES = len(topology.usable_cores())
INSTANCES = "16,32,60"  # MIG instances, by their SMs


def test_the_lists_of_backends_agree() -> None:
    assert set(PARTITIONS) == {"auto", "null", *BACKENDS} and set(ALL) == {"null", *BACKENDS}
    several = {name for name, backend in backends._BACKENDS.items() if backend.open_slices}
    assert set(SIDE_BY_SIDE) == several


def cpu(total: int = CORES) -> Device:
    return Device("llvm", 0, "AMD EPYC", "znver4", total, "core")


@dataclass
class Case:
    """One backend on a machine that has it; `spoil` makes the device give less than promised."""

    backend: str
    device: Device
    percents: tuple[int, ...]
    leaks: Callable[[], list[str]]
    spoil: Callable[[], object]

    def shares(self) -> list[Share]:
        return [share_of(self.device, percent, self.backend) for percent in self.percents]

    def open(self, disjoint: bool = False) -> list[Partition]:
        return open_partitions(self.shares(), self.device, self.backend, disjoint=disjoint)


class SeenPools(ThreadPools):
    """The pools of this process, and what they were set to."""

    def __init__(self) -> None:
        vars(self).update(vars(thread_pools()))
        self.calls: list[tuple[int, ...]] = []
        self.extra: list[int] = []

    def use(self, chosen: Sequence[int]) -> None:
        super().use(chosen)
        self.calls.append(tuple(chosen))

    def threads(self) -> list[int]:
        return super().threads() + self.extra


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[SeenPools]:
    seen = SeenPools()
    monkeypatch.setattr(cores, "thread_pools", lambda: seen)
    monkeypatch.setattr(cores, "_local", threading.local())
    before = os.sched_getaffinity(0)
    yield seen
    seen.close()
    os.sched_setaffinity(0, before)


def mps_folders() -> list[str]:
    return [str(path) for path in Path("/tmp").glob(f"gat-mps-{os.getuid()}-{os.getpid()}-*")]


@pytest.fixture
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """The backend named by the parameter, on a machine that has it."""
    backend = request.param
    if backend == "null":
        yield Case("null", null_device(), (30, 100), list, lambda: None)
        return
    if backend == "cores":
        seen = request.getfixturevalue("pool")
        before = os.sched_getaffinity(0)

        def spoil_pool() -> None:
            seen.extra = [0]

        def moved() -> list[str]:
            now = os.sched_getaffinity(0)
            return [] if now == before else [f"bound to {now}"]

        yield Case("cores", cpu(), (50, 100), moved, spoil_pool)
        return
    gpu: MockGpu = request.getfixturevalue("gpu_here")
    percents = {"full": (100,), "green": (30, 50), "mig": (30,), "mps": (30,)}[backend]
    if backend == "mig":
        gpu.set(mig=INSTANCES)
    elif backend == "mps":
        request.getfixturevalue("mps_control")

    def leaks() -> list[str]:
        return gpu.alive() + mps_folders() + [str(plan) for plan in green._splits]

    yield Case(backend, fake_gpu(), percents, leaks, lambda: gpu.set(lost=2))


def mig_uuid(number: int) -> str:
    return f"MIG-07070707-0707-0707-0707-{number:012d}"


def in_worker(partition: Partition, monkeypatch: pytest.MonkeyPatch) -> Partition:
    """What reaches the worker: a pickled copy, in a process that has the environment."""
    for name, value in partition.env().items():
        monkeypatch.setenv(name, value)
    return pickle.loads(pickle.dumps(partition))


each_backend = pytest.mark.parametrize("case", ALL, indirect=True)


# The contract -------------------------------------------------------------------------------------


@each_backend
def test_units_are_what_the_share_says(case: Case) -> None:
    opened = case.open()
    try:
        assert [part.share for part in opened] == case.shares()
        for part, percent in zip(opened, case.percents, strict=True):
            assert part.backend == case.backend
            assert 1 <= part.share.units <= case.device.units_total
            assert part.share.describe().startswith(f"{percent} % of ")
            assert part.share.describe() in repr(part)
    finally:
        for part in opened:
            part.close()


@each_backend
def test_a_worker_enters_verifies_runs_and_leaves(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = case.open()
    workers = [in_worker(part, monkeypatch) for part in opened]
    for mine, theirs in zip(opened, workers, strict=True):
        assert theirs.share == mine.share
        assert theirs.env() == mine.env()
        assert all(isinstance(v, str) for pair in theirs.env().items() for v in pair)
    for part in sorted(workers, key=lambda part: -part.share.units):
        part.enter_worker()
        part.enter_worker()  # a second call changes nothing
    for part in workers:
        part.verify()
        with part.timing_context():
            pass
        part.sync()
        part.verify()
    for part in workers + opened:
        part.close()
        part.close()
    assert case.leaks() == []


@each_backend
def test_verify_refuses_what_was_not_promised(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = case.open()
    part = in_worker(opened[-1], monkeypatch)
    try:
        part.enter_worker()
        part.verify()
        if isinstance(part, NullPartition):
            part._verified_units = 1
        case.spoil()
        with pytest.raises(SetupError, match=r"\d+ \w+ (where|promised)|\d+ SMs where"):
            part.verify()
    finally:
        for each in (part, *opened):
            each.close()
    assert case.leaks() == []


@each_backend
def test_nothing_works_before_entering(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = case.open()
    try:
        for part in opened:
            with pytest.raises(SetupError, match="enter_worker"):
                part.verify()
    finally:
        for part in opened:
            part.close()


@each_backend
def test_state_is_restored_when_the_body_fails(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = case.open()

    def interrupted() -> None:
        with contextlib.ExitStack() as stack:
            for part in opened:
                stack.callback(part.close)
            worker = stack.enter_context(in_worker(opened[0], monkeypatch))
            worker.enter_worker()
            with worker.timing_context():
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert case.leaks() == []


# Arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "total", "units"),
    [(1, 2, 1), (50, 2, 1), (99, 2, 1), (100, 2, 2), (30, 10, 3), (33, 10, 3), (50, 7, 3)],
)
def test_cores_round_down_to_at_least_one(percent: int, total: int, units: int) -> None:
    assert share_of(cpu(total), percent, "cores").units == units


@pytest.mark.parametrize(
    ("percent", "units"),
    [(1, 8), (6, 8), (10, 8), (13, 16), (30, 32), (50, 64), (99, 128), (100, 132)],
)
def test_green_contexts_round_down_to_groups_of_eight(percent: int, units: int) -> None:
    assert share_of(fake_gpu(), percent, "green").units == units


@pytest.mark.parametrize(
    ("percent", "units"),
    [(1, 8), (7, 8), (13, 16), (19, 24), (25, 32), (37, 48), (49, 64), (50, 66), (73, 96),
     (97, 128), (100, 132)],
)  # fmt: skip
def test_mps_follows_the_published_table(percent: int, units: int) -> None:
    assert share_of(fake_gpu(), percent, "mps").units == units


def test_every_percentage_of_mps_yields_its_own_units_again() -> None:
    for percent in range(1, 101):
        units = share_of(fake_gpu(), percent, "mps").units
        back = mps_percentage(units, 132)
        assert share_of(fake_gpu(), back, "mps").units == units
        assert 8 <= units <= max(8, percent * 132 / 100)


@pytest.mark.parametrize("backend", ["cores", "green", "mps"])
def test_more_percent_is_never_fewer_units(backend: str) -> None:
    where = cpu(96) if backend == "cores" else fake_gpu()
    units = [share_of(where, percent, backend).units for percent in range(1, 101)]
    assert units == sorted(units)
    assert units[-1] == where.units_total


@pytest.mark.parametrize("percent", [0, 101, -3, True, 2.5])
def test_a_percentage_out_of_range_is_refused(percent: int) -> None:
    with pytest.raises(UserError, match="from 1 to 100"):
        share_of(cpu(), percent, "cores")


def test_phrases() -> None:
    assert share_of(fake_gpu(), 30, "green").describe() == "30 % of 132 SMs = 32 SMs"
    assert share_of(cpu(2), 50, "cores").describe() == "50 % of 2 cores = 1 core"
    assert share_of(cpu(1), 100, "cores").describe() == "100 % of 1 core = 1 core"


# Devices ------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (backends, device):
        monkeypatch.setattr(module, "query_gpus", lambda: ((), "no driver"))
    monkeypatch.setattr(device, "host_mcpu", lambda: "znver4")


def test_auto_falls_back_to_the_cpu_and_says_so(no_gpu: None) -> None:
    found, note = find_device("auto", 0, None)
    assert (found.kind, found.arch, found.units_total) == ("llvm", "znver4", CORES)
    assert note is not None
    assert "no driver" in note
    assert "\n" not in note
    assert found.target(3) == {"kind": "llvm", "num-cores": 3, "mcpu": "znver4"}


def test_auto_takes_the_gpu(gpu_here: MockGpu) -> None:
    found, note = find_device("auto", 0, None)
    assert note is None
    assert found.key == "cuda/NVIDIA Fake/sm_90a"
    assert (found.units_total, found.unit, found.unit_step) == (132, "SM", 8)
    assert found.uuid == MOCK_UUID
    assert found.measurable
    assert (found.max_threads, found.shared_bytes, found.registers) == (1024, 49152, 65536)
    assert found.target(32)["arch"] == "sm_90a"


def test_a_mig_instance_is_named_as_one(gpu_here: MockGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_here.set(mig=INSTANCES)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mig_uuid(1))
    found, _ = find_device("auto", 0, None)
    assert " MIG " in found.name and found.units_total == 16
    assert found.uuid == MOCK_UUID.replace("GPU-", "MIG-")


def test_an_absent_gpu_can_be_built_for_but_not_measured(no_gpu: None) -> None:
    found, _ = find_device("cuda", 0, "sm_90a")
    assert not found.measurable
    assert share_of(found, 30, "auto").describe() == "30 % of 132 SMs = 32 SMs"
    with pytest.raises(SetupError, match="measuring needs an NVIDIA GPU"):
        open_partitions([share_of(found, 30, "green")], found, "green")


@pytest.mark.parametrize(
    ("target", "index", "arch", "kind", "text"),
    [
        ("gpu", 0, None, UserError, "allowed: auto, cuda, llvm"),
        ("cuda", 0, None, SetupError, "no NVIDIA GPU is usable.*--target llvm"),
        ("cuda", 0, "sm90", UserError, "allowed: .*sm_90a"),
        ("cuda", 0, "sm_35", UserError, "allowed: .*sm_90a"),
        ("llvm", 1, None, UserError, "number 0"),
    ],
)
def test_wrong_devices(
    no_gpu: None, target: str, index: int, arch: str | None, kind: type[TuneError], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        find_device(target, index, arch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "arch", "text"), [(1, None, "GPUs are 0"), (0, "sm_80", "is sm_90a")]
)
def test_wrong_gpus(gpu_here: MockGpu, index: int, arch: str | None, text: str) -> None:
    with pytest.raises(UserError, match=text):
        find_device("cuda", index, arch)


def test_asking_for_gpus_leaves_this_process_free_of_cuda() -> None:
    program = (
        "from gpu_aware_tune.partition import probe_backends\n"
        "found = probe_backends()\n"
        "assert [f.backend for f in found] == ['cores', 'mig', 'green', 'mps', 'full'], found\n"
        "assert all(f.reason and '\\n' not in f.reason for f in found), found\n"
        "import sys\n"
        "assert not {'cuda', 'tvm', 'tvm_ffi'} & set(sys.modules)\n"
        "assert 'libcuda' not in open('/proc/self/maps').read()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_answer_of_the_child_is_read_back(gpu_here: MockGpu) -> None:
    facts = gpu_query.answer()["gpus"]
    assert GpuFacts(**facts[0]) == gpu_query.read_gpus(gpu_here.driver)[0]
    assert facts[0]["green"]
    gpu_here.set(fail="cuInit=807")
    assert "807" in gpu_query.answer()["reason"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("AMD EPYC 9575F 64-Core Processor", "AMD EPYC 9575F"),
        ("Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz", "Intel Xeon Platinum 8480+"),
        ("AMD EPYC", "AMD EPYC"),
    ],
)
def test_names_of_equal_chips_are_equal(tmp_path: Path, line: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: {line}\n")
    assert device.cpu_name(tmp_path / "cpuinfo") == name


# Choosing a backend -------------------------------------------------------------------------------


def test_auto_prefers_what_proves_most(gpu_here: MockGpu) -> None:
    assert choose_backend(fake_gpu(), percents=(30,))[0] == "green"
    assert choose_backend(fake_gpu(), percents=(100,))[0] == "full"
    assert choose_backend(cpu())[0] == "cores"
    gpu_here.set(mig=INSTANCES)
    chosen, why = choose_backend(fake_gpu(), percents=(30,))
    assert chosen == "mig"
    assert "16, 32, 60 SMs" in why


def test_auto_without_any_backend_says_why_for_each(
    gpu_here: MockGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_here.set(driver=12020)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SetupError, match=r"mig: .*green: .*12\.4.*mps: .*not on the PATH"):
        choose_backend(fake_gpu(), percents=(30,))
    with pytest.raises(SetupError, match="--partition green is not available"):
        choose_backend(fake_gpu(), "green")


def test_a_backend_of_the_other_kind_of_device_is_refused() -> None:
    with pytest.raises(UserError, match="allowed: auto, cores"):
        choose_backend(cpu(), "green")
    with pytest.raises(UserError, match="allowed: auto, mig, green, mps, full"):
        choose_backend(fake_gpu(), "cores")
    with pytest.raises(UserError, match="the whole GPU"):
        share_of(fake_gpu(), 30, "full")
    with pytest.raises(UserError, match="is not known"):
        share_of(fake_gpu(), 30, "half")


def test_asking_for_cores_does_not_wake_the_gpu_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "query_gpus", lambda: pytest.fail("asked for GPUs"))
    assert choose_backend(cpu(), "cores") == ("cores", "asked for")


def test_probing_survives_a_broken_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("segment fell over")

    monkeypatch.setattr(backends, "query_gpus", broken)
    monkeypatch.setattr(mps, "find_control", lambda: "found")
    found = {check.backend: check for check in probe_backends()}
    assert found["cores"].ok
    assert not found["green"].ok
    assert "segment fell over" in found["green"].reason


# Cores --------------------------------------------------------------------------------------------


def write_topology(root: Path, cores_of: list[tuple[int, int, str]]) -> None:
    for number, (package, core, siblings) in enumerate(cores_of):
        folder = root / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")


def test_hardware_threads_of_one_core_are_one_unit(tmp_path: Path) -> None:
    write_topology(tmp_path, [(0, 0, "0,2"), (0, 1, "1,3"), (0, 0, "0,2"), (0, 1, "1,3")])
    assert topology.physical_cores([0, 1, 2, 3], tmp_path) == [(0, 2), (1, 3)]
    assert topology.physical_cores([1, 2, 3], tmp_path) == [(2,), (1, 3)]


def test_equal_core_numbers_of_a_virtual_machine_are_not_one_core(tmp_path: Path) -> None:
    write_topology(tmp_path, [(0, 0, "0"), (0, 0, "1"), (1, 0, "2")])
    assert topology.physical_cores([0, 1, 2], tmp_path) == [(0,), (1,), (2,)]
    assert topology.physical_cores([0, 1], tmp_path / "none") == [(0,), (1,)]


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000", None), ("150000 100000", 1.5), ("nonsense", None)]
)
def test_a_containers_quota_counts(tmp_path: Path, text: str, quota: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert topology.cpu_quota(tmp_path) == quota


def test_a_quota_below_the_cores_limits_them(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    assert len(topology.usable_cores(cgroup=tmp_path)) == 1


def test_cores_of_shares_nest_or_stay_apart() -> None:
    assert cores.choose_cores([1, 3], False, [4, 5, 6, 7]) == [(4,), (4, 5, 6)]
    assert cores.choose_cores([1, 3], True, [4, 5, 6, 7]) == [(4,), (5, 6, 7)]
    with pytest.raises(SetupError, match="need 5 cores and 4"):
        cores.choose_cores([2, 3], True, [4, 5, 6, 7])
    with pytest.raises(SetupError, match="5 cores were asked for"):
        cores.choose_cores([5], False, [4, 5, 6, 7])


@pytest.mark.skipif(CORES < 2, reason="switching between shares needs two cores")
def test_threads_are_bound_each_to_its_core_and_back(pool: SeenPools) -> None:
    small, large = open_partitions([share_of(cpu(), p, "cores") for p in (50, 100)], cpu())
    before = os.sched_getaffinity(0)
    assert large.env()["TVM_NUM_THREADS"] == str(CORES)
    assert small.env()["TVM_BIND_THREADS"] == "0"
    for part in (small, large):
        part.enter_worker()
    with large.timing_context():
        assert os.sched_getaffinity(0) == {large.cores[0]}
        assert os.sched_getaffinity(pool.threads()[1]) == {large.cores[1]}
    with small.timing_context():
        assert os.sched_getaffinity(0) == set(small.cores)
    count = len(pool.calls)
    with small.timing_context():
        pass
    assert len(pool.calls) == count, "a share that is set must not be set again"
    large.close()
    assert os.sched_getaffinity(0) != before
    small.close()
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(CORES < 2, reason="a wrong binding needs a second core")
def test_a_thread_moved_by_someone_else_is_noticed(pool: SeenPools) -> None:
    (part,) = open_partitions([share_of(cpu(), 50, "cores")], cpu())
    part.enter_worker()
    part.verify()
    assert len(topology.usable_cores()) == CORES, "a bound thread must not hide the other cores"
    os.sched_setaffinity(0, {topology.usable_cores()[1]})
    with pytest.raises(SetupError, match="may run on cores"):
        part.verify()
    part.close()


def test_a_core_that_is_gone_is_refused(pool: SeenPools) -> None:
    share = share_of(cpu(1), 100, "cores")
    part = cores.CoresPartition(share, [4095])
    with pytest.raises(SetupError, match="cannot bind a thread to one of cores"):
        part.enter_worker()


# Green contexts -----------------------------------------------------------------------------------


def green_workers(shares: list[Share], disjoint: bool) -> list[green.GreenPartition]:
    opened = pickle.loads(pickle.dumps(green.plan_partitions(shares, disjoint)))
    for part in opened:
        part.enter_worker()
    return opened


def sm_sets(parts: list[green.GreenPartition]) -> list[set[int]]:
    for part in parts:
        part.verify()
    return [set(part.units_seen()) for part in parts]


def test_disjoint_shares_have_no_sm_in_common(gpu_here: MockGpu) -> None:
    parts = green_workers([share_of(fake_gpu(), p, "green") for p in (30, 50, 13)], True)
    sets = sm_sets(parts)
    assert [len(found) for found in sets] == [32, 64, 16]
    assert len(set().union(*sets)) == 112
    assert gpu_here.calls("cuDevSmResourceSplitByCount") == 1, "one split, or they overlap"
    for part in parts:
        part.close()
    assert gpu_here.alive() == []


def test_shares_one_after_the_other_may_overlap(gpu_here: MockGpu) -> None:
    parts = green_workers([share_of(fake_gpu(), p, "green") for p in (10, 30, 50, 100)], False)
    assert [len(found) for found in sm_sets(parts)] == [8, 32, 64, 132]
    assert len({part.stream for part in parts}) == 4
    for part in parts:
        part.close()
    assert gpu_here.alive() == []


def test_shares_that_do_not_fit_side_by_side() -> None:
    with pytest.raises(SetupError, match="need 160 SMs and NVIDIA H200 has 132"):
        green.plan_partitions([share_of(fake_gpu(), p, "green") for p in (75, 50)], True)


def test_launches_go_to_the_shares_stream(gpu_here: MockGpu) -> None:
    import tvm_ffi  # without TVM itself: a tenth of a second

    where = tvm_ffi.device("cuda", 0)
    small, large = green_workers([share_of(fake_gpu(), p, "green") for p in (30, 50)], False)
    with small.timing_context():
        assert tvm_ffi.get_raw_stream(where) == small.stream
        with large.timing_context():
            assert tvm_ffi.get_raw_stream(where) == large.stream
        assert tvm_ffi.get_raw_stream(where) == small.stream
    assert tvm_ffi.get_raw_stream(where) == 0
    for part in (small, large):
        part.close()


@pytest.mark.parametrize(
    "function",
    [
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuDeviceGetDevResource",
        "cuDevSmResourceSplitByCount",
        "cuDevResourceGenerateDesc",
        "cuGreenCtxCreate",
        "cuGreenCtxStreamCreate",
    ],
)
def test_whatever_step_fails_is_undone(gpu_here: MockGpu, function: str) -> None:
    gpu_here.set(fail=f"{function}=915")
    parts = green.plan_partitions([share_of(fake_gpu(), p, "green") for p in (30, 50)], False)
    with pytest.raises(DriverError, match=rf"{function} failed: .*\(915\)"):
        parts[0].enter_worker()
    parts[0].close()
    assert gpu_here.alive() == []
    assert green._splits == {}


def test_a_split_into_fewer_groups_is_refused(gpu_here: MockGpu) -> None:
    gpu_here.set(sms=60)
    parts = green.plan_partitions([share_of(fake_gpu(), p, "green") for p in (30, 30)], True)
    with pytest.raises(SetupError, match=r"groups of \[32\] where 2 of 32"):
        parts[0].enter_worker()
    parts[0].close()
    assert gpu_here.alive() == []


def test_green_under_mps_is_refused(
    gpu_here: MockGpu, mps_control: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (client,) = start_mps((100,))
    for name, value in client.env().items():
        monkeypatch.setenv(name, value)
    (part,) = green_workers([share_of(fake_gpu(), 30, "green")], False)
    with pytest.raises(SetupError, match="runs under an MPS server"):
        part.verify()
    part.close()
    client.close()


def test_a_stream_of_another_context_is_refused(gpu_here: MockGpu) -> None:
    (part,) = green_workers([share_of(fake_gpu(), 30, "green")], False)
    gpu_here.set(stray=1)
    with pytest.raises(SetupError, match="would use every SM"):
        part.verify()
    part.close()


def test_a_fault_shows_at_the_next_sync(gpu_here: MockGpu) -> None:
    (part,) = green_workers([share_of(fake_gpu(), 30, "green")], False)
    gpu_here.set(fail="cuStreamSynchronize=700")
    with pytest.raises(DriverError, match="CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        part.sync()
    assert caught.value.code == 700
    part.close()  # clean-up after a fault must not raise


# MPS ----------------------------------------------------------------------------------------------


def start_mps(percents: tuple[int, ...] = (30, 50)) -> list[mps.MpsPartition]:
    return mps.start_partitions([share_of(fake_gpu(), p, "mps") for p in percents])


def test_one_daemon_serves_the_run_and_ends_with_it(mps_control: None) -> None:
    parts = start_mps()
    (folder,) = mps_folders()
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert {part.env()["CUDA_MPS_PIPE_DIRECTORY"] for part in parts} == {f"{folder}/pipe"}
    assert [part.env()["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for part in parts] == ["29", "50"]
    assert {part.env()["CUDA_VISIBLE_DEVICES"] for part in parts} == {MOCK_UUID}
    assert mps.run_control(mps._HEALTH, parts[0].env()) == "100.0"
    parts[0].close()
    assert mps_folders() == [folder]
    parts[1].close()
    assert mps_folders() == []


def test_a_copy_in_a_worker_does_not_stop_the_daemon(mps_control: None) -> None:
    parts = start_mps((30,))
    pickle.loads(pickle.dumps(parts[0])).close()
    assert len(mps_folders()) == 1
    parts[0].close()
    assert mps_folders() == []


def test_a_worker_without_the_environment_is_refused(mps_control: None, gpu_here: MockGpu) -> None:
    (part,) = start_mps((30,))
    with pytest.raises(SetupError, match="CUDA_MPS_PIPE_DIRECTORY"):
        part.enter_worker()
    assert gpu_here.calls("cuInit") == 0
    part.close()


def test_a_client_that_missed_the_daemon_is_refused(
    gpu_here: MockGpu, mps_control: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = start_mps((30,))
    mps.run_control("quit", part.env())
    worker = in_worker(part, monkeypatch)
    worker.enter_worker()
    with pytest.raises(SetupError, match="would use the whole GPU"):
        worker.verify()
    for each in (worker, part):
        each.close()


def test_a_daemon_that_does_not_start_tells_why(
    mps_control: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOCK_GPU_MPS_BROKEN", "1")
    with pytest.raises(SetupError, match="did not start: no GPU found"):
        start_mps()
    assert mps_folders() == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_daemon_and_its_folder_go_with_their_killed_parent(
    mps_control: None, how: signal.Signals
) -> None:
    program = (
        "import signal, time\n"
        "from gpu_aware_tune.partition.mps import MpsDaemon\n"
        # A shell's background jobs, and what they start, ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "daemon = MpsDaemon('0')\n"
        "daemon.start()\n"
        "print(daemon.folder, daemon._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    folder, pid = parent.stdout.readline().split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1, "the control program"
    parent.send_signal(how)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    left = [Path(folder), *(Path(f"/proc/{each}") for each in (pid, *children))]
    while any(path.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [path for path in left if path.exists()] == []


def test_what_a_killed_supervisor_left_is_swept(mps_control: None, tmp_path: Path) -> None:
    orphan = tmp_path / f"{mps._prefix()}4194305-x"  # above the largest process id
    (orphan / "pipe").mkdir(parents=True)
    assert mps.sweep(tmp_path) == [orphan]
    assert not orphan.exists()


def test_sweeping_spares_the_living(mps_control: None) -> None:
    (part,) = start_mps((30,))
    mps.sweep()
    assert len(mps_folders()) == 1
    part.close()


# MIG ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("percent", "sms"), [(5, 16), (12, 16), (13, 16), (30, 32), (90, 60)])
def test_the_largest_instance_within_the_share_is_taken(
    gpu_here: MockGpu, percent: int, sms: int
) -> None:
    gpu_here.set(mig=INSTANCES)
    assert share_of(fake_gpu(), percent, "mig").units == sms


def test_side_by_side_no_instance_serves_two(gpu_here: MockGpu) -> None:
    gpu_here.set(mig="16,16,32")
    twice = [share_of(fake_gpu(), 13, "mig")] * 2
    assert len({part.instance.uuid for part in mig.place(twice, True)}) == 2
    assert len({part.instance.uuid for part in mig.place(twice, False)}) == 1
    with pytest.raises(SetupError, match="no free MIG instance has 16 SMs; free ones have: 32"):
        mig.place([*twice, twice[0]], True)
    assert gpu_here.alive() == [], "NVML must be shut down again"


def test_a_gpu_without_instances(gpu_here: MockGpu) -> None:
    with pytest.raises(SetupError, match="GPU 0 has no MIG instances"):
        mig.find_instances(0)
    gpu_here.set(mig=INSTANCES, nvml_missing="nvmlDeviceGetMigMode")
    with pytest.raises(SetupError, match="MIG is not available: Not Supported"):
        mig.find_instances(0)


# Slices -------------------------------------------------------------------------------------------


def test_auto_prefers_slices_that_work_at_the_same_time(
    gpu_here: MockGpu, mps_control: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_backend(fake_gpu(), percents=(30, 30))[0] == "green"
    assert choose_backend(fake_gpu(), percents=(30, 30), side_by_side=True)[0] == "mps"
    gpu_here.set(mig=INSTANCES)
    assert choose_backend(fake_gpu(), percents=(30, 30), side_by_side=True)[0] == "mig"
    gpu_here.set(mig=None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert choose_backend(fake_gpu(), percents=(30, 30), side_by_side=True)[0] == "green"


def test_three_slices_under_mps_are_clients_of_one_daemon(
    gpu_here: MockGpu, mps_control: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = (share_of(fake_gpu(), percent, "mps") for percent in (40, 30))
    slices = open_slices([[large, small], [small], [small]], fake_gpu(), "mps")
    parts = [part for own in slices for part in own]
    assert [[part.share.units for part in own] for own in slices] == [[52, 38], [38], [38]]
    assert len(mps_folders()) == 1
    assert len({part.env()["CUDA_MPS_PIPE_DIRECTORY"] for part in parts}) == 1
    limits = [part.env()["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for part in parts]
    assert limits == ["40", "29", "29", "29"]
    assert all(part.fault_group is parts[0].fault_group for part in parts), "a fault reaches all"
    for part in parts:
        with monkeypatch.context() as patch:
            client = in_worker(part, patch)
            client.enter_worker()
            client.verify()
            assert client.evidence()["sms_seen"] == part.share.units
            client.close()
    for part in parts[1:]:
        part.close()
        assert len(mps_folders()) == 1
    parts[0].close()
    assert mps_folders() == gpu_here.alive() == []


def test_two_slices_of_mig_are_two_instances(
    gpu_here: MockGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_here.set(mig="32,32,60")
    assert instance_units(fake_gpu(), "mig") == [32, 32, 60]
    assert instance_units(fake_gpu(), "green") is None
    share = share_of(fake_gpu(), 30, "mig")
    parts = [part for own in open_slices([[share], [share]], fake_gpu(), "mig") for part in own]
    assert [part.env()["CUDA_VISIBLE_DEVICES"] for part in parts] == [mig_uuid(1), mig_uuid(2)]
    assert parts[0].fault_group is not parts[1].fault_group, "an instance is a fault domain"
    for part in parts:
        with monkeypatch.context() as patch:
            worker = in_worker(part, patch)
            worker.enter_worker()
            worker.verify()
            assert worker.ordinal == 0, "the one device that the worker sees"
            worker.close()
    assert gpu_here.alive() == []
    with pytest.raises(SetupError, match="no free MIG instance has 32 SMs; free ones have: 60"):
        open_slices([[share]] * 3, fake_gpu(), "mig")


def green_slices(slices: list[list[int]]) -> list[list[Partition]]:
    """Slices with shares of so many percent, entered in this process."""
    shares = [[share_of(fake_gpu(), percent, "green") for percent in own] for own in slices]
    opened = pickle.loads(pickle.dumps(open_slices(shares, fake_gpu(), "green")))
    for part in (part for own in opened for part in own):
        part.enter_worker()
        part.verify()
    return opened


def test_slices_of_green_contexts_are_groups_of_one_split(gpu_here: MockGpu) -> None:
    opened = green_slices([[50, 30, 13], [30], [13]])
    (wide, middle, narrow), (second,), (third,) = [
        [set(part.units_seen()) for part in own] for own in opened
    ]
    assert [len(wide), len(second), len(third)] == [64, 32, 16]
    assert narrow < middle < wide, "shares in a slice overlap"
    assert len(wide | second | third) == 112, "slices do not"
    assert gpu_here.calls("cuDevSmResourceSplitByCount") == 1, "one split, or they overlap"
    assert check_disjoint(opened)
    for own in opened:
        for part in own:
            assert part.slices_share_worker
            part.close()
    assert gpu_here.alive() == []


def test_slices_that_ran_on_the_same_sm_are_refused(gpu_here: MockGpu) -> None:
    gpu_here.set(probe="16:16")
    opened = green_slices([[30], [13]])
    with pytest.raises(SetupError, match=r"both run on SM 16 and 15 more: slices must not overlap"):
        check_disjoint(opened)


def test_slices_need_room(gpu_here: MockGpu) -> None:
    shares = [[share_of(fake_gpu(), 50, "green")]] * 3
    with pytest.raises(SetupError, match="need 192 SMs and NVIDIA H200 has 132"):
        open_slices(shares, fake_gpu(), "green")


def test_a_whole_gpu_is_no_slice(gpu_here: MockGpu) -> None:
    share = Share(30, 32, fake_gpu())
    with pytest.raises(SetupError, match="full cannot measure several slices"):
        open_slices([[share], [share]], fake_gpu(), "full")
    assert gpu_here.alive() == []


# NVML ---------------------------------------------------------------------------------------------


def test_a_snapshot_holds_what_the_machine_tells(gpu_here: MockGpu) -> None:
    unknown = "nvmlDeviceGetTotalEnergyConsumption,nvmlDeviceGetTemperature"
    gpu_here.set(pids="10,11", throttle=0x1 | 0x4 | 0x40, nvml_missing=unknown)
    with nvml.Nvml(0, own_pids=(10,)) as look:
        found = look.snapshot()
    assert gpu_here.alive() == []
    assert found.sm_clock_mhz == 1980
    assert found.throttle == ("power-cap", "hw-heat")
    assert found.power_w == 300
    assert found.neighbours == (11,)
    assert found.energy_j is None
    assert found.temperature_c is None


def test_without_nvml_everything_is_unknown(
    gpu_here: MockGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pynvml", None)
        with nvml.Nvml() as look:
            assert look.snapshot() == nvml.Snapshot()
    gpu_here.set(nvml_missing="nvmlInit")
    with nvml.Nvml() as look:
        assert look.snapshot() == nvml.Snapshot()


def test_disturbed_samples_are_told_from_quiet_ones() -> None:
    quiet = nvml.Snapshot(sm_clock_mhz=1980, throttle=(), neighbours=())
    assert nvml.disturbances(quiet, quiet) == ()
    assert nvml.disturbances(nvml.Snapshot(), nvml.Snapshot()) == ()
    slow = nvml.Snapshot(sm_clock_mhz=1500, throttle=("heat",), neighbours=(5,))
    assert nvml.disturbances(quiet, slow) == ("throttled:heat", "neighbour", "clock-drift")


# The driver ---------------------------------------------------------------------------------------


def test_results_come_without_their_code() -> None:
    from cuda.bindings.driver import CUresult

    assert call(lambda: (0,)) is None
    assert call(lambda: (0, 5)) == 5
    assert call(lambda: (0, 5, 6)) == (5, 6)
    with pytest.raises(DriverError, match="failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        call(lambda: (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, None))


def test_missing_bindings_name_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(SetupError, match=r'pip install "gpu-aware-tune\[cuda\]"'):
        driver.load_driver()


def test_a_driver_that_cannot_be_loaded_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def cu_init(flags: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(driver, "load_driver", lambda: SimpleNamespace(cuInit=cu_init))
    with pytest.raises(SetupError, match=r"no NVIDIA driver: Failed to dlopen libcuda"):
        driver.started_driver()
