"""`tune report` and `tune watch` of a real run: their figures are those the run itself told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_library
from click.testing import CliRunner

from gpu_aware_tune.cli.report import report
from gpu_aware_tune.cli.watch import watch
from gpu_aware_tune.events import Finished, Progress
from gpu_aware_tune.settings import Settings
from gpu_aware_tune.tuning import tune_events


def test_a_real_run_is_reported_as_it_was_told(tmp_path: Path) -> None:
    model = tiny_library.write_onnx(tmp_path / "tiny.onnx")
    settings = Settings(
        target="llvm", effort="quick", trials=4, output=tmp_path / "lib", db=tmp_path / "db"
    )
    events = list(tune_events(model, settings))
    told = [event for event in events if isinstance(event, Progress)][-1]
    finished = events[-1]
    assert isinstance(finished, Finished)

    page = tmp_path / "report.html"
    words = [str(settings.output), "--db", str(settings.db), "-o", str(page)]
    result = CliRunner().invoke(report, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert data["weighted"]
    assert data["trials"] == finished.trials == 4
    assert data["failures"] == finished.failures
    share = finished.shares[0]
    assert data["latency"] == [
        {
            "units": share.units,
            "untuned_s": share.untuned_s,
            "tuned_s": share.tuned_s,
            "whole": True,
        }
    ]
    # Best so far as the search told it; the table has the second measurements.
    assert data["model_curve"][str(share.units)][-1][3] == pytest.approx(told.best_s[share.units])
    assert data["untuned_s"][str(share.units)] == pytest.approx(told.untuned_s[share.units])
    tasks = {task["name"]: task["curves"][str(share.units)] for task in data["tasks"]}
    for task in finished.tasks:
        assert tasks[task.name]["final_untuned_s"] == pytest.approx(task.untuned_s)

    text = CliRunner().invoke(watch, ["--db", str(settings.db), "--once"]).stdout
    assert "finished, 4/4 trials" in text
