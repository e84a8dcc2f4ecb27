"""The command line: which command runs, what goes to which stream, and the exit codes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from conftest import ROOT, RunTune
from onnx import TensorProto, helper

from gpu_aware_tune.cli import main as cli_main
from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.events import Event, Finished, Note, Planned, Progress, ShareResult, StoppedBy
from gpu_aware_tune.run.jobs import TuningJob, make_jobs
from gpu_aware_tune.search.budget import StopRequest
from gpu_aware_tune.workers import scratch_place

PLANNED = Planned("net", "CPU", ("100 % of 2 cores = 2 cores",), (2,), "cores", (), 4, None)
PROGRESS = Progress("net", 1.0, 2, 4, 120.0, {2: 0.02}, {2: 0.01}, {"crash": 1}, 1.0)
SHARE = ShareResult("100 % of 2 cores = 2 cores", 2, 0.02, 0.01, True, 1e-7)
FINISHED = Finished("net", Path("net.tuned"), (), (SHARE,), 4, 2.0, interrupted=False)
NO_RESULT = Finished("net", None, (), (), 0, 2.0, interrupted=True, stopped_by=StoppedBy.INTERRUPT)

Capture = pytest.CaptureFixture[str]
Steps = Callable[[], Iterator[Event]]
Fake = Callable[[Steps], list[TuningJob]]


def save_model(path: Path) -> None:
    """Writes a model of two inputs and a weight, which old exporters list as an input too."""
    value, kind = helper.make_tensor_value_info, TensorProto.FLOAT
    inputs = [value("a:0", kind, [1, 3]), value("b", kind, [2])]
    inputs += [value("weight", kind, [3])]
    nodes = [
        helper.make_node("Mul", ["a:0", "weight"], ["m"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    outputs = [value("m", kind, None), value("y", kind, None)]
    weights = [helper.make_tensor("weight", kind, [3], [1.0, 2.0, 3.0])]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, weights)), path)


@pytest.fixture
def fake_tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """Puts scripted events in the place of a real run; gives the calls that were made."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("net.onnx"))
    monkeypatch.setattr("shutil.which", lambda name, *_, **__: f"/usr/bin/{name}")

    def install(steps: Steps) -> list[TuningJob]:
        calls = []
        kept = []  # so that a run ends by being closed, not by being collected

        def tune_jobs(job: TuningJob, stop: StopRequest) -> Iterator[Event]:
            calls.append(job)
            kept.append(steps())
            return kept[-1]

        module = types.ModuleType("gpu_aware_tune.tuning")
        module.tune_jobs = tune_jobs  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gpu_aware_tune.tuning", module)
        return calls

    return install


def good_run() -> Iterator[Event]:
    yield Note("no GPU found: tuning for the CPU")
    yield PLANNED
    os.write(1, b"noise of a library\n")
    subprocess.run(["sh", "-c", "echo noise of a worker; echo noise of a worker >&2"], check=True)
    yield PROGRESS
    yield FINISHED


def failing(error: BaseException) -> Steps:
    def steps() -> Iterator[Event]:
        yield PLANNED
        os.write(2, b"what the library said last\n")
        raise error

    return steps


def test_a_model_alone_means_the_tune_command(fake_tuning: Fake, capfd: Capture) -> None:
    calls = fake_tuning(good_run)
    assert cli_main.main(["net.onnx"]) == 0
    assert calls == [make_jobs(["net.onnx"])]
    out, err = capfd.readouterr()
    assert "10.0 ms tuned (2.00x)" in out
    assert "no GPU found" in err
    assert "2/4 trials" in err
    assert "noise" not in out + err


