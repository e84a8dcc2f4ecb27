"""Every script in examples/ runs on a small model, the way a reader would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from small_network import write_network

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "build_pipeline": "tasks, 4 trials",
    "serve": "answered, 0 failed",
    "share_switching": "requests, 0 failed",
    "tune_and_run": "latency: median",
}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_it_runs(script: Path, tmp_path: Path) -> None:
    model = write_network(tmp_path / "small.onnx")
    done = subprocess.run(
        [sys.executable, str(script), str(model), "--quick"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAYS[script.stem] in done.stdout
    assert (tmp_path / "small.tuned" / "manifest.json").is_file()
    if script.stem == "build_pipeline":
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert all(share["verified"] for share in summary["shares"])
