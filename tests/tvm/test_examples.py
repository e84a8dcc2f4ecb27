"""Every script in examples/ runs on a small model, the way a reader would run it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from small_network import write_network

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "build_pipeline": "tasks, 4 trials",
    "serve": "answered, 0 failed",
    "share_switching": "requests, 0 failed",
    "tune_and_run": "latency: median",
}


def test_they_run(tmp_path: Path) -> None:
    """One after the other in one folder, so that each finds the records of those before it."""
    assert {script.stem for script in EXAMPLES} == set(SAYS)
    model = write_network(tmp_path / "small.onnx")
    for script in EXAMPLES:
        shutil.rmtree(tmp_path / "small.tuned", ignore_errors=True)
        done = subprocess.run(
            [sys.executable, str(script), str(model), "--quick"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, (script.stem, done.stderr[-3000:])
        assert SAYS[script.stem] in done.stdout, script.stem
        assert (tmp_path / "small.tuned" / "manifest.json").is_file(), script.stem
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(share["verified"] for share in summary["shares"])
