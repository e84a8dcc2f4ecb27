"""What a run shows: plain lines, the live bar, the closing table, and silence."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from gpu_aware_tune.display.console import LiveView, open_console
from gpu_aware_tune.display.progress import ROWS_SHOWN, Display
from gpu_aware_tune.display.tables import (
    format_clock,
    format_failures,
    format_gain,
    format_seconds,
    fraction_done,
)
from gpu_aware_tune.events import (
    Event,
    Finished,
    Level,
    Note,
    Origin,
    Planned,
    Progress,
    ShareResult,
    Stage,
    StageName,
    TaskPlan,
    TaskResult,
    Trial,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def planned(dry_run: bool = False, time_s: float | None = None) -> Planned:
    return Planned(
        model="net",
        device="H200",
        shares=("30 % of 132 SMs = 32 SMs", "100 % of 132 SMs = 132 SMs"),
        units=(32, 132),
        backend="green",
        tasks=(TaskPlan("conv", "123", 3, 4.2e6, 48, 16),),
        trials=100,
        time_s=time_s,
        dry_run=dry_run,
    )


def progress(done: int, failures: dict[str, int] | None = None) -> Progress:
    return Progress(
        model="net",
        elapsed_s=10.0,
        trials_done=done,
        trials_total=100,
        trials_per_min=240.0,
        untuned_s={32: 0.02, 132: 0.008},
        best_s={32: 0.01, 132: 0.002},
        failures=failures or {},
        eta_s=65.0,
    )


def finished(output: Path | None = Path("net.tuned"), tasks: int = 1) -> Finished:
    rows = [
        TaskResult(
            f"task{index}", units, 2, 48, 1e-3 * (index + 1), 5e-4 * (index + 1), Origin.SEARCH
        )
        for index in range(tasks)
        for units in (32, 132)
    ]
    return Finished(
        model="net",
        output=output,
        tasks=tuple(rows),
        shares=(
            ShareResult("30 % of 132 SMs = 32 SMs", 32, 0.02, 0.01, True, 5e-7),
            ShareResult("100 % of 132 SMs = 132 SMs", 132, 0.008, 0.002, False, None),
        ),
        trials=100,
        elapsed_s=83.0,
        interrupted=output is None,
        failures={"build": 2, "timeout": 5},
        core_seconds={"search": 1.5},
    )


def show(*events: Event, verbose: bool = False, interval_s: float = 0.0) -> tuple[str, str]:
    """What the events put on stderr and stdout where there is no terminal."""
    messages, results = io.StringIO(), io.StringIO()
    with Display(messages, results, verbose, interval_s) as display:
        for event in events:
            display.show(event)
    return messages.getvalue(), results.getvalue()


def test_plain_lines_say_everything_the_bar_says() -> None:
    messages, results = show(planned(), progress(40, {"build": 1, "crash": 3}))
    line = messages.splitlines()[-1]
    for part in ("40/100 trials", "240/min", "failed: crash 3, build 1", "1:05 left"):
        assert part in line
    assert "best on 32 SMs: 10.0 ms (2.00x untuned)" in line
    assert "best on 132 SMs: 2.00 ms (4.00x untuned)" in line
    assert results == ""


def test_the_plan_names_the_units_really_got() -> None:
    messages, _ = show(planned())
    assert "net on H200: 1 tasks, 100 trials" in messages
    assert "30 % of 132 SMs = 32 SMs" in messages


def test_a_dry_run_shows_tasks_and_budget_as_a_result() -> None:
    _, results = show(planned(dry_run=True))
    heading, row = results.splitlines()
    assert heading.split() == ["task", "weight", "MFLOP", "known", "trials"]
    assert row.split() == ["conv", "3", "4.2", "16", "48"]


def test_progress_lines_come_no_faster_than_the_interval_and_the_last_one_always() -> None:
    now = [0.0]
    messages = io.StringIO()
    with Display(messages, None, interval_s=5.0, clock=lambda: now[0]) as display:
        for second in range(12):
            now[0] = float(second)
            display.show(progress(second))
        display.show(finished())
    counts = [line.split("/")[0] for line in messages.getvalue().splitlines()]
    assert counts == ["0", "5", "10", "11"]


def test_the_closing_table_has_a_row_a_task_and_three_columns_a_share() -> None:
    _, results = show(planned(), finished())
    lines = results.splitlines()
    assert lines[0].split() == ["untuned", "tuned", "gain"] * 2
    assert lines[1].split()[:3] == ["task", "weight", "trials"]
    assert lines[1].split()[3:] == ["32", "SMs"] * 3 + ["132", "SMs"] * 3
    assert " ".join(lines[2].split()) == "task0 2 48 " + " ".join(["1.00 ms 500 us 2.00x"] * 2)


def test_the_closing_lines_say_what_was_got_and_how_to_load_it() -> None:
    _, results = show(planned(), finished())
    assert "100 trials in 1:23, stopped by trials; failed: timeout 5, build 2" in results
    assert (
        "30 % of 132 SMs = 32 SMs: 20.0 ms untuned -> 10.0 ms tuned (2.00x), "
        "verified, largest error 5.0e-07" in results
    )
    assert "= 132 SMs: 8.00 ms untuned -> 2.00 ms tuned (4.00x), not verified" in results
    assert "tune run net.tuned" in results
    assert 'gpu_aware_tune.load("net.tuned")' in results


def test_an_interrupted_run_without_result_says_how_to_go_on() -> None:
    _, results = show(finished(output=None))
    assert "interrupted" in results
    assert "nothing was exported; run the same command again" in results
    assert "tune run" not in results


def test_cheap_tasks_are_left_out_unless_verbose() -> None:
    many = finished(tasks=ROWS_SHOWN + 7)
    _, short = show(many)
    assert f"task{ROWS_SHOWN + 6} " in short, "the dearest task comes first"
    assert "task0 " not in short
    assert "... and 7 cheaper tasks" in short
    _, full = show(many, verbose=True)
    assert "task0 " in full
    assert "core time: search 1.5 s" in full


def test_failed_trials_are_told_one_by_one_only_when_verbose() -> None:
    trial = Trial("conv", Origin.SEARCH, {32: None}, failure="crash")
    assert show(trial) == ("", "")
    assert "conv: candidate failed: crash" in show(trial, verbose=True)[0]


def test_notes_and_stages() -> None:
    messages, _ = show(
        Note("no GPU: tuning for the CPU", Level.WARNING), Stage(StageName.MODEL, "reading it")
    )
    assert messages.splitlines() == ["warning: no GPU: tuning for the CPU", "reading it"]


def test_markup_in_names_is_not_interpreted() -> None:
    name = "task [bold]x[/bold] :smile:"
    plan = dataclasses.replace(planned(True), tasks=(TaskPlan(name, "1", 1, 1.0, 1, 0),))
    messages, results = show(Note(name), plan)
    assert messages.splitlines()[0] == name
    assert results.splitlines()[1].startswith(name)


def test_without_streams_nothing_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with Display(None, None, verbose=True) as display:
        for event in (Note("x"), planned(True), progress(1), finished()):
            display.show(event)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("width", ["50", "200"])
def test_on_a_terminal_there_is_a_bar_and_the_cursor_comes_back(
    monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "xterm")
    messages = Terminal()

    def interrupted() -> None:
        with Display(messages, None) as display:
            display.show(planned())
            display.show(Stage(StageName.SEARCH, "searching"))
            display.show(progress(40))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    drawn = messages.getvalue()
    assert "━" in drawn
    assert "best on 132 SMs" in drawn
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert drawn.rindex(shown) > drawn.rindex(hidden)


def test_a_view_in_place_asks_for_no_lines_until_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with LiveView(open_console(Terminal()), 5.0, lambda: 0.0) as view:
        assert view.live and not view.line_due()
    assert not view.live
    assert [view.line_due(), view.line_due()] == [True, False], "then one for each interval"


def test_the_bar_follows_whichever_limit_ends_first() -> None:
    assert fraction_done(progress(40), None) == pytest.approx(0.4)
    assert fraction_done(progress(40), 12.5) == pytest.approx(0.8)
    assert fraction_done(progress(40), 5.0) == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (3.2184, "3.22 s"),
        (0.012345, "12.3 ms"),
        (0.26, "260 ms"),
        (9.996e-4, "1.00 ms"),
        (4.5e-5, "45.0 us"),
        (4e-8, "0.0400 us"),
    ],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_other_formats() -> None:
    assert [format_clock(value) for value in (5.4, 65, 7384)] == ["0:05", "1:05", "2:03:04"]
    assert [format_gain(3, 1.5), format_gain(None, 1), format_gain(1, None)] == ["2.00x", "-", "-"]
    assert format_failures({"b": 0, "c": 1, "a": 1}) == "a 1, c 1"
