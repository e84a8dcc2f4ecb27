"""`tune profile` and its Python side on real libraries, inside real shares of this CPU."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import RunTune
from manifests import read_json, write_json
from tiny_library import target_json, write_library

from gpu_aware_tune.cli.main import main
from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.library import save_weights
from gpu_aware_tune.model.importer import Model
from gpu_aware_tune.partition import Device, find_device, open_partitions, usable_cores
from gpu_aware_tune.profiling.knee import choose_share
from gpu_aware_tune.profiling.profiles import Curve, grid, profile, profile_untuned
from gpu_aware_tune.workers import WorkerHost

CORES = len(usable_cores())
QUICK: dict[str, Any] = {"seconds": 0.02, "rounds": 2}
two_cores = pytest.mark.skipif(CORES < 2, reason="shares of a CPU need two cores")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    return write_library(tmp_path_factory.mktemp("profiles"))


@pytest.fixture(scope="module")
def batch_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tmp_path_factory.mktemp("batch"), batch=4)[1]


@two_cores
def test_each_share_runs_the_library_that_load_would_pick(tiny: tuple[Model, Path]) -> None:
    curve = profile(tiny[1], **QUICK)
    assert isinstance(curve, Curve)
    units = [point.units for point in curve.points]
    assert units == sorted(units)
    assert {1, CORES} <= set(units)
    assert [point.tuned_at for point in curve.points] == [min(n, 2) for n in units]
    assert (curve.model, curve.backend, curve.unit) == ("tiny", "cores", "core")
    assert curve.units_total == CORES
    for point in curve.points:
        assert 0 < point.p10_ms <= point.latency_ms <= point.p90_ms
        assert point.throughput_per_s > 0
        share = point.units / CORES
        wanted = point.throughput_per_s / (point.latency_ms / 1e3 * share)
        assert point.efficacy == pytest.approx(wanted)
        assert point.runs >= 2
        assert point.power_w is None
    assert curve.knees[1] in units
    assert choose_share(curve.points)[0] in {point.percent for point in curve.points}


@two_cores
def test_one_library_can_be_pinned_and_shares_be_named(tiny: tuple[Model, Path]) -> None:
    curve = profile(str(tiny[1]), [2, 1, 2], tuned_at=1, **QUICK)
    assert [(point.units, point.tuned_at) for point in curve.points] == [(1, 1), (2, 1)]
    with pytest.raises(UserError, match="choose one of 1, 2"):
        profile(tiny[1], tuned_at=3, **QUICK)
    with pytest.raises(UserError, match=f"has {CORES} cores; allowed: 1 to {CORES}"):
        profile(tiny[1], [CORES + 1], **QUICK)


def test_batch_sizes_are_folders_side_by_side(
    tiny: tuple[Model, Path], batch_of_four: Path, tmp_path: Path
) -> None:
    curve = profile([batch_of_four, tiny[1]], [1], **QUICK)
    assert [point.batch for point in curve.points] == [1, 4]
    small, large = curve.points
    assert large.latency_ms > small.latency_ms
    assert curve.knees == {1: 1, 4: 1}
    again = shutil.copytree(tiny[1], tmp_path / "again.tuned")
    with pytest.raises(UserError, match="both have batch size 1: give one folder for each"):
        profile([tiny[1], again], [1], **QUICK)


def test_the_curve_of_a_model_that_is_not_tuned_yet(
    tiny: tuple[Model, Path], tmp_path: Path
) -> None:
    model, folder = tiny
    device: Device = find_device("llvm", 0, None)[0]
    partitions = open_partitions(grid(device, "cores"), device, "cores")
    weights = tmp_path / "weights.bin"
    save_weights(model.weights, weights)
    with WorkerHost() as host:
        libraries = {2: folder / "lib-2.so"}
        curve = profile_untuned(host, partitions, libraries, weights, model, 0.02, 2)
    assert [point.units for point in curve.points] == [p.share.units for p in partitions]
    assert {point.tuned_at for point in curve.points} == {2}
    percent, why = choose_share(curve.points)
    assert percent in {point.percent for point in curve.points}
    assert why


def test_damaged_and_foreign_folders_are_refused(
    tiny: tuple[Model, Path], batch_of_four: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny[1], tmp_path / "copy.tuned"))
    manifest = read_json(copy)

    def write(**changes: object) -> None:
        write_json(copy, {**manifest, **changes})

    write(device="cuda/NVIDIA H200/sm_90a")
    with pytest.raises((SetupError, UserError), match="GPU"):
        profile(copy, **QUICK)
    with pytest.raises(UserError, match="for different devices"):
        profile([batch_of_four, copy], **QUICK)
    shares = [{"units": 1, "target": {**target_json(), "mcpu": "diamondrapids"}}]
    write(shares=shares)
    if shares[0]["target"]["mcpu"] != target_json()["mcpu"]:  # type: ignore[index]
        with pytest.raises(UserError, match="compiled for diamondrapids"):
            profile(copy, [1], **QUICK)
    write()
    (copy / "weights.bin").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"weights\.bin is damaged"):
        profile(copy, **QUICK)


def test_as_a_user_calls_it(tiny: tuple[Model, Path], run_tune: RunTune, tmp_path: Path) -> None:
    effort = ("--seconds", "0.02", "--rounds", "2")
    done = run_tune("profile", tiny[1], *effort, "--csv", tmp_path / "curve.csv")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "efficacy" in done.stdout
    assert done.stdout.count(" knee") == 1 + (CORES > 1)
    assert ("--gpu-pct" in done.stdout) == (CORES > 1)
    with (tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[0]["units"]) == 1
    assert sum(int(row["knee"]) for row in rows) == 1
    assert all(float(row["latency_ms"]) > 0 for row in rows)
    assert {row["power_w"] for row in rows} == {""}


def test_json_is_one_object(tiny: tuple[Model, Path], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["profile", str(tiny[1]), "--units", "1", "--seconds", "0.02", "--rounds", "1", "--json"]
    assert main(args) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["knees"] == {"1": 1}
    assert shown["points"][0]["units"] == 1
    assert shown["points"][0]["energy_j"] is None


def test_units_that_are_not_there_are_told_in_one_line(
    tiny: tuple[Model, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(tiny[1]), "--units", str(CORES + 1)]) == 2
    assert f"allowed: 1 to {CORES}" in capsys.readouterr().err
    assert main(["profile", str(tiny[1]), "--partition", "green"]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_saved_curves_are_planned_with(
    tiny: tuple[Model, Path],
    batch_of_four: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    curves = str(tmp_path / "curves")
    folders = [str(batch_of_four), str(tiny[1])]
    quick = ["--seconds", "0.02", "--rounds", "2", "--json"]
    assert main(["profile", *folders, "--batch", "1,4", "--save", curves, *quick]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert {point["batch"] for point in measured["points"]} == {1, 4}
    demand = ["--rate", "10", "--slo", "1s", "--simulate", "1s"]
    assert main(["plan", folders[0], "--curves", curves, *demand, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert (plan["device"]["units"], plan["device"]["unit"]) == (CORES, "core")
    assert plan["simulation"][0]["attainment"] == 1.0
