"""`--batch`: several batch sizes in one folder, which takes any number of rows."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from serve_fleet import write_folder
from small_network import write_network
from tuned_sizes import tuned_once

from gpu_aware_tune import load
from gpu_aware_tune.errors import UserError
from gpu_aware_tune.events import Finished
from gpu_aware_tune.library import read_manifest
from gpu_aware_tune.library.batches import batch_folders, merge_batches
from gpu_aware_tune.library.manifest import ModelId, write_manifest
from gpu_aware_tune.profiling.profiles import group_by_model
from gpu_aware_tune.records.store import Store
from gpu_aware_tune.run.jobs import make_jobs
from gpu_aware_tune.serving.deployments import Deployment
from gpu_aware_tune.serving.engine import Engine
from gpu_aware_tune.tuning import tune_jobs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Finished]]:
    return tuned_once(tmp_path_factory, "batches", {"batch": "N"}, batch="1,4", gpu_pct="50,100")


@pytest.fixture
def finished(made: tuple[Path, list[Finished]]) -> list[Finished]:
    return made[1]


@pytest.fixture
def folder(made: tuple[Path, list[Finished]]) -> Path:
    return made[0] / "net.tuned"


@pytest.fixture
def model(made: tuple[Path, list[Finished]]) -> Path:
    return made[0] / "net.onnx"


def draw(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, 8, 12, 12)).astype("float32")


def test_each_batch_size_is_verified_and_named(finished: list[Finished], folder: Path) -> None:
    assert [event.model for event in finished] == ["net, batch 1", "net, batch 4"]
    assert all(share.verified for event in finished for share in event.shares)
    assert {event.output for event in finished} == {folder}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["db", "net.onnx", "net.tuned"]
    manifest = read_manifest(folder)
    assert manifest.model.name == "net" and manifest.batches == (4,)
    assert read_manifest(folder / "batch-4").inputs[0].shape == (4, 8, 12, 12)


def test_the_second_size_starts_from_what_the_first_found(
    finished: list[Finished], folder: Path
) -> None:
    """Its light kernels are not measured, its heavy ones with one baseline schedule and the seed."""
    with Store(folder.parent / "db", readonly=True) as store:
        found = {run.machine["model"]: list(run.machine["tasks"]) for run in store.runs()}
        assert len(found) == 1, "both sizes are the same model"
        records = list(store.records())
        by_run = [[record for record in records if record.run_id == run.id] for run in store.runs()]
    one, four = sorted(by_run, key=lambda own: -sum(r.origin == "default" for r in own))
    seeds = [record for record in four if record.origin == "seed"]
    assert seeds and all(record.usable for record in seeds)
    assert {record.trace for record in seeds} <= {record.trace for record in one}
    for units in (1, 2):
        counts = Counter(r.key.task for r in four if r.origin == "default" and r.key.units == units)
        tasks = {record.key.task for record in one if record.key.units == units}
        assert counts and set(counts.values()) == {1} and len(counts) < len(tasks)


def test_weights_are_there_once(folder: Path) -> None:
    one, other = folder / "weights.bin", folder / "batch-4" / "weights.bin"
    assert os.path.samefile(one, other)


def test_a_name_that_ends_like_a_batch_size_is_kept(tmp_path: Path) -> None:
    made = {}
    for batch in (1, 4):
        made[batch] = write_folder(tmp_path / str(batch), batch=batch)
        manifest = read_manifest(made[batch])
        named = dataclasses.replace(manifest, model=ModelId("net-1", manifest.model.hash))
        write_manifest(made[batch], named)
    merged = merge_batches(tmp_path / "net.tuned", made)
    assert [read_manifest(path).model.name for path in batch_folders(merged).values()] == [
        "net-1"
    ] * 2


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11])
def test_any_number_of_rows(folder: Path, model: Path, rows: int) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = draw(rows)
    with load(folder) as library:
        assert library.inputs[0].shape == (-1, 8, 12, 12)
        for units in (1, 2):
            outputs = library.use(units)({"x": x})
            assert outputs["y"].shape == (rows, 10)
            wanted = session.run(None, {"x": x})[0]
            np.testing.assert_allclose(outputs["y"], wanted, rtol=1e-4, atol=1e-5)


def test_bad_calls(folder: Path) -> None:
    with load(folder, preload=True) as library:
        with pytest.raises(UserError, match="at least 1"):
            library({"x": draw(1)[:0]})
        with pytest.raises(UserError, match=r"it must be \?x8x12x12"):
            library({"x": draw(1)[:, :4]})
    with pytest.raises(UserError, match="closed"):
        library({"x": draw(4)})


def test_a_folder_is_replaced_whole(folder: Path, model: Path, tmp_path: Path) -> None:
    """A run for one batch size leaves nothing of the others."""
    options = {"target": "llvm", "effort": "quick", "trials": 1, "db": model.parent / "db"}
    target = shutil.copytree(folder, tmp_path / "net.tuned")
    job = make_jobs([model], output=target, **options)
    assert any(isinstance(event, Finished) for event in tune_jobs(job))
    assert not (target / "batch-4").exists()
    assert read_manifest(target).batches == ()


def test_profile_and_server_know_all_batch_sizes(folder: Path, model: Path) -> None:
    assert group_by_model([folder]) == [[folder, folder / "batch-4"]]
    assert group_by_model([folder], [4]) == [[folder / "batch-4"]]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with Engine([Deployment((folder,), 60.0)], adaptive=False) as engine:
        assert engine.models[0].max_batch == 4
        x = draw(6)
        outputs = engine.submit("net", {"x": x}).result(timeout=60)
        np.testing.assert_allclose(outputs["y"], session.run(None, {"x": x})[0], atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ("0,1", "from 1 to 4096"),
        ("2,2", "different batch sizes"),
        ("many", "give different batch sizes"),
        ("", "give different batch sizes"),
    ],
)
def test_bad_sizes(model: Path, batch: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        make_jobs([model], batch=batch)


def test_models_without_a_batch_are_refused_before_anything_is_tuned(tmp_path: Path) -> None:
    fixed = write_network(tmp_path / "fixed.onnx")
    with pytest.raises(UserError, match="no input of the model has a dynamic first dimension"):
        list(tune_jobs(make_jobs([fixed], batch="1,4", db=tmp_path / "db", target="llvm")))
    with pytest.raises(UserError, match="for one model"):
        make_jobs([fixed, fixed], batch="1,4")
