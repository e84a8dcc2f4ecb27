"""Several models in one run: slices side by side, shared kernels searched once, a folder each."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import ROOT
from small_network import write_network

from gpu_aware_tune import load
from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.events import Event, Finished, Note, Planned, Progress, Trial, result_of
from gpu_aware_tune.partition import CoresPartition, usable_cores
from gpu_aware_tune.records.store import Store
from gpu_aware_tune.run.jobs import make_jobs
from gpu_aware_tune.run.models import import_models, recall_models
from gpu_aware_tune.run.search_stage import start_workers
from gpu_aware_tune.run.session import Session
from gpu_aware_tune.search.candidates import Candidate
from gpu_aware_tune.tuning import tune_jobs

HALF = 50  # percent: one core of two


def network(path: Path, classes: int, channels: int = 16) -> Path:
    """Models differ by their heads or by all of their kernels."""
    return write_network(path, classes, channels, seed=classes)


def tuned(folder: Path, models: list[Path], **options: object) -> list[Event]:
    jobs = make_jobs(
        models,
        target="llvm",
        effort="quick",
        output=folder / "out",
        db=folder / "db",
        **options,
    )
    return list(tune_jobs(jobs))


def check_numbers(model: Path, output: Path | None) -> None:
    inputs = {"x": np.random.default_rng(1).random((1, 8, 12, 12), dtype="float32")}
    assert output is not None
    library = load(output)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(library(inputs)["y"], session.run(None, inputs)[0], atol=1e-4)
    library.close()


@pytest.mark.skipif(len(usable_cores()) < 2, reason="two slices need two cores")
def test_models_with_the_same_kernels_are_searched_once_and_side_by_side(tmp_path: Path) -> None:
    models = [network(tmp_path / "ten.onnx", 10), network(tmp_path / "twenty.onnx", 20)]
    events = tuned(tmp_path, models, gpu_pct=HALF, trials=24)
    planned = [event for event in events if isinstance(event, Planned)]
    finished = [event for event in events if isinstance(event, Finished)]
    assert [event.model for event in finished] == ["ten", "twenty"]
    shared = {task.hash for task in planned[0].tasks} & {task.hash for task in planned[1].tasks}
    assert len(shared) >= 2, "both models have the same convolutions"
    searched = [e for e in events if isinstance(e, Trial) and e.origin == "search"]
    assert len(searched) < 2 * 24, "trials of a shared kernel count for both models"
    assert all(event.trials >= 24 or event.stopped_by == "space" for event in finished)
    progress = [event for event in events if isinstance(event, Progress)]
    assert {len(event.slices) for event in progress} == {2}
    for model, event in zip(models, finished, strict=True):
        assert event.output == tmp_path / "out" / f"{model.stem}.tuned"
        assert event.shares[0].units == max(1, len(usable_cores()) * HALF // 100)
        assert event.reordered is not None and event.reordered.tasks > 0
        check_numbers(model, event.output)
    with Store(tmp_path / "db" / "records.sqlite", readonly=True) as store:
        rows = [(run.machine["model"], run.status) for run in store.runs()]
        seen = [run.machine["evidence"] for run in store.runs()]
    assert rows == [("ten", "finished"), ("twenty", "finished")]
    units = finished[0].shares[0].units
    assert seen == [{str(units): [{"backend": "cores", "units": units}] * 2}] * 2, "of both slices"


@pytest.mark.skipif(len(usable_cores()) < 2, reason="two slices need two cores")
def test_slices_of_one_worker_tune_as_those_of_several_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with green contexts, which cannot measure side by side in workers of their own."""
    monkeypatch.setattr(CoresPartition, "slices_share_worker", True)
    models = [network(tmp_path / "a.onnx", 10), network(tmp_path / "b.onnx", 10, channels=24)]
    events = tuned(tmp_path, models, gpu_pct=HALF, trials=12)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("2 slices in one worker" in text for text in notes), notes
    finished = [event for event in events if isinstance(event, Finished)]
    for model, event in zip(models, finished, strict=True):
        assert event.reordered is not None and event.reordered.tasks > 0
        check_numbers(model, event.output)
    with Store(tmp_path / "db" / "records.sqlite", readonly=True) as store:
        (seen,) = store.runs()[0].machine["evidence"].values()
        flags = [record.flags for record in store.records()]
    assert [slice_["apart"] for slice_ in seen] == [True, True]
    assert any("together" in text for text in flags), "they did measure at the same time"


