"""The benchmark against what users would take instead: its turns, its ratios, its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from small_network import write_network

from benchmarks import peers_cpu


def test_every_contestant_computes_the_same_and_has_a_ratio(tmp_path: Path) -> None:
    model = write_network(tmp_path / "small.onnx", 8, 16, seed=0)
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", peers_cpu.MODULE, str(model), "--threads", "1"]
    command += ["--rounds", "2", "--seconds", "0.02", "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(results.read_text())["models"]["small"]
    assert set(row["ms"]) >= {"untuned", "ort"}
    assert row["ratios"]["untuned/ort"]["median"] > 0
    assert max(row["errors"].values()) < 1e-4
    assert "geometric mean of untuned/best" in done.stdout


def test_a_file_that_is_no_model_is_a_row_of_its_own(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", peers_cpu.MODULE, str(broken), "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "broken" in json.loads(results.read_text())["models"]["broken"]["error"]


def test_the_better_peer_is_that_of_each_round() -> None:
    rounds = [
        {"untuned": [2.0, 2.0], "ort": [1.0, 1.0], "openvino": [4.0]},
        {"untuned": [3.0], "ort": [6.0], "openvino": [1.0]},
    ]
    ratios = peers_cpu.ratios(rounds)
    assert ratios["untuned/ort"]["median"] == pytest.approx((2.0 + 0.5) / 2)
    assert ratios["untuned/best"]["median"] == pytest.approx((2.0 + 3.0) / 2)
    means = peers_cpu.means({"a": {"ratios": ratios}, "b": {"error": "failed"}})
    assert means["untuned/best"] == pytest.approx(2.5)
