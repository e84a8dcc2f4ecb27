"""What the benchmark scripts share: the environment that every results file names."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mock_gpu.in_process import MockGpu

from benchmarks import environment, scaffold

SCRIPTS = sorted(
    path
    for path in (ROOT / "benchmarks").glob("*.py")
    if any(mark in path.read_text() for mark in ("RESULT", "write_results("))
    and path.name not in ("environment.py", "scaffold.py")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_results_file_is_written_with_its_environment(script: Path) -> None:
    source = script.read_text()
    if "resumed(" in source:
        assert "resumed(args.results, " in source, "scaffold.py is looked at itself"
    else:
        assert "write_results(" in source and "environment()" in source
    assert "write_text(json.dumps(" not in source, "another way to write results"


def test_results_are_written_whole_and_name_their_environment(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    environment.write_results(path, {"cores": 2}, {"rows": [1]})
    environment.write_results(path, {"cores": 3}, {"rows": [1, 2]})
    assert json.loads(path.read_text()) == {"environment": {"cores": 3}, "rows": [1, 2]}
    assert list(path.parent.iterdir()) == [path]


def test_a_benchmark_goes_on_with_the_cells_that_its_file_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"commit": "abc", "date": "today", "cores": 2}
    monkeypatch.setattr(scaffold, "environment", lambda: about)
    path, ran = tmp_path / "results.json", []

    def run(cell: dict[str, object]) -> dict[str, object]:
        ran.append(cell["repeat"])
        if cell["repeat"] == 2:
            raise KeyboardInterrupt
        return {"trials": 7}

    wanted = [{"side": "ours", "repeat": number} for number in range(3)]
    old = {"cell": wanted[1], "trials": 5}
    other = {"cell": {"side": "stock", "repeat": 0}, "trials": 3}
    path.write_text(json.dumps({"about": "an earlier version", "runs": [old, other]}))
    with pytest.raises(KeyboardInterrupt):
        scaffold.resumed(path, wanted, run)
    assert ran == [0, 2], "the one in the middle is known"
    new = {"cell": wanted[0], "trials": 7, "measured": {"commit": "abc", "date": "today"}}
    assert json.loads(path.read_text()) == {"environment": about, "runs": [old, other, new]}
    assert scaffold.resumed(path, wanted[:2], run) == [old, new], "nothing left to run"
    assert ran == [0, 2]


@pytest.mark.parametrize("script", ["vs_metaschedule", "many_models"])
def test_what_the_committed_results_hold_is_not_run_again(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{script}")
    monkeypatch.setattr(module, "run_apart", lambda *_: pytest.fail("a known cell was run"))
    path = tmp_path / module.RESULTS_FILE.name
    path.write_bytes(module.RESULTS_FILE.read_bytes())
    cell = json.loads(path.read_text())["runs"][0]["cell"]
    flags = [f"--{name.replace('_', '-')}={cell[name]}" for name in ("tasks", "trials", "per_iter")]
    flags += [f"--models={cell.get('models') or cell['model']}", f"--repeats={cell['repeat'] + 1}"]
    monkeypatch.setattr(sys, "argv", [script, *flags, f"--results={path}"])
    module.main()
    assert cell["side"] in capsys.readouterr().out
    assert path.read_bytes() == module.RESULTS_FILE.read_bytes()


def test_a_cell_runs_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny_cell.py").write_text(
        "import os, sys\nfrom benchmarks.scaffold import FLAG, answer\n"
        "def run(n):\n    print('noise')\n    if n < 0: sys.exit('too small')\n"
        "    return {'double': 2 * n, 'pid': os.getpid()}\n"
        "assert sys.argv[1] == FLAG\nanswer(sys.argv[2], run)\nprint('more noise')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = scaffold.run_apart("tiny_cell", {"n": 21})
    assert found["double"] == 42 and found["pid"] != os.getpid()
    with pytest.raises(scaffold.CellFailed, match=r"(?s)'n': -1.*noise.*too small") as failed:
        scaffold.run_apart("tiny_cell", {"n": -1})
    assert failed.value.stderr == "too small\n"


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert environment.commit(tmp_path) is None, "no checkout"

    def git(*words: str) -> None:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *names, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    first = environment.commit(tmp_path)
    assert first is not None and len(first) == 40
    (tmp_path / "file").write_text("2")
    assert environment.commit(tmp_path) == first + "+changes"


def test_gpus_are_those_that_nvml_lists(gpu_here: MockGpu) -> None:
    assert environment.gpus() == [{"name": "NVIDIA Fake", "driver": "580.00"}]
    assert environment.gpu_results("checks").name.startswith("checks-nvidia-fake-20")
    assert environment.gpu_results("checks", null=True).name.startswith("checks-null-20")
    gpu_here.set(nvml_missing="nvmlDeviceGetName")
    assert environment.gpus() == []
    assert gpu_here.alive() == [], "NVML must be shut down again"


def test_a_package_is_found_under_either_of_its_names() -> None:
    assert environment.version("no-such-distribution", "numpy") is not None
    assert environment.version("no-such-distribution") is None
