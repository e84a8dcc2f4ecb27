"""The whole way of a run on a GPU, on the mock GPU: green contexts, measuring, faults, the library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, RunTune
from tiny_library import write_onnx

from gpu_aware_tune.records.store import Store


def test_a_model_is_tuned_for_a_share_and_runs_there(
    tmp_path: Path, run_tune: RunTune, mock_gpu: Mapping[str, str]
) -> None:
    model = write_onnx(tmp_path / "tiny.onnx", width=6, channels=8, image="gpu_0/image:0")
    output, db = tmp_path / "tiny.tuned", tmp_path / "db"
    done = run_tune(
        model, "--gpu-pct", "30", "--trials", "6", "--effort", "quick", "--json",
        "--db", db, "-o", output, env=mock_gpu, timeout_s=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["shares"][0]["verified"], done.stderr[-3000:]
    with Store(db / "records.sqlite", readonly=True) as store:
        (run,) = store.runs()
        records = list(store.records())
    assert run.machine["evidence"]["32"][0]["sms_seen"] == 32
    assert {record.partition for record in records} == {"green"}
    failed = [(record.failure, record.failure_text) for record in records]
    assert not [each for each in failed if each[0] in ("crash", "run", "load")], failed
    image = np.random.default_rng(0).standard_normal((1, 8, 6, 6)).astype("float32")
    arrays = {"gpu_0/image:0": image, "bias": np.zeros((1, 20), "float32")}
    np.savez(tmp_path / "in.npz", allow_pickle=False, **arrays)
    done = run_tune("run", output, "--inputs", tmp_path / "in.npz", env=mock_gpu)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "32 SMs" in done.stdout
    done = run_tune("run", output, "--units", "64", "--seconds", "0.1", env=mock_gpu)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "32 units of" in done.stdout and "partition green: 64 SMs" in done.stdout


@pytest.mark.parametrize(
    ("file", "which", "settings"),
    [
        ("test_device_partitions.py", "test", {"MOCK_GPU_MIG": "32,60"}),
        ("test_device_faults.py", "illegal or of_one_mps_client", {}),
    ],
)
def test_what_is_tested_on_a_gpu_passes(
    file: str, which: str, settings: Mapping[str, str], mock_gpu: Mapping[str, str]
) -> None:
    """Apart from what takes long."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/gpu/{file}", "-k", which],
        cwd=ROOT,
        env={**mock_gpu, **settings},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