def test_a_second_model_with_another_head_only_searches_the_head(tmp_path: Path) -> None:
    first, second = network(tmp_path / "ten.onnx", 10), network(tmp_path / "twenty.onnx", 20)
    tuned(tmp_path, [first], trials=16)
    events = tuned(tmp_path, [second], trials=16)
    plan = next(event for event in events if isinstance(event, Planned))
    known = {task.name: task.known for task in plan.tasks}
    assert sum(known.values()) > 8, known
    assert sum(isinstance(e, Trial) and e.origin == "search" for e in events) < 8


@pytest.mark.skipif(len(usable_cores()) < 2, reason="two different shares need two cores")
def test_models_on_shares_that_overlap_take_turns(tmp_path: Path) -> None:
    models = [network(tmp_path / "a.onnx", 10), network(tmp_path / "b.onnx", 10, channels=24)]
    events = tuned(tmp_path, models, gpu_pct=(HALF, 100), trials=8)
    finished = [event for event in events if isinstance(event, Finished)]
    assert [event.shares[0].units for event in finished] == [
        max(1, len(usable_cores()) * HALF // 100),
        len(usable_cores()),
    ]
    assert {len(e.slices) for e in events if isinstance(e, Progress)} == {1}
    for model, event in zip(models, finished, strict=True):
        check_numbers(model, event.output)


def test_the_same_machine_code_is_measured_once(tmp_path: Path) -> None:
    job = make_jobs([network(tmp_path / "a.onnx", 10)], target="llvm", db=tmp_path / "db")
    with Session(job.settings) as session:
        list(session.find_device(job.goals))
        models = result_of(import_models(session, job.goals))
        models, work, _ = result_of(recall_models(session, models))
        workers = result_of(start_workers(session, models, work))
        task = work.tasks[0].hash
        traces = workers.baselines[task][:2]
        wanted = [Candidate(task, trace, "default") for trace in (*traces, *traces, traces[0])]
        outcomes = list(workers.pipeline.run(wanted))
    assert len(outcomes) == 5
    measured: dict[str | None, set[int]] = {}
    for outcome in outcomes:
        measured.setdefault(outcome.candidate.trace, set()).add(id(outcome.measurements))
    assert len(measured) == 2
    assert all(len(ones) == 1 for ones in measured.values()), "one measurement for each code"


def test_two_runs_at_once_share_a_store_and_learn_from_each_other(tmp_path: Path) -> None:
    """Two processes, one default store, the same model on the same share."""
    model = network(tmp_path / "net.onnx", 10)
    runs = [start_run(model, tmp_path, "one")]
    # The other one starts in mid-search, whatever the machine's load: it must find what is there.
    wait_for_records(runs[0], tmp_path / "db", 6)
    runs.append(start_run(model, tmp_path, "other"))
    outcomes = []
    for process in runs:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        outcomes.append(json.loads(out))
    assert all(outcome["shares"][0]["verified"] for outcome in outcomes)
    with Store(tmp_path / "db", readonly=True) as store:
        assert [run.status for run in store.runs()] == ["finished", "finished"]
        searched = [r for r in store.records() if r.origin == "search"]
        by_run = {run.id: sum(r.run_id == run.id for r in searched) for run in store.runs()}
    # The same seed draws the same candidates: alone, each would measure all of its 24 trials.
    assert by_run[1] > 0 and 20 <= sum(by_run.values()) < 36, by_run


def start_run(model: Path, folder: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "cli.py"), str(model), "--target", "llvm", "--json"]
    command += ["--trials", "24", "--effort", "quick", "--db", str(folder / "db")]
    command += ["-o", str(folder / f"{name}.tuned"), "--seed", "0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_records(run: subprocess.Popen[str], db: Path, count: int) -> None:
    """Until the run has stored so many records of its search; it must not have ended before."""
    end = time.monotonic() + 240
    while True:
        assert run.poll() is None, "the run ended before its search was seen"
        with contextlib.suppress(SetupError), Store(db, readonly=True, missing_ok=True) as store:
            if sum(record.origin == "search" for record in store.records()) >= count:
                return  # an error: the store is being made
        assert time.monotonic() < end, "no records"
        time.sleep(0.05)
