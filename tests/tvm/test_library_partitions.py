"""A library of a GPU in its partition: the libraries are a CPU's, the partitions only take notes."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from manifests import read_json, write_json
from mock_gpu.devices import fake_gpu
from mock_gpu.in_process import MockGpu
from tiny_library import write_library

from gpu_aware_tune.cli.run import run
from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.library import Program, load, places, program
from gpu_aware_tune.library.threads import PartitionThread
from gpu_aware_tune.model.importer import random_inputs
from gpu_aware_tune.partition import NullPartition, Share, attach, partition_for
from gpu_aware_tune.partition.gpu_partition import GpuPartition

GPU = "cuda/NVIDIA H200/sm_90a"


@pytest.fixture(scope="module")
def cpu_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tmp_path_factory.mktemp("partitions"))[1]


@pytest.fixture
def folder(cpu_folder: Path, tmp_path: Path) -> Path:
    """Libraries for 8 and 16 SMs, tuned in green contexts, whose code is a CPU's."""
    return as_gpu(cpu_folder, tmp_path / "gpu.tuned", "green")


def as_gpu(source: Path, target: Path, backend: str) -> Path:
    shutil.copytree(source, target)
    manifest = read_json(target)
    for entry in (*manifest["libraries"], *manifest["shares"]):
        entry["units"] *= 8
    write_json(target, {**manifest, "device": GPU, "backend": backend})
    return target


class Noting(NullPartition):
    """Notes who calls it, and looks at what is going on elsewhere when a call begins."""

    def __init__(self, share: Share, backend: str, working: list[Noting]) -> None:
        super().__init__(share)
        self.asked = backend
        self.threads: set[int] = set()
        self._working = working
        self.most_working = 0

    def enter_worker(self) -> None:
        super().enter_worker()
        self.threads.add(threading.get_ident())

    @contextlib.contextmanager
    def timing_context(self) -> Iterator[None]:
        self.threads.add(threading.get_ident())
        self._working.append(self)
        self.most_working = max(self.most_working, len(self._working))
        try:
            with super().timing_context():
                yield
        finally:
            self._working.remove(self)

    def close(self) -> None:
        super().close()
        self.threads.add(threading.get_ident())


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Noting]:
    """Every partition that was opened, on a GPU of 132 SMs."""
    found: list[Noting] = []
    working: list[Noting] = []

    def open_noting(manifest: Mapping[str, Any], units: int | None, backend: str) -> Noting:
        part = Noting(Share(100, units or 132, fake_gpu()), backend, working)
        part.enter_worker()
        part.verify()
        found.append(part)
        return part

    monkeypatch.setattr(places, "partition_for", open_noting)
    monkeypatch.setattr(attach, "visible_sm_count", lambda: 132)
    monkeypatch.setattr("gpu_aware_tune.library.checks.visible_units", lambda _: 132)
    monkeypatch.setattr("gpu_aware_tune.library.loaded.visible_units", lambda _: 132)
    return found


def test_a_library_runs_in_the_partition_of_its_units(
    folder: Path, cpu_folder: Path, opened: list[Noting]
) -> None:
    loaded = load(folder, units=8)
    assert [(part.share.units, part.asked) for part in opened] == [(8, "green")]
    assert loaded.evidence == {"backend": "null", "units": 8}
    assert loaded.cores == ()
    (part,) = opened
    part.calls.clear()
    inputs = random_inputs(loaded.inputs, 3)
    scores = loaded(inputs)["scores"]
    assert part.calls == ["timing", "sync"]
    np.testing.assert_array_equal(scores, load(cpu_folder, units=1)(inputs)["scores"])
    loaded.benchmark(repeat=2)
    assert part.calls == ["timing", "sync"] * 2
    loaded.close()
    assert part.calls[-1] == "close"
    assert len(part.threads) == 1, "entered, used and left in one thread"
    assert threading.get_ident() not in part.threads
    with pytest.raises(UserError, match="is closed"):
        loaded(inputs)


