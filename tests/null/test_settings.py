"""Settings: presets, overrides, and one clear line for each value that cannot work."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.input_shapes import parse_input, parse_inputs
from gpu_aware_tune.run.checks import check_files
from gpu_aware_tune.run.jobs import divide, make_jobs
from gpu_aware_tune.settings import (
    DEFAULT,
    EFFORTS,
    FULL,
    QUICK,
    Settings,
    ShareRule,
    make_settings,
    parse_duration,
    parse_percents,
)


@pytest.mark.parametrize("preset", [QUICK, DEFAULT, FULL])
def test_a_preset_shows_the_numbers_of_its_effort(preset: Settings) -> None:
    effort = EFFORTS[preset.effort]
    for field in dataclasses.fields(effort):
        assert getattr(preset, field.name) == getattr(effort, field.name)


def check(model: Path, settings: Settings) -> None:
    check_files(divide([model], settings).goals[0], settings)


def test_more_effort_never_means_less_of_anything() -> None:
    for smaller, larger in ((QUICK, DEFAULT), (DEFAULT, FULL)):
        assert smaller.trials is not None
        assert larger.trials is not None
        assert smaller.trials < larger.trials
        assert smaller.population < larger.population
        assert smaller.generations <= larger.generations


def test_flags_override_the_effort() -> None:
    settings = Settings(effort="full", trials=7, population=16, patience=0)
    assert (settings.trials, settings.population, settings.patience) == (7, 16, 0)
    assert settings.generations == EFFORTS["full"].generations


def test_time_alone_leaves_the_trials_open_and_both_limits_hold_together() -> None:
    assert Settings(time_s=60.0).trials is None
    assert Settings(time_s=60.0, trials=5).trials == 5


def test_settings_are_json_and_hold_every_field() -> None:
    stored = make_settings(gpu_pct="30,100", output="x", inputs=["a:1x2"]).as_dict()
    assert json.loads(json.dumps(stored)) == stored
    assert set(stored) == {field.name for field in dataclasses.fields(Settings)}
    assert stored["gpu_pct"] == [30, 100]
    assert stored["input_shapes"] == {"a": [1, 2]}


def test_paths_of_a_run() -> None:
    assert DEFAULT.records_path == Path("tuning_logs/records.sqlite")
    assert make_jobs(["some/where/net.onnx"]).goals[0].output == Path("net.tuned")
    assert make_jobs(["net.onnx"], output="there").goals[0].output == Path("there")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", (30,)), ("30,50,100", (30, 50, 100)), (" 5 %, 7%", (5, 7)), ("30,30,1", (30, 30, 1))],
)
def test_percents(text: str, expected: tuple[int, ...]) -> None:
    assert parse_percents(text) == expected


@pytest.mark.parametrize("text", ["0", "101", "-5", "abc", "", "30,", "1.5", "1e1", "٣"])
def test_bad_percents_name_the_flag_and_what_is_allowed(text: str) -> None:
    with pytest.raises(UserError, match=r"--gpu-pct .*1 to 100"):
        parse_percents(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1.5M", 90)],
)
def test_durations(text: str, expected: float) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "m", "10x", "-5", "5m1h", "1..5", "inf", "nan"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(UserError, match=r"--time .*10m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "name", "shape"),
    [
        ("data:1x3x224x224", "data", (1, 3, 224, 224)),
        ("gpu_0/data:0:1x3", "gpu_0/data:0", (1, 3)),
        ("n:7", "n", (7,)),
        ("scalar:", "scalar", ()),
    ],
)
def test_inputs(text: str, name: str, shape: tuple[int, ...]) -> None:
    assert parse_input(text) == (name, shape)


@pytest.mark.parametrize("text", ["", "data", ":1x3", "data:1,3", "data:0x3", "data:x", "d:1x-1"])
def test_bad_inputs(text: str) -> None:
    with pytest.raises(UserError, match="--input"):
        parse_input(text)


def test_several_shapes_of_an_input_are_several_sizes() -> None:
    assert parse_inputs([]) == [{}]
    assert parse_inputs(["a:1x2", "b:"]) == [{"a": (1, 2), "b": ()}]
    sizes = [{"a": (1,), "b": (3,)}, {"a": (2,), "b": (3,)}]
    assert parse_inputs(["a:1", "b:3", "a:2"]) == sizes
    assert parse_inputs({"a": [(1,), (2,)], "b": (3,)}) == sizes


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a:1", "a:1"], "a:1 is there twice"),
        (["a:1", "b:1", "a:2", "b:2", "a:3"], "'a' has 3, 'b' has 2 shapes"),
    ],
)
def test_sizes_that_do_not_go_together(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_inputs(texts)


@pytest.mark.parametrize(
    "options",
    [
        {"gpu_pct": 0},
        {"gpu_pct": 30.5},
        {"gpu_pct": True},
        {"gpu_pct": []},
        {"target": "rocm"},
        {"dtype": "int3"},
        {"effort": "max"},
        {"partition": "half"},
        {"device": -1},
        {"trials": 0},
        {"trials": 1.5},
        {"trials": "many"},
        {"time": 0},
        {"time_s": float("inf")},
        {"patience": -1},
        {"seed": -1},
        {"input_shapes": {"x": (0,)}},
        {"trails": 3},
    ],
)
def test_values_out_of_range_are_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        make_settings(**options)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value), "the line names the value, then what is allowed"


def test_a_misspelt_option_is_told_the_right_name() -> None:
    with pytest.raises(UserError, match="'trials'"):
        make_settings(trails=3)


def test_files_are_checked_without_leaving_anything_behind(tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    settings = make_settings(output=str(tmp_path / "a" / "b"), db=str(tmp_path / "db"))
    for spoil in (model.mkdir, model.rmdir, model.touch):
        spoil()
        with pytest.raises(UserError, match=r"net\.onnx"):
            check(model, settings)
    model.write_bytes(b"x")
    check(model, settings)
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("field", ["output", "db"])
def test_a_folder_that_cannot_be_written_is_a_setup_error(tmp_path: Path, field: str) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(b"x")
    good = {"output": str(tmp_path / "out"), "db": str(tmp_path / "db")}
    for folder in (model / "inside", Path("/proc/inside")):
        with pytest.raises(SetupError, match=str(folder)):
            check(model, make_settings(**{**good, field: str(folder)}))


def test_one_model_has_all_the_shares_and_each_once() -> None:
    assert make_jobs(["a.onnx"], gpu_pct="30,50,30").goals[0].percents == (30, 50)
    assert make_jobs(["a.onnx"]).goals[0].percents == (100,)


def test_several_models_have_a_share_and_a_folder_each() -> None:
    models = ["x/a.onnx", "b.onnx", "c.onnx"]
    jobs = make_jobs(models, gpu_pct="30,30,40", output="out")
    assert [goal.percents for goal in jobs.goals] == [(30,), (30,), (40,)]
    assert [str(goal.output) for goal in jobs.goals] == [
        "out/a.tuned",
        "out/b.tuned",
        "out/c.tuned",
    ]
    assert [goal.percents for goal in make_jobs(models).goals] == [(33,)] * 3
    assert [goal.percents for goal in make_jobs(models, gpu_pct=100).goals] == [(100,)] * 3


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["a.onnx", "b.onnx", "c.onnx"], {"gpu_pct": "30,40"}, "2 shares for 3 models"),
        (["a.onnx", "x/a.onnx"], {}, "several models are called 'a'"),
        (["a.onnx"], {"share": "equal"}, "between several models"),
        (["a.onnx", "b.onnx"], {"share": "half"}, "--share 'half' is unknown"),
        (["a.onnx"], {"slices": -1}, "--slices -1 is out of range"),
        ([], {}, "no model is named"),
    ],
)
def test_shares_that_do_not_fit_the_models(
    models: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_jobs(models, **options)


def test_a_dry_run_looks_at_the_model_and_writes_nothing(tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    settings = make_settings(output="/proc/out", db=str(tmp_path), dry_run=True)
    with pytest.raises(UserError, match=r"net\.onnx"):
        check(model, settings)
    model.write_bytes(b"x")
    tmp_path.chmod(0o555)
    before = tmp_path.stat().st_mtime_ns
    check(model, settings)
    assert tmp_path.stat().st_mtime_ns == before, "not even for a moment"


def test_auto_is_the_knee_of_the_models_own_curve() -> None:
    assert make_settings(gpu_pct="auto").share == ShareRule.KNEE
    with pytest.raises(UserError, match="--gpu-pct auto measures"):
        make_jobs(["a.onnx"], gpu_pct="auto", dry_run=True)


def test_a_full_disk_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(b"x" * 1000)
    settings = make_settings(output=tmp_path / "out", db=tmp_path / "db")
    check(model, settings)
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SetupError, match=r"-o .*out' cannot be written \(3 MiB are free"):
        check(model, settings)
