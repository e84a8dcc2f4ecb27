"""`tune watch` without TVM: a finished run, one that goes on, one that was killed, and bad input."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_store import CANDIDATES, add, finished_store, machine, start

from gpu_aware_tune.cli.watch import watch
from gpu_aware_tune.errors import TuneError, UserError
from gpu_aware_tune.records.lock import is_writing, other_writer
from gpu_aware_tune.records.store import Store
from gpu_aware_tune.report.history import Point
from gpu_aware_tune.report.live import State, Watcher
from gpu_aware_tune.report.terminal import Screen, sparkline

HERE = Path(__file__).parent

WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from report_store import CANDIDATES, add, start
from gpu_aware_tune.records.store import Store
with Store(Path({db!r})) as store:
    run = start(store, trials=20)
    add(store, run, CANDIDATES[:4])
    print("ready", flush=True)
    if sys.stdin.readline().strip() == "finish":
        store.finish_run(run.id, "finished")
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, in the middle of a run."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER.format(here=str(HERE), db=str(tmp_path / "db"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE.parent.parent,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def run(db: Path, *args: str) -> str:
    result = CliRunner().invoke(watch, ["--db", str(db), *args])
    if isinstance(result.exception, TuneError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_finished_run(tmp_path: Path) -> None:
    for args in (["--once"], []):  # without --once it ends by itself
        text = run(finished_store(tmp_path / f"db{len(args)}"), *args)
        assert text.startswith(
            "run 1: net on llvm/AMD EPYC/znver4, partition cores\nfinished, 5/5 trials"
        )
        assert "25/min" in text  # 5 trials from second 2 to 14
        assert "failed: build 1, wrong 1" in text
        assert "best on 2 cores: 6.50 ms (1.38x untuned)" in text
        assert "best on 1 core: 15.5 ms (1.16x untuned)" in text
        assert "library on 2 cores: 9.50 ms untuned -> 7.00 ms tuned (1.36x)" in text
        rows = [line.split() for line in text.splitlines()]
        row = next(row for row in rows if row[:1] == ["softmax"])
        assert row[:6] == ["softmax", "1", "2", "1.00", "ms", "500"]
        assert "goes on" not in text
        assert "weights unknown" not in text


def test_a_run_in_another_process(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    db = tmp_path / "db"
    lock = db / "records.sqlite.writer"
    text = run(db, "--once")
    assert "searching, 2/20 trials" in text
    assert "of search left" in text
    assert f"the run goes on in process {writer.pid}" in text
    assert lock.exists()
    assert writer.stdin and writer.poll() is None
    writer.communicate("finish\n", timeout=30)
    assert writer.returncode == 0  # its writing was not disturbed
    assert "\nfinished, 2/20 trials" in run(db, "--once")


def test_watching_ends_with_the_run(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    assert writer.stdin
    threading.Timer(0.7, lambda: print("finish", file=writer.stdin, flush=True)).start()
    text = run(tmp_path / "db", "--interval", "0.1s")
    assert text.startswith("searching, 2/20 trials")  # a line while it went on, then the whole
    assert "\nfinished, 2/20 trials" in text


def test_a_killed_run_is_not_waited_for(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    threading.Timer(0.7, lambda: os.kill(writer.pid, signal.SIGKILL)).start()
    started = time.monotonic()
    text = run(tmp_path / "db", "--interval", "0.1s")
    assert time.monotonic() - started < 30
    assert "\nkilled: its process is gone" in text
    assert "run the same `tune` command again" in text
    assert "killed: its process is gone" in run(tmp_path / "db", "--once")
    with Store(tmp_path / "db"):
        pass  # the next writer closes its row
    assert "\ninterrupted, 2/20 trials" in run(tmp_path / "db", "--once")


def test_the_writer_of_a_store(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    store = tmp_path / "db" / "records.sqlite"
    assert other_writer(store) == writer.pid
    writer.kill()
    writer.wait()
    assert (tmp_path / "db" / "records.sqlite.writer").exists()
    assert other_writer(store) is None
    with Store(store):
        assert is_writing(store, os.getpid())
        assert is_writing(store, os.getpid())  # asking has not released the lock
        assert other_writer(store) is None
    assert not is_writing(store, os.getpid())


def look(store: Store) -> State:
    return Watcher(store).look()


def test_phases_of_a_run(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        row = start(store, trials=5)
        assert look(store).phase == "measuring the untuned schedules"
        add(store, row, CANDIDATES[:1])
        state = look(store)
        assert (state.measured, state.phase) == (1, "measuring the untuned schedules")
        add(store, row, CANDIDATES[1:4])
        state = look(store)
        assert (state.phase, state.trials_done) == ("searching", 2)
        assert state.trials_per_min == pytest.approx(60 * 2 / 9)
        assert state.left_s == pytest.approx(3 * 4.5)
        add(store, row, CANDIDATES[4:])
        assert look(store).phase == "measuring the best again, compiling, checking"
        store.finish_run(row.id, "failed")
        assert look(store).phase == "failed"


def test_unknown_weights_are_told(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        add(store, start(store, machine(tasks=None, model="nowhere-else")))
    text = run(tmp_path, "--once")
    assert "weights unknown: each task counts once" in text
    assert "best on 2 cores: 3.50 ms" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    out = Terminal()
    with Store(tmp_path) as store, Screen(out, 5.0) as screen:
        add(store, start(store, trials=20))
        screen.show(look(store))
    text = out.getvalue()
    for part in ("run 1: net", "searching", "5/20 trials", "█", "fused_conv2d_relu", "1.33x"):
        assert part in text


def test_plain_lines_come_now_and_then(tmp_path: Path) -> None:
    out, times = io.StringIO(), iter([0.0, 0.0, 0.0, 1.0, 6.0, 6.0])
    with Store(tmp_path) as store, Screen(out, 5.0, clock=lambda: next(times)) as screen:
        add(store, start(store, trials=20))
        for _ in range(3):
            screen.show(look(store))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert "5/20 trials" in lines[0] and "best on 2 cores: 6.50 ms (1.38x untuned)" in lines[0]


def test_sparklines() -> None:
    points = [Point(0, 0, 0, 8.0), Point(1, 1, 1, 4.0), Point(2, 3, 3, 1.0)]
    assert sparkline(points, 4) == "█▄▄▁"
    assert sparkline(points[:1], 10) == "▁"
    assert sparkline([], 10) == ""
    assert len(sparkline([Point(0, 0, 0, 2.0), Point(9, 900, 9, 1.0)], 30)) == 30


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records at"):
        run(tmp_path / "none", "--once")
    db = finished_store(tmp_path / "db")
    with pytest.raises(UserError, match="--run 3 is not in"):
        run(db, "--run", "3")
    with pytest.raises(UserError, match="--interval 'soon' is not a duration"):
        run(db, "--interval", "soon")
    with pytest.raises(UserError, match="give at least"):
        run(db, "--interval", "0")
    with Store(tmp_path / "empty"):
        pass
    with pytest.raises(UserError, match="holds no run; tune a model first"):
        run(tmp_path / "empty")
