"""Points from slices, shares from units, and the order of measuring, without a device or TVM."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mock_gpu.devices import fake_gpu, null_device
from mock_gpu.in_process import MockGpu

from gpu_aware_tune.errors import TuneError, UserError
from gpu_aware_tune.partition import Device, NullPartition, share_of
from gpu_aware_tune.profiling.curves import Subject, batch_of, measure, serve
from gpu_aware_tune.profiling.profiles import grid, profile, share_for
from gpu_aware_tune.workers import Exit

IMAGE = (("flag", (), "int64"), ("image", (4, 3, 8, 8), "float32"))


class ScriptedWorker:
    """Answers each request with the next list of seconds; None is a death."""

    def __init__(self, name: str, answers: Sequence[list[float] | None], log: list[str]) -> None:
        self.name, self.log, self.killed = name, log, False
        self._answers = [None, *answers]
        ours, theirs = socket.socketpair()
        self._ours, self._theirs = Connection(ours.detach()), Connection(theirs.detach())
        self._answer()

    def _answer(self) -> None:
        answer = self._answers.pop(0)
        if answer is None and self.log:
            self._theirs.close()
        else:
            self._theirs.send(answer)

    def fileno(self) -> int:
        return self._ours.fileno()

    def send(self, seconds: float) -> None:
        self.log.append(f"{self.name} {seconds:g}")
        self._answer()

    def recv(self) -> Any:
        return self._ours.recv()

    def kill(self) -> Exit:
        self.killed = True
        return Exit(1, "TVMError: out of memory\n")


class ScriptedHost:
    """Gives a scripted worker for each partition, by its units."""

    def __init__(self, answers: dict[int, Sequence[list[float] | None]]) -> None:
        self.answers = answers
        self.log: list[str] = []
        self.workers: list[ScriptedWorker] = []

    def spawn(self, entry: object, partition: Any, *args: Any, env: Any) -> ScriptedWorker:
        assert entry is serve
        assert env == partition.env()
        units = partition.share.units
        log: list[str] = []
        worker = ScriptedWorker(str(units), self.answers[units], log)
        worker.log = self.log
        self.workers.append(worker)
        return worker


def subjects(device: Device, units: Sequence[int]) -> list[Subject]:
    shares = [share_for(device, "null" if device.kind == "null" else "green", n) for n in units]
    path = Path("lib.so")
    return [Subject(NullPartition(s), path, Path("w.bin"), IMAGE, 2) for s in shares]


def test_points_take_turns_forth_and_back() -> None:
    host = ScriptedHost({1: [[0.1, 0.1]] * 3, 5: [[0.1, 0.1]] * 3})
    done: list[float] = []
    measure(host, subjects(null_device(), (1, 5)), 0.25, 3, done.append)  # type: ignore[arg-type]
    assert host.log == ["1 0.25", "5 0.25", "5 0.25", "1 0.25", "1 0.25", "5 0.25"]
    assert done == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert all(worker.killed for worker in host.workers)


def test_figures_are_medians_over_rounds_without_the_first_run_of_each() -> None:
    rounds = [
        [9.0, 0.010, 0.011, 0.012],
        [9.0, 0.020, 0.020, 0.500],  # a disturbed round
        [9.0, 0.010, 0.010, 0.010],
    ]
    host = ScriptedHost({5: rounds})
    (point,) = measure(host, subjects(null_device(), (5,)), 0.1, 3)  # type: ignore[arg-type]
    assert point.latency_ms == pytest.approx(11)
    assert point.p10_ms == pytest.approx(1e3 * np.percentile([0.010, 0.011, 0.012], 10))
    assert point.p90_ms == pytest.approx(1e3 * np.percentile([0.010, 0.011, 0.012], 90))
    assert point.throughput_per_s == pytest.approx(4 * 3 / 0.033)
    assert point.efficacy == pytest.approx(point.throughput_per_s / (0.011 * 0.5))
    assert (point.units, point.percent, point.batch, point.tuned_at) == (5, 50, 4, 2)
    assert point.runs == 12
    assert point.power_w is None
    assert point.energy_j is None


def test_a_run_longer_than_a_slice_is_not_thrown_away() -> None:
    host = ScriptedHost({5: [[2.0], [3.0], [2.5]]})
    (point,) = measure(host, subjects(null_device(), (5,)), 0.1, 3)  # type: ignore[arg-type]
    assert point.latency_ms == pytest.approx(2500)


def test_energy_is_the_gpus_over_all_rounds(gpu_here: MockGpu) -> None:
    gpu_here.set(energy_mj=3000)
    host = ScriptedHost({8: [[0.1, 0.1], [0.1, 0.1, 0.1]]})
    (point,) = measure(host, subjects(fake_gpu(), (8,)), 0.1, 2)  # type: ignore[arg-type]
    assert point.energy_j == pytest.approx(2 * 3 / (4 * 5))
    assert point.power_w is not None
    assert point.power_w > 100  # 6 J in far less than a tenth of a second
    assert gpu_here.alive() == []  # NVML is closed again


def test_a_gpu_that_does_not_tell_its_energy_has_none(gpu_here: MockGpu) -> None:
    gpu_here.set(nvml_missing="nvmlDeviceGetTotalEnergyConsumption")
    host = ScriptedHost({8: [[0.1, 0.1]]})
    (point,) = measure(host, subjects(fake_gpu(), (8,)), 0.1, 1)  # type: ignore[arg-type]
    assert (point.power_w, point.energy_j) == (None, None)


def test_a_worker_that_dies_ends_the_profile_with_its_last_words() -> None:
    host = ScriptedHost({1: [[0.1], [0.1]], 5: [[0.1], None]})
    with pytest.raises(TuneError, match=r"lib\.so on NullPartition.*failed: .*out of memory"):
        measure(host, subjects(null_device(), (1, 5)), 0.1, 2)  # type: ignore[arg-type]
    assert all(worker.killed for worker in host.workers)


def test_the_batch_is_the_first_inputs_leading_extent() -> None:
    assert batch_of(IMAGE) == 4
    assert batch_of((("x", (1, 7), "float32"),)) == 1
    assert batch_of((("x", (), "float32"),)) == 1


def test_the_grid_is_every_tenth_of_the_device_once() -> None:
    cpu = Device("llvm", 0, "CPU", "znver4", 4, "core")
    assert [(s.units, s.percent) for s in grid(cpu, "cores")] == [
        (1, 25), (2, 50), (3, 75), (4, 100),
    ]  # fmt: skip
    green = grid(fake_gpu(), "green")
    assert [share.units for share in green] == [8, 24, 32, 48, 64, 72, 88, 104, 112, 132]
    assert [share.units for share in grid(fake_gpu(), "full")] == [132]
    for backend in ("green", "mps"):
        for share in grid(fake_gpu(), backend):
            assert share_of(fake_gpu(), share.percent, backend).units == share.units


@pytest.mark.parametrize(
    ("backend", "units", "message"),
    [
        ("green", 20, "--units 20: partition green cannot give .* allowed: 8, 16, 24, .*, 132"),
        ("mps", 9, "allowed: 8, 10, 12"),
        ("full", 64, "allowed: 132"),
        ("green", 133, "allowed: 8"),
    ],
)
def test_units_that_a_gpu_cannot_give_are_refused(backend: str, units: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        share_for(fake_gpu(), backend, units)
    assert share_for(fake_gpu(), backend, 132).percent == 100


def test_any_number_of_cores_is_a_share() -> None:
    large = Device("llvm", 0, "CPU", "znver4", 192, "core")
    assert [share_for(large, "cores", n).units for n in (1, 2, 3, 191, 192)] == [1, 2, 3, 191, 192]
    with pytest.raises(UserError, match="--units 193: CPU has 192 cores; allowed: 1 to 192"):
        share_for(large, "cores", 193)


def test_efforts_that_measure_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--seconds 0"):
        profile(tmp_path, seconds=0)
    with pytest.raises(UserError, match="--rounds 0"):
        profile(tmp_path, rounds=0)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "no LIB given"),
        (["LIB", "--units", "two"], 2, "--units 'two' is no list of cores or SMs"),
        (["LIB", "--units", "1,,2"], 2, "--units '1,,2'"),
        (["LIB", "--units", "0"], 2, "--units '0'"),
        (["LIB", "--rounds", "0"], 2, "--rounds"),
        (["LIB", "--seconds", "0"], 2, "--seconds"),
        (["LIB", "--tuned-at", "0"], 2, "--tuned-at"),
        (["LIB", "--partition", "half"], 2, "--partition 'half' is not known; allowed: auto, "),
        (["LIB", "--csv", "nowhere/x.csv"], 3, "cannot write --csv nowhere/x.csv"),
        (["LIB", "--csv", "."], 3, "it is a folder"),
        (["LIB"], 2, "LIB is no folder"),
    ],
)
def test_mistakes_give_one_line_before_anything_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    code: int,
    message: str,
) -> None:
    from gpu_aware_tune.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(["profile", *args]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
