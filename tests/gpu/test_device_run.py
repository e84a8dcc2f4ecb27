"""A small model tuned at 30 % of a GPU, exported, loaded and run on its share."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from gpu_aware_tune.events import Finished, Note, Planned, Progress
from gpu_aware_tune.partition import partition_for
from gpu_aware_tune.records.store import Store
from gpu_aware_tune.run.jobs import make_jobs
from gpu_aware_tune.settings import Settings
from gpu_aware_tune.tuning import tune_events, tune_jobs


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16"])
def test_tune_at_30_percent_and_run_there(tmp_path: Path, dtype: str) -> None:
    from benchmarks.gpu.models import write_model
    from gpu_aware_tune.library import load, open_vm
    from gpu_aware_tune.partition.green import GreenPartition

    path = write_model("bert", tmp_path, tiny=True)
    settings = Settings(
        gpu_pct=(30,), target="cuda", partition="green", effort="quick", trials=16, seed=1,
        dtype=None if dtype == "float32" else dtype, db=tmp_path / "db", output=tmp_path / "out",
    )  # fmt: skip
    events = list(tune_events(path, settings))
    plan = next(event for event in events if isinstance(event, Planned))
    assert plan.backend == "green"
    units = plan.units[0]
    done = events[-1]
    assert isinstance(done, Finished) and done.trials == 16
    assert done.shares[0].verified, [e.text for e in events if isinstance(e, Note)]

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    inputs = {"x": np.random.default_rng(0).standard_normal((1, 8, 32)).astype("float32")}
    partition = partition_for(manifest, units)
    assert isinstance(partition, GreenPartition)
    with partition, partition.timing_context():
        entry = manifest["libraries"][0]
        program = open_vm(tmp_path / "out" / entry["file"], tmp_path / "out" / "weights.bin")
        (got,) = program(program.place(list(inputs.values())))
        samples = program.timer(inputs)(0.1)
    with contextlib.closing(load(tmp_path / "out", units)) as loaded:
        assert loaded.evidence["backend"] == "green"
        assert 0 < loaded.evidence["sms_seen"] <= units
        (again,) = loaded(inputs).values()
        (on_more,) = loaded.use(units + 16)(inputs).values()
        assert loaded.evidence["units"] == units + 16
    np.testing.assert_array_equal(again, got)  # the same kernels, whichever SMs run them
    np.testing.assert_array_equal(on_more, got)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, inputs)
    limit = {"float32": 1e-3, "tf32": 1e-2, "float16": 5e-2}[dtype]
    assert float(np.abs(got - wanted).max()) < limit * float(np.abs(wanted).max())
    assert samples and min(samples) < 1e-2


def test_two_models_side_by_side_without_mps(tmp_path: Path) -> None:
    from benchmarks.gpu.models import write_model

    paths = [write_model(name, tmp_path, tiny=True) for name in ("bert", "resnet50")]
    jobs = make_jobs(
        paths, target="cuda", partition="green", effort="quick", gpu_pct=(40,), trials=16, seed=1,
        db=tmp_path / "db", output=tmp_path / "out",
    )  # fmt: skip
    events = list(tune_jobs(jobs))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("2 slices in one worker" in text for text in notes), notes
    assert {len(event.slices) for event in events if isinstance(event, Progress)} == {2}
    finished = [event for event in events if isinstance(event, Finished)]
    assert all(event.shares[0].verified for event in finished), notes
    with Store(tmp_path / "db" / "records.sqlite", readonly=True) as store:
        (seen,) = store.runs()[0].machine["evidence"].values()
        flags = [record.flags for record in store.records()]
    assert [slice_["apart"] for slice_ in seen] == [True, True]
    assert len({slice_["sm_hash"] for slice_ in seen}) == 2
    assert any("together" in text for text in flags)