def test_results_are_read_after_the_partitions_work_is_done(
    folder: Path, opened: list[Noting], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(folder, units=16)
    (part,) = opened
    waited: list[list[str]] = []

    class Late:
        """An output that is there only after somebody has waited."""

        def numpy(self) -> np.ndarray:
            assert waited, "read before it was there"
            return np.zeros(1, "float32")

    part.calls.clear()
    monkeypatch.setattr(program, "wait", lambda _: waited.append(list(part.calls)))
    monkeypatch.setattr(loaded._lane.program, "_main", lambda *_: [Late(), Late()])
    loaded(random_inputs(loaded.inputs, 0))
    assert waited == [["timing"]], "the wait is for the partition's stream"
    assert part.calls == ["timing", "sync"]


def test_a_call_that_fails_is_waited_for_too(folder: Path, opened: list[Noting]) -> None:
    loaded = load(folder, units=8)
    opened[0].calls.clear()
    with pytest.raises(ZeroDivisionError):
        loaded._run(lambda program: 1 // 0)
    assert opened[0].calls == ["timing", "sync"]


def test_use_switches_code_and_sms(folder: Path, opened: list[Noting]) -> None:
    loaded = load(folder, units=8)
    inputs = random_inputs(loaded.inputs, 5)
    small = loaded(inputs)["scores"]
    large = loaded.use(16)(inputs)["scores"]
    assert not np.array_equal(small, large)
    for asked, units, sms in ((24, 16, 24), (8, 8, 8), (None, 16, 132), (500, 16, 132)):
        part_units = loaded.use(asked).evidence["units"]
        assert (loaded.units, part_units) == (units, sms)
        np.testing.assert_array_equal(loaded(inputs)["scores"], small if units == 8 else large)
    assert [part.share.units for part in opened] == [8, 16, 24, 132], "each is opened once"
    loaded.close()
    assert all(part.calls[-1] == "close" for part in opened)


def test_a_switch_while_a_call_is_under_way(folder: Path, opened: list[Noting]) -> None:
    loaded = load(folder, units=16, preload=True)
    began, go_on = threading.Event(), threading.Event()
    answers: list[Program] = []

    def slow(program: Program) -> Program:
        began.set()
        assert go_on.wait(30)
        return program

    old = loaded._lane.program
    first = threading.Thread(target=lambda: answers.append(loaded._run(slow)))
    first.start()
    assert began.wait(30)
    assert loaded.use(8).units == 8, "the switch itself does not wait"
    second = threading.Thread(target=lambda: answers.append(loaded._run(lambda program: program)))
    second.start()
    time.sleep(0.05)
    assert answers == [], "one partition at a time: they share TVM's pool of memory"
    go_on.set()
    first.join(30)
    second.join(30)
    assert len(answers) == 2
    assert set(answers) == {old, loaded._lane.program}, "each on the library it began with"
    assert max(part.most_working for part in opened) == 1
    loaded.close()


@pytest.mark.parametrize("backend", ["mps", "mig"])
def test_what_a_process_is_started_in_stays(
    cpu_folder: Path, tmp_path: Path, opened: list[Noting], backend: str
) -> None:
    loaded = load(as_gpu(cpu_folder, tmp_path / backend, backend), units=8)
    assert loaded.use(16).units == 16
    assert [(part.share.units, part.asked) for part in opened] == [(8, backend)]
    loaded.close()


def test_partition_overrides_the_manifest(
    folder: Path, cpu_folder: Path, opened: list[Noting]
) -> None:
    loaded = load(folder, units=8, partition="full")
    assert (loaded.units, loaded.evidence["units"]) == (8, 132)
    loaded.use(16)
    assert [(part.share.units, part.asked) for part in opened] == [(132, "full")]
    with pytest.raises(UserError, match="partition 'green' is for GPUs"):
        load(cpu_folder, partition="green")
    assert load(cpu_folder, partition="cores").evidence == {}


def test_a_dropped_library_closes_its_partition(folder: Path, opened: list[Noting]) -> None:
    loaded = load(folder, units=8)
    thread = loaded._lane.thread
    assert isinstance(thread, PartitionThread)
    del loaded
    thread.join()
    assert opened[0].calls[-1] == "close"


def test_tune_run_shows_the_partition(folder: Path, opened: list[Noting]) -> None:
    arguments = [str(folder), "--units", "8", "--repeat", "2", "--json"]
    result = CliRunner().invoke(run, arguments, catch_exceptions=False)
    assert json.loads(result.output)["partition"] == {"backend": "null", "units": 8}
    CliRunner().invoke(run, [*arguments, "--partition", "full"], catch_exceptions=False)
    assert [(part.share.units, part.asked) for part in opened] == [(8, "green"), (132, "full")]
    assert all(part.calls[-1] == "close" for part in opened)


# On the mock GPU in place of the fake partition ---------------------------------------------------


def test_the_greens_come_and_go_with_the_library(
    folder: Path, gpu_here: MockGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[int] = []

    def without_tvm(partition: Any) -> contextlib.AbstractContextManager[None]:
        streams.append(partition.stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(GpuPartition, "timing_context", without_tvm)
    loaded = load(folder, units=8)
    assert loaded.evidence["sms_seen"] == 8
    inputs = random_inputs(loaded.inputs, 0)
    loaded(inputs)
    loaded.use(24)(inputs)
    assert gpu_here.alive() == ["primary context x2", "green context x2", "stream x2"]
    assert len(set(streams)) == 2
    with pytest.raises(UserError, match="20 SMs cannot be had here: multiples of 8"):
        loaded.use(20)
    assert loaded.evidence["sms_seen"] == 24, "the old one stays"
    loaded.close()
    assert gpu_here.alive() == []


@pytest.mark.parametrize(
    ("backend", "text"),
    [("mps", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=7"), ("mig", "CUDA_VISIBLE_DEVICES=MIG-")],
)
def test_a_process_that_was_started_otherwise_is_told_how(
    folder: Path, gpu_here: MockGpu, backend: str, text: str
) -> None:
    before = threading.active_count()
    with pytest.raises(SetupError, match=text) as told:
        load(folder, units=8, partition=backend)
    assert "\n" not in str(told.value)
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before, "the thread has ended"
    assert gpu_here.alive() == []
    with pytest.raises(UserError, match="partition 'sms' is not known; allowed: green, full"):
        load(folder, units=8, partition="sms")


def test_without_a_gpu(folder: Path, gpu_here: MockGpu) -> None:
    gpu_here.set(fail="cuInit=100")
    with pytest.raises(SetupError, match="cuInit"):
        load(folder, units=8)
    assert partition_for({"device": "llvm/x/y"}) is None
