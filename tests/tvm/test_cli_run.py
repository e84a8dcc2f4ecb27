"""`tune run`: what it prints and writes, and its errors."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_library import write_library

from gpu_aware_tune.cli.main import main
from gpu_aware_tune.library import load
from gpu_aware_tune.model.importer import random_inputs

RunTune = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tmp_path_factory.mktemp("run"))[1]


def test_as_a_user_calls_it(folder: Path, run_tune: RunTune) -> None:
    done = run_tune("run", folder, "--repeat", "5")
    assert done.returncode == 0, done.stderr
    assert "median" in done.stdout
    assert "tiny: " in done.stdout
    assert "output scores: 1x20 float32" in done.stdout
    assert done.stderr == ""


def test_arrays_go_in_and_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load(folder, units=1)
    inputs = random_inputs(loaded.inputs, 9)
    np.savez(tmp_path / "in.npz", allow_pickle=False, **inputs)
    args = [
        "run",
        str(folder),
        "--inputs",
        str(tmp_path / "in.npz"),
        "--units",
        "1",
        "--repeat",
        "3",
    ]
    assert main([*args, "--outputs", str(tmp_path / "out"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["units"] == 1
    assert shown["latency"]["n"] == 3
    assert shown["latency"]["min_ms"] > 0
    assert shown["outputs"]["features"]["shape"] == [1, 16, 12, 12]
    with np.load(tmp_path / "out") as outputs:
        for name, wanted in loaded(inputs).items():
            np.testing.assert_array_equal(outputs[name], wanted)


def test_the_seed_decides_the_random_inputs(folder: Path, tmp_path: Path) -> None:
    scores = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        args = ["run", str(folder), "--repeat", "1", "--seed", str(seed), "--outputs", str(out)]
        assert main(args) == 0
        with np.load(out) as outputs:
            scores.append(outputs["scores"])
    assert np.array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2])


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["missing.tuned"], 2, "missing.tuned is no folder"),
        (["LIB", "--units", "0"], 2, "--units"),
        (["LIB", "--repeat", "0"], 2, "--repeat"),
        (["LIB", "--seconds", "-1"], 2, "--seconds"),
        (["LIB", "--inputs", "missing.npz"], 2, "missing.npz: no such file"),
        (["LIB", "--inputs", "text.npz"], 2, "text.npz is no .npz"),
        (["LIB", "--inputs", "array.npy"], 2, "array.npy is no .npz"),
        (["LIB", "--inputs", "other.npz"], 2, "unknown input 'picture'"),
        (["LIB", "--outputs", "nowhere/out.npz"], 3, "cannot write --outputs nowhere/out.npz"),
    ],
)
def test_mistakes_give_one_line_and_the_right_code(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", picture=np.zeros(3))
    assert main(["run", *(str(folder) if arg == "LIB" else arg for arg in args)]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