def test_every_flag_reaches_the_settings(fake_tuning: Fake) -> None:
    calls = fake_tuning(good_run)
    flags = (
        "--gpu-pct 30,50 --target llvm --arch znver4 --device 1 --partition cores --trials 9 "
        "--time 2m --effort quick --patience 5 -o there --db logs --input a:0:1x3 --input b:2 "
        "--dtype float16 --seed 7 --fresh --no-verify --dry-run"
    )
    assert cli_main.main([*flags.split(), "net.onnx"]) == 0
    expected = make_jobs(
        ["net.onnx"],
        gpu_pct=(30, 50),
        target="llvm",
        arch="znver4",
        device=1,
        partition="cores",
        trials=9,
        time_s=120.0,
        effort="quick",
        patience=5,
        output=Path("there"),
        db=Path("logs"),
        input_shapes={"a:0": (1, 3), "b": (2,)},
        dtype="float16",
        seed=7,
        resume=False,
        verify=False,
        dry_run=True,
    )
    assert calls == [expected]


def test_json_is_one_object_on_stdout_and_progress_stays_on_stderr(
    fake_tuning: Fake, capfd: Capture
) -> None:
    fake_tuning(good_run)
    assert cli_main.main(["tune", "--json", "net.onnx"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result["output"] == "net.tuned"
    assert result["shares"][0]["tuned_s"] == 0.01
    assert "2/4 trials" in err


def test_json_of_a_dry_run_is_the_plan(fake_tuning: Fake, capfd: Capture) -> None:
    fake_tuning(lambda: (event for event in (PLANNED,)))
    assert cli_main.main(["net.onnx", "--json", "--dry-run"]) == 0
    assert json.loads(capfd.readouterr().out)["units"] == [2]


def test_quiet_prints_nothing_but_errors(fake_tuning: Fake, capfd: Capture) -> None:
    fake_tuning(good_run)
    assert cli_main.main(["-q", "net.onnx"]) == 0
    assert capfd.readouterr() == ("", "")
    fake_tuning(failing(UserError("model 'net.onnx' is no ONNX file: export it again")))
    assert cli_main.main(["-q", "net.onnx"]) == 2
    assert capfd.readouterr() == ("", "error: model 'net.onnx' is no ONNX file: export it again\n")


def test_verbose_lets_the_libraries_speak(fake_tuning: Fake, capfd: Capture) -> None:
    fake_tuning(good_run)
    assert cli_main.main(["-v", "net.onnx"]) == 0
    assert "noise of a library" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("a\nb"), 2), (SetupError("a b"), 3), (KeyboardInterrupt(), 130)],
)
def test_expected_errors_are_one_line_and_have_their_code(
    fake_tuning: Fake, capfd: Capture, error: BaseException, code: int
) -> None:
    fake_tuning(failing(error))
    assert cli_main.main(["net.onnx"]) == code
    last = "error: interrupted" if code == 130 else "error: a b"
    plan = ["net on CPU: 0 tasks, 4 trials, partition cores", f"  share: {PLANNED.shares[0]}"]
    assert capfd.readouterr().err.splitlines() == [*plan, last]


def test_a_defect_shows_what_the_libraries_said_last(fake_tuning: Fake, capfd: Capture) -> None:
    fake_tuning(failing(ZeroDivisionError("oops")))
    assert cli_main.main(["net.onnx"]) == 1
    err = capfd.readouterr().err
    assert "what the library said last" in err
    assert "error: ZeroDivisionError: oops; this is a defect" in err
    assert "Traceback" not in err


def test_a_full_disk_is_no_defect(fake_tuning: Fake, capfd: Capture) -> None:
    fake_tuning(failing(OSError(errno.ENOSPC, "No space left on device", "/a/b.so")))
    assert cli_main.main(["net.onnx"]) == 3
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the disk is full in '/a/b.so' (No space left on device): free")


def test_too_little_room_for_temporary_files_is_told_at_once(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, place = shutil.disk_usage, scratch_place()
    little = types.SimpleNamespace(total=1 << 40, used=0, free=2 << 20)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: little if folder == place else usage(folder)
    )
    model = tmp_path / "net.onnx"
    model.write_bytes(b"no model yet")
    assert cli_main.main([str(model), "--db", str(tmp_path / "db"), "-o", str(tmp_path / "o")]) == 3
    error = capfd.readouterr().err
    assert f"temporary files in '{place}': 2 MiB are free there, about 24 MiB are needed" in error


