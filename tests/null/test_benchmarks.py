"""What the benchmark scripts share: the environment that every results file names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import environment

SCRIPTS = sorted(
    path
    for path in (ROOT / "benchmarks").glob("*.py")
    if "RESULT" in path.read_text() and path.name != "environment.py"
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_results_file_is_written_with_its_environment(script: Path) -> None:
    source = script.read_text()
    assert "write_results(" in source and "environment()" in source
    assert "write_text(json.dumps(" not in source, "another way to write results"


def test_results_are_written_whole_and_name_their_environment(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    environment.write_results(path, {"cores": 2}, {"rows": [1]})
    environment.write_results(path, {"cores": 3}, {"rows": [1, 2]})
    assert json.loads(path.read_text()) == {"environment": {"cores": 3}, "rows": [1, 2]}
    assert list(path.parent.iterdir()) == [path]


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


def test_gpus_are_those_that_nvidia_smi_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.95.05'\n")
    tool.chmod(0o755)
    assert environment.gpus() == [{"name": "NVIDIA H200", "driver": "580.95.05"}]
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert environment.gpus() == []


def test_a_package_is_found_under_either_of_its_names() -> None:
    assert environment.version("no-such-distribution", "numpy") is not None
    assert environment.version("no-such-distribution") is None
