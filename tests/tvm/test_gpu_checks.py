"""The ten checks of a GPU, on the mock GPU: what they pass, what they refuse, what they leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from gpu import check_green, test_checks
from gpu.check_process import CHECKS
from gpu.lab import Lab, loads_cubin
from mock_gpu.in_process import MockGpu

TESTS = ROOT / "tests" / "gpu"


@pytest.fixture(scope="module", autouse=True)
def loads() -> None:
    """The checks' loads, compiled for a real GPU: on the mock they take their time and do nothing."""
    loads_cubin("sm_90a")


def run_checks(
    mock_gpu: Mapping[str, str], results: Path, *options: str, **settings: str
) -> tuple[int, dict[str, Any]]:
    """The exit code of `make gpu-check`'s call, and the results file."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_checks.py"),
         "--need-gpu", "--gpu-results", str(results), *options],
        env={**mock_gpu, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )  # fmt: skip
    files = list(results.glob("gpu-checks-nvidia-fake-*.json"))
    assert len(files) == 1, done.stdout[-3000:]
    written: dict[str, Any] = json.loads(files[0].read_text())
    return done.returncode, written


def test_checks_pass_and_leave_their_evidence(mock_gpu: Mapping[str, str], tmp_path: Path) -> None:
    """Those whose times are not this machine's own."""
    code, written = run_checks(mock_gpu, tmp_path, "-k", "01 or 02 or 03 or 07 or 09")
    passed = {number: found["passed"] for number, found in written["checks"].items()}
    assert passed == dict.fromkeys(("1", "2", "3", "7", "9"), True)
    assert code == 0
    assert written["checks"]["2"]["sets"][1] == list(range(16, 32))
    about = written["environment"]
    assert about["device"] == "cuda/NVIDIA Fake/sm_90a"
    assert about["gpus"] == [{"name": "NVIDIA Fake", "driver": "580.00"}]
    assert about["tvm"] and about["date"] and about["gpu_now"]["sm_clock_mhz"] == 1980


@pytest.mark.parametrize("sms", ["0:16", "0:24"], ids=["overlap", "too many"])
def test_a_gpu_that_does_not_confine_fails_the_check(
    mock_gpu: Mapping[str, str], tmp_path: Path, sms: str
) -> None:
    code, written = run_checks(mock_gpu, tmp_path, "-k", "02", MOCK_GPU_PROBE=sms)
    assert code == 1 and written["checks"]["2"]["passed"] is False


def test_checks_without_time_are_left_out_and_written(
    mock_gpu: Mapping[str, str], tmp_path: Path
) -> None:
    code, written = run_checks(mock_gpu, tmp_path, "--check-seconds", "5")
    order = ["1", "2", "4", "5", "3", "7", "10", "6", "9", "8"]
    assert code == 1 and list(written["checks"]) == order
    assert all("left out" in found["error"] for found in written["checks"].values())


def test_without_a_gpu_the_exit_code_is_3(mock_gpu: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS), "--need-gpu"],
        env={**mock_gpu, "MOCK_GPU": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stdout
    assert "needs an NVIDIA GPU (cuInit failed: CUDA_ERROR_NO_DEVICE (100))" in done.stderr


def test_every_check_is_there_under_its_number() -> None:
    assert len(CHECKS) == 10
    for number, check in enumerate(CHECKS, 1):
        assert (check.__doc__ or "").startswith(f"{number}. ")
        assert hasattr(test_checks, f"test_check_{number:02}_{check.__name__}")


def test_a_slower_neighbour_shows(gpu_here: MockGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_green, "_two_processes", lambda *_: 2.0)
    monkeypatch.setattr(check_green, "_beside", lambda lane, load, _: 0.02)
    found = check_green.interference(Lab())
    assert found["passed"] is False
    assert found["slower"]["compute"]["compute"] > 1.9
    assert gpu_here.alive() == []


def test_a_check_that_hangs_is_ended(gpu_here: MockGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_checks, "CHECK_TIMEOUT_S", 1.0)
    lab = Lab()
    hang = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(
        lab,
        "start_child",
        lambda *_, **__: subprocess.Popen(
            hang, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ),
    )
    assert test_checks.checked(lab, 1, 100.0)["error"] == "no answer in 1 s"