def test_debug_shows_the_traceback_wherever_it_stands(fake_tuning: Fake, capfd: Capture) -> None:
    fake_tuning(failing(UserError("bad")))
    for args in (["--debug", "net.onnx"], ["net.onnx", "--debug"], ["tune", "--debug", "net.onnx"]):
        assert cli_main.main(args) == 2
        err = capfd.readouterr().err
        assert "Traceback" in err
        assert err.endswith("error: bad\n")


def test_interrupted_without_result_is_130_and_with_result_0(fake_tuning: Fake) -> None:
    fake_tuning(lambda: (event for event in (PLANNED, NO_RESULT)))
    assert cli_main.main(["net.onnx"]) == 130
    stopped = Finished("net", Path("x"), (), (), 1, 1.0, interrupted=True)
    fake_tuning(lambda: (event for event in (PLANNED, stopped)))
    assert cli_main.main(["net.onnx"]) == 0


def test_the_run_is_closed_whatever_happens(fake_tuning: Fake) -> None:
    closed = []

    def steps() -> Iterator[Event]:
        try:
            yield Planned("net", "CPU", ("a", "b"), (1,), "cores", (), 1, None)
            yield PROGRESS  # cannot be drawn: the plan names two shares and one number of units
            yield FINISHED
        finally:
            closed.append(True)

    fake_tuning(steps)
    assert cli_main.main(["net.onnx"]) == 1
    assert closed == [True]


@pytest.mark.parametrize(
    "args",
    [
        ["net.onnx", "--gpu-pct", "0"],
        ["net.onnx", "--gpu-pct", "101"],
        ["net.onnx", "--gpu-pct", "abc"],
        ["net.onnx", "--trials", "many"],
        ["net.onnx", "--nonsense"],
        ["net.onnx", "--input", "x"],
        ["net.onnx", "--input", "weight:3"],
        ["net.onnx", "--input", "a:0:1x4"],
        ["net.onnx", "--target", "rocm"],
        ["net.onnx", "second.onnx"],
        ["missing.onnx"],
        ["."],
        ["tune"],
    ],
)
def test_what_the_user_got_wrong_never_starts_a_run(
    fake_tuning: Fake, capfd: Capture, args: list[str]
) -> None:
    calls = fake_tuning(good_run)
    assert cli_main.main(args) == 2
    out, err = capfd.readouterr()
    assert calls == []
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_no_compiler_is_told_before_anything_is_loaded(
    fake_tuning: Fake, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_tuning(good_run)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert cli_main.main(["net.onnx"]) == 3
    assert calls == []
    err = capfd.readouterr().err
    assert err.startswith("error: no C compiler")
    assert err.count("\n") == 1


def test_help_is_quick_and_lists_commands_and_flags(run_tune: RunTune) -> None:
    times = []  # of the processor, which other tests do not lengthen
    for _ in range(3):
        start = os.times()
        done = run_tune("--help")
        end = os.times()
        times.append(
            end.children_user + end.children_system - start.children_user - start.children_system
        )
    assert done.returncode == 0
    for word in ("run", "records", "doctor", "--gpu-pct", "--dry-run", "--fresh"):
        assert word in done.stdout
    assert min(times) < 0.4, f"tune --help took {times}"


def test_no_arguments_means_help(run_tune: RunTune) -> None:
    done = run_tune()
    assert done.returncode == 0
    assert "Usage: tune" in done.stdout + done.stderr


def test_the_launcher_works_from_any_folder(run_tune: RunTune, tmp_path: Path) -> None:
    done = run_tune("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.startswith("tune, version")) == (0, True)
    assert (ROOT / "cli.py").is_file()


@pytest.mark.parametrize("command", ["tune", "run", "records", "doctor"])
def test_every_command_has_help(run_tune: RunTune, command: str) -> None:
    done = run_tune(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: tune {command}" in done.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = (
        "import sys; sys.argv[1:] = ['--help'];"
        "from gpu_aware_tune.cli.main import main; sys.exit(main())"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
