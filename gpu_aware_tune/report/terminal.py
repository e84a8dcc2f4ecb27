"""A run's state in the terminal: a live screen, or plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpu_aware_tune.display.console import PLAIN_WIDTH, LiveView, TextConsole, open_console
from gpu_aware_tune.display.tables import (
    format_clock,
    format_failures,
    format_gain,
    format_seconds,
)
from gpu_aware_tune.report.figures import units_text
from gpu_aware_tune.report.history import History, Point, TaskHistory, latencies
from gpu_aware_tune.report.live import State

_BARS = "▁▂▃▄▅▆▇█"
_UNWEIGHTED = "weights unknown: each task counts once in the model's latency"
_ROWS = 12  # of tasks where the height of the terminal does not decide


class Screen(LiveView):
    """Draws states as they come: live on a terminal, a line now and then elsewhere.

    Args:
        stream: where to.
        interval_s: the least time between two lines where there is no terminal.
        clock: the time; tests pass their own.
    """

    def __init__(
        self, stream: TextIO, interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = open_console(stream)
        super().__init__(self._console, interval_s, clock)

    def show(self, state: State) -> None:
        """Draw one state."""
        if self.live:
            self.redraw(draw(state, self._console))
        elif self.line_due():
            text = ", ".join([*_counts(state), *_latency_texts(state)])
            self._console.print(Text(text), soft_wrap=True)


def draw(state: State, console: Console) -> RenderableType:
    """The whole screen: heading, progress, latency of each share, tasks."""
    history = state.history
    head = Table.grid(padding=(0, 2))
    total, done = state.trials_total, state.trials_done
    counts = ", ".join(_counts(state)[1:])
    if total:
        head.add_row(ProgressBar(total=total, completed=done, width=30), counts)
    else:
        head.add_row(counts)
    shares = [Text(text, style="green") for text in _latency_texts(state, console.width)]
    if not history.weighted:
        shares.append(Text(_UNWEIGHTED, style="yellow"))
    used = 7 + len(shares)
    rows = max(3, console.height - used)
    title = Text(heading(state), style="bold")
    return Group(title, Text(state.phase, style="cyan"), head, *shares, task_table(history, rows))


def lines(state: State) -> list[str]:
    """The same as plain lines, for `--once`, for the end, and where there is no terminal."""
    history = state.history
    console = TextConsole(
        width=PLAIN_WIDTH, highlight=False, markup=False, emoji=False, no_color=True
    )
    with console.capture() as captured:
        console.print(task_table(history, _ROWS))
    table = [line.rstrip() for line in captured.get().splitlines()]
    found = [heading(state), ", ".join(_counts(state)), *_latency_texts(state, PLAIN_WIDTH), *table]
    for item in latencies(history):
        if item.whole:
            before, after = format_seconds(item.untuned_s), format_seconds(item.tuned_s)
            gain = format_gain(item.untuned_s, item.tuned_s)
            name = units_text(item.units, history)
            found.append(f"library on {name}: {before} untuned -> {after} tuned ({gain})")
    if state.lost:
        found.append(
            "the run's process ended without closing it (killed?): what it measured is kept;"
            " run the same `tune` command again to go on from there"
        )
    elif state.goes_on:
        found.append(f"the run goes on in process {state.writer}")
    if not history.weighted:
        found.append(_UNWEIGHTED)
    return found


def heading(state: State) -> str:
    """Which run this is."""
    history = state.history
    device = str(history.run.machine.get("device", "unknown device"))
    backend = str(history.run.machine.get("backend") or "-")
    return f"run {history.run.id}: {history.name} on {device}, partition {backend}"


def task_table(history: History, rows: int) -> Table:
    """The costliest tasks: trials, failures, untuned and best on each share."""
    table = Table("task", box=None, pad_edge=False)
    several = len(history.units) > 1
    for name in ("weight", "trials", "failed"):
        table.add_column(name, justify="right")
    for units in history.units:
        where = f"\n{units_text(units, history)}" if several else ""
        for name in ("untuned", "best", "gain"):
            table.add_column(name + where, justify="right", no_wrap=True)
    for task in history.tasks[:rows]:
        table.add_row(*_task_row(task, history))
    hidden = len(history.tasks) - rows
    if hidden > 0:
        table.add_row(f"... and {hidden} cheaper tasks")
    return table


def sparkline(points: Sequence[Point], width: int) -> str:
    """A latency over trials in one line of bars, from the lowest to the highest."""
    if not points or width < 1:
        return ""
    first, last = points[0].trial, points[-1].trial
    width = min(width, last - first + 1)
    low, high = min(p.seconds for p in points), max(p.seconds for p in points)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    bars = []
    for column in range(width):
        trial = first + (last - first) * (column + 1) / width
        value = [point.seconds for point in points if point.trial <= trial][-1]
        bars.append(_BARS[round((value - low) * scale)])
    return "".join(bars)


def _counts(state: State) -> list[str]:
    total = "" if state.trials_total is None else f"/{state.trials_total}"
    parts = [state.phase, f"{state.trials_done}{total} trials"]
    if state.trials_per_min:
        parts.append(f"{state.trials_per_min:.0f}/min")
    parts.append(f"{format_clock(state.elapsed_s)} elapsed")
    if state.goes_on and state.left_s:
        parts.append(f"{format_clock(state.left_s)} of search left")
    failures = format_failures(state.history.failures)
    return [*parts, f"failed: {failures}"] if failures else parts


def _latency_texts(state: State, width: int = 0) -> list[str]:
    """A line a share; while tasks are still without a number, how many have one."""
    history = state.history
    if state.goes_on and not history.trials and state.measured < len(history.tasks):
        return [f"{state.measured} of {len(history.tasks)} tasks measured"]
    if state.goes_on and not history.trials and not history.weighted:
        return [f"{state.measured} tasks measured"]
    found = []
    for units in history.units:
        untuned_s, best_s = history.untuned_s(units), history.best_s(units)
        if best_s is None:
            continue
        name = units_text(units, history)
        gain = format_gain(untuned_s, best_s)
        text = f"best on {name}: {format_seconds(best_s)} ({gain} untuned)"
        spark = sparkline(history.model[units], min(60, width - len(text) - 2))
        found.append(f"{text}  {spark}" if spark else text)
    return found


def _task_row(task: TaskHistory, history: History) -> list[str]:
    name = task.name if len(task.name) <= 40 else f"{task.name[:24]}...{task.name[-13:]}"
    cells = [name, str(task.weight), str(task.trials), str(task.failed or "")]
    for units in history.units:
        curve = task.curves[units]
        gain = format_gain(curve.untuned_s, curve.best_s)
        cells += [format_seconds(curve.untuned_s), format_seconds(curve.best_s), gain]
    return cells
