"""The main path on a small real network: tune, resume, two shares, Ctrl-C, kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tvm
from small_network import write_network
from tvm import te

import gpu_aware_tune
from gpu_aware_tune.events import Event, Finished, Note, Planned, Trial
from gpu_aware_tune.kernels.traces import module_to_json
from gpu_aware_tune.records.store import Store
from gpu_aware_tune.settings import Settings
from gpu_aware_tune.tuning import tune_events

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two convolutions, a residual sum, pooling and a classifier, with seeded weights."""
    folder = tmp_path_factory.mktemp("model")
    return write_network(folder / "small.onnx", residual=True, size=28, kernel=3)


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with convolutions that compile sooner."""
    return write_network(tmp_path_factory.mktemp("model") / "small.onnx", residual=True)


def settings(folder: Path, **changes: object) -> Settings:
    values: dict[str, object] = {
        "target": "llvm", "effort": "quick", "trials": 16, "output": folder / "out", "db": folder / "db",
    }  # fmt: skip
    return Settings(**{**values, **changes})  # type: ignore[arg-type]


def run(network: Path, how: Settings) -> list[Event]:
    return list(tune_events(network, how))


def last(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def searched(events: list[Event]) -> int:
    return sum(isinstance(event, Trial) and event.origin == "search" for event in events)


def reference(network: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, inputs)[0]
    return output


def records(folder: Path) -> list[tuple[str, float | None]]:
    """(origin, seconds) of every record on disk."""
    with sqlite3.connect(f"file:{folder / 'db' / 'records.sqlite'}?mode=ro", uri=True) as db:
        return db.execute("SELECT origin, seconds FROM records").fetchall()


def test_a_run_gives_a_right_library_and_the_next_one_continues(
    network: Path, tmp_path: Path
) -> None:
    first = run(network, settings(tmp_path))
    done = last(first)
    assert searched(first) == 16 and done.trials == 16
    assert done.shares[0].verified and done.output == tmp_path / "out"
    assert done.shares[0].tuned_s is not None and done.shares[0].tuned_s > 0

    library = gpu_aware_tune.load(tmp_path / "out")
    inputs = {"x": np.random.default_rng(1).standard_normal((1, 8, 28, 28)).astype("float32")}
    np.testing.assert_allclose(
        library(inputs)["y"], reference(network, inputs), rtol=1e-4, atol=1e-5
    )

    there = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    plan = run(network, settings(tmp_path, dry_run=True))[-1]
    assert isinstance(plan, Planned)
    assert sum(task.known for task in plan.tasks) == 16, "a dry run sees what is known"
    stays = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert stays.items() <= there.items(), "and changes nothing"

    again = run(network, settings(tmp_path))
    plan = next(event for event in again if isinstance(event, Planned))
    assert searched(again) == 0, "everything asked for was measured by the first run"
    assert sum(task.known for task in plan.tasks) == 16

    more = run(network, settings(tmp_path, trials=24))
    assert searched(more) == 8

    before = len(records(tmp_path))
    fresh = run(network, settings(tmp_path, trials=8, resume=False))
    assert searched(fresh) == 8, "--fresh measures again"
    assert len(records(tmp_path)) >= before, "and loses nothing"


def test_two_shares_in_one_search(light: Path, tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two shares need two cores")
    half = 50 if len(os.sched_getaffinity(0)) == 2 else 51
    events = run(light, settings(tmp_path, gpu_pct=(half, 100), trials=8))
    done = last(events)
    units = [share.units for share in done.shares]
    assert len(set(units)) == 2
    for event in events:
        if isinstance(event, Trial) and event.failure is None:
            assert set(event.seconds) == set(units), "each candidate is measured on both shares"
    for count in units:
        assert gpu_aware_tune.load(tmp_path / "out", units=count).units == count
    assert len(list((tmp_path / "out").glob("weights*"))) == 1
    assert len(list((tmp_path / "out").glob("lib*.so"))) == 1, "equal kernels are in it once"


def test_a_dry_run_measures_nothing(light: Path, tmp_path: Path) -> None:
    events = run(light, settings(tmp_path, dry_run=True))
    assert any(isinstance(event, Planned) for event in events)
    assert not any(isinstance(event, (Trial, Finished)) for event in events)
    assert list(tmp_path.iterdir()) == [], "and writes nothing"


def test_a_task_whose_hash_the_store_has_of_another_kernel_is_left_alone(
    light: Path, tmp_path: Path
) -> None:
    def hashes() -> list[str]:
        plan = run(light, settings(tmp_path, dry_run=True))[-1]
        assert isinstance(plan, Planned)
        return [task.hash for task in plan.tasks]

    clash, *others = hashes()
    x = te.placeholder((4,), name="x")
    another = tvm.IRModule({"main": te.create_prim_func([x, te.compute((4,), lambda i: x[i] + 1)])})
    with Store(tmp_path / "db") as store:
        store.add_task(clash, "another", module_to_json(another))
    assert hashes() == others


def start(network: Path, folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "cli.py"), str(network), "--target", "llvm", "--json"]
    places = ["--db", str(folder / "db"), "-o", str(folder / "out")]
    return subprocess.Popen(
        [*command, *places, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )


def wait_for_records(folder: Path, count: int, timeout_s: float = 90.0) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if len(records(folder)) >= count:
                return
        except sqlite3.OperationalError:
            pass  # the store is not there yet
        time.sleep(0.05)
    raise AssertionError(f"no {count} records within {timeout_s:.0f} s")


def test_ctrl_c_exports_the_best_so_far(network: Path, tmp_path: Path) -> None:
    process = start(network, tmp_path, "--trials", "4000")
    wait_for_records(tmp_path, 25)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    finished = json.loads(output)
    assert finished["interrupted"] is True
    assert (tmp_path / "out" / "manifest.json").exists()


def test_kill_9_loses_no_record_and_leaves_no_process(network: Path, tmp_path: Path) -> None:
    process = start(network, tmp_path, "--trials", "4000")
    wait_for_records(tmp_path, 25)
    time.sleep(random.uniform(0, 1.5))
    reported = len(records(tmp_path))
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while time.monotonic() < end and leftovers(tmp_path):
        time.sleep(0.1)
    assert leftovers(tmp_path) == []
    assert len(records(tmp_path)) >= reported
    events = run(network, settings(tmp_path, trials=reported))
    assert searched(events) < reported, "the rerun starts from what the killed one measured"
    assert last(events).shares[0].verified


def leftovers(folder: Path) -> list[str]:
    """Worker processes of a run (they carry its TMPDIR) and scratch folders that are still there."""
    mark = f"TMPDIR={folder}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes():
                    found.append(entry.name)
            except OSError:
                continue  # it ended, or is not ours
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two shares need two cores")
@pytest.mark.parametrize("objective", ["robust", "throughput"])
def test_objectives_over_two_shares(light: Path, tmp_path: Path, objective: str) -> None:
    half = 50 if len(os.sched_getaffinity(0)) == 2 else 51
    done = last(run(light, settings(tmp_path, gpu_pct=(half, 100), trials=8, objective=objective)))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    chosen: dict[str, set[str]] = {}
    for task in done.tasks:
        chosen.setdefault(task.name, set()).add(task.origin)
    if objective == "robust":
        assert len(done.shares) == 2
        assert all(len(origins) == 1 for origins in chosen.values())
        assert all(share.loss is not None and share.loss > -0.5 for share in done.shares)
    else:
        assert len(done.shares) == len(manifest["libraries"]) == 1
    assert manifest["objective"] == objective


def test_untuned_kernels_are_kept_where_the_whole_model_is_faster_with_them(
    light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_when_tuned(*args: object) -> dict[str, float]:
        return {"tuned": 2e-3, "untuned": 1e-3}

    monkeypatch.setattr("gpu_aware_tune.run.libraries.time_on", slow_when_tuned)
    events = run(light, settings(tmp_path, trials=8))
    done = last(events)
    assert done.shares[0].tuned_s == done.shares[0].untuned_s == 1e-3
    assert {task.origin for task in done.tasks} <= {"default", "plain"}
    assert any(isinstance(e, Note) and "faster untuned" in e.text for e in events)
    library = gpu_aware_tune.load(tmp_path / "out")
    inputs = {"x": np.ones((1, 8, 12, 12), "float32")}
    np.testing.assert_allclose(library(inputs)["y"], reference(light, inputs), rtol=1e-4)


def test_auto_tunes_for_the_knee_of_the_untuned_models_curve(network: Path, tmp_path: Path) -> None:
    events = run(network, settings(tmp_path, share="knee", trials=4))
    why = next(
        event.text for event in events if isinstance(event, Note) and "tuned for" in event.text
    )
    done = last(events)
    assert len(done.shares) == 1 and done.shares[0].share in why
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_run_that_is_closed_early_keeps_what_it_has_measured(light: Path, tmp_path: Path) -> None:
    events = tune_events(light, settings(tmp_path, trials=8))
    seen = 0
    for event in events:
        seen += isinstance(event, Trial)
        if seen == 3:
            break
    events.close()  # type: ignore[attr-defined]
    assert len(records(tmp_path)) >= 3


def test_a_dry_run_from_python_measures_and_writes_nothing(light: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    made = gpu_aware_tune.tune(
        light, target="llvm", output=output, db=tmp_path / "db", dry_run=True
    )
    assert made is None
    assert not output.exists() and not (tmp_path / "db").exists()


def test_a_wrong_keyword_is_named_by_python_itself(network: Path) -> None:
    with pytest.raises(TypeError, match="gpu_part"):
        gpu_aware_tune.tune(network, gpu_part=30)  # type: ignore[call-arg]
