"""Draws a run's events: a live bar on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpu_aware_tune.events import (
    Event,
    Finished,
    Note,
    Planned,
    Progress,
    ShareResult,
    Stage,
    TaskResult,
    Trial,
)

PLAIN_WIDTH = 120
ROWS_SHOWN = 24


class Display:
    """Shows events as they come; a context manager, so the terminal is always left as it was.

    Args:
        messages: where progress and notes go (stderr), or None for silence.
        results: where tables and the closing lines go (stdout), or None for silence.
        verbose: show every task, every failed trial, and where the cores' time went.
        interval_s: the least time between two progress lines where there is no terminal.
        clock: the time; tests pass their own.
    """

    def __init__(
        self,
        messages: TextIO | None,
        results: TextIO | None,
        verbose: bool = False,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._messages = None if messages is None else _console(messages)
        self._results = None if results is None else _console(results)
        self._verbose = verbose
        self._interval_s = interval_s
        self._clock = clock
        self._live: Live | None = None
        self._stage = ""
        self._planned: Planned | None = None
        self._last: Progress | None = None
        self._printed: Progress | None = None
        self._next_line = clock()

    def __enter__(self) -> Display:
        if self._messages is not None and self._messages.is_terminal:
            # No refresh thread: events come at least once a second, and the cores are busy.
            self._live = Live(
                console=self._messages,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, event: Event) -> None:
        """Draws one event."""
        match event:
            case Note():
                self._say(f"{'warning: ' if event.level == 'warning' else ''}{event.text}")
            case Stage():
                self._stage = event.text
                if self._live is None:
                    self._say(event.text)
            case Planned():
                self._show_plan(event)
            case Trial():
                if self._verbose and event.failure is not None:
                    self._say(f"{event.task}: candidate failed: {event.failure}")
            case Progress():
                self._last = event
                self._show_progress_line(event)
            case Finished():
                self._show_finished(event)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._draw(), refresh=True)

    def _say(self, text: str) -> None:
        if self._messages is not None:
            self._messages.print(Text(text), soft_wrap=True)

    def _labels(self) -> dict[int, str]:
        return {} if self._planned is None else share_labels(self._planned)

    def _show_plan(self, planned: Planned) -> None:
        self._planned = planned
        limits = [f"{planned.trials} trials"] if planned.trials else []
        limits += [f"{format_clock(planned.time_s)} of search"] if planned.time_s else []
        self._say(
            f"{planned.model} on {planned.device}: {len(planned.tasks)} tasks, "
            f"{' or '.join(limits) or 'no trials left to do'}, partition {planned.backend}"
        )
        for share in planned.shares:
            self._say(f"  share: {share}")
        if planned.dry_run and self._results is not None:
            self._results.print(plan_table(planned))
        elif self._verbose and self._messages is not None:
            self._messages.print(plan_table(planned))

    def _show_progress_line(self, progress: Progress) -> None:
        if self._live is None and self._clock() >= self._next_line:
            self._next_line = self._clock() + self._interval_s
            self._print_progress(progress)

    def _print_progress(self, progress: Progress) -> None:
        self._printed = progress
        self._say(", ".join([*_counts(progress), *_latencies(progress, self._labels())]))

    def _draw(self) -> RenderableType:
        progress = self._last
        if progress is None:
            return Text(self._stage, style="cyan")
        time_s = None if self._planned is None else self._planned.time_s
        bar = ProgressBar(total=1.0, completed=fraction_done(progress, time_s), width=30)
        row = Table.grid(padding=(0, 2))
        row.add_row(Text(self._stage, style="cyan"), bar, ", ".join(_counts(progress)))
        return Group(row, Text("\n".join(_latencies(progress, self._labels())), style="green"))

    def _show_finished(self, finished: Finished) -> None:
        if self._live is None and self._last is not None and self._last is not self._printed:
            self._print_progress(self._last)
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._results is None:
            return
        if finished.tasks:
            rows = None if self._verbose else ROWS_SHOWN
            self._results.print(task_table(finished.tasks, self._labels(), rows))
        for line in closing_lines(finished, self._verbose):
            self._results.print(Text(line), soft_wrap=True)


def format_seconds(seconds: float | None) -> str:
    """Writes seconds with three digits and a fitting unit: "12.3 ms"."""
    if seconds is None:
        return "-"
    units = (("s", 1.0), ("ms", 1e3), ("us", 1e6))
    unit, scale = next((pair for pair in units if seconds * pair[1] >= 0.9995), units[-1])
    value = seconds * scale
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:#.3g} {unit}"


def format_clock(seconds: float) -> str:
    """Writes seconds as "1:05" or "2:03:04"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def format_gain(untuned_s: float | None, tuned_s: float | None) -> str:
    """Writes how many times faster tuned is than untuned: "2.10x"."""
    return f"{untuned_s / tuned_s:.2f}x" if untuned_s and tuned_s else "-"


def format_failures(failures: Mapping[str, int]) -> str:
    """Writes failures by kind, most frequent first: "build 2, timeout 1"."""
    by_count = sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{kind} {count}" for kind, count in by_count if count)


def fraction_done(progress: Progress, time_s: float | None) -> float:
    """Returns how much of the budget is used, by trials or by time, whichever ends first."""
    by_trials = progress.trials_done / progress.trials_total if progress.trials_total else 0.0
    by_time = progress.elapsed_s / time_s if time_s else 0.0
    return min(1.0, max(by_trials, by_time))


def share_labels(planned: Planned) -> dict[int, str]:
    """Returns the short name of each share by its units: "32 SMs"."""
    pairs = zip(planned.units, planned.shares, strict=True)
    return {units: share.rsplit("= ", 1)[-1] for units, share in pairs}


def _counts(progress: Progress) -> list[str]:
    total = f"/{progress.trials_total}" if progress.trials_total else ""
    parts = [f"{progress.trials_done}{total} trials", f"{progress.trials_per_min:.0f}/min"]
    failures = format_failures(progress.failures)
    parts += [f"failed: {failures}"] if failures else []
    parts += [f"{format_clock(progress.eta_s)} left"] if progress.eta_s is not None else []
    return parts


def _latencies(progress: Progress, labels: Mapping[int, str]) -> list[str]:
    parts = []
    for units, best_s in progress.best_s.items():
        gain = format_gain(progress.untuned_s.get(units), best_s)
        name = labels.get(units, f"{units} units")
        parts.append(f"best on {name}: {format_seconds(best_s)} ({gain} untuned)")
    return parts


def plan_table(planned: Planned) -> Table:
    """Tasks and budget of a run before its first trial."""
    table = Table("task", box=None, pad_edge=False)
    for heading in ("weight", "MFLOP", "known", "trials"):
        table.add_column(heading, justify="right")
    for task in planned.tasks:
        flops = f"{task.flops / 1e6:.1f}"
        numbers = (str(task.weight), flops, str(task.known), str(task.planned_trials))
        table.add_row(_shorten(task.name), *numbers)
    return table


def task_table(tasks: Sequence[TaskResult], labels: Mapping[int, str], rows: int | None) -> Table:
    """The closing table: a row a task, three columns a share; the cheapest tasks are left out."""
    units = list(dict.fromkeys(task.units for task in tasks))
    table = Table("task", box=None, pad_edge=False)
    for heading in ("weight", "trials"):
        table.add_column(heading, justify="right")
    for unit in units:
        where = f"\n{labels.get(unit, f'{unit} units')}" if len(units) > 1 else ""
        for heading in ("untuned", "tuned", "gain"):
            table.add_column(heading + where, justify="right")
    by_name: dict[str, dict[int, TaskResult]] = {}
    for task in tasks:
        by_name.setdefault(task.name, {})[task.units] = task
    costs = {name: _cost(group.values()) for name, group in by_name.items()}
    order = sorted(by_name, key=lambda name: -costs[name])
    for name in order[:rows]:
        group = by_name[name]
        one = next(iter(group.values()))
        cells = [_shorten(name), str(one.weight), str(one.trials)]
        for unit in units:
            found = group.get(unit)
            untuned_s = None if found is None else found.untuned_s
            tuned_s = None if found is None else found.tuned_s
            gain = format_gain(untuned_s, tuned_s)
            cells += [format_seconds(untuned_s), format_seconds(tuned_s), gain]
        table.add_row(*cells)
    hidden = len(order) - len(order[:rows])
    if hidden:
        table.add_row(f"... and {hidden} cheaper tasks (all with -v)")
    return table


def _cost(group: Iterable[TaskResult]) -> float:
    return sum(task.weight * (task.untuned_s or task.tuned_s or 0.0) for task in group)


def closing_lines(finished: Finished, verbose: bool) -> list[str]:
    """What to read last: latency before and after, where the library is, how to load it."""
    trials = f"{finished.trials} trials in {format_clock(finished.elapsed_s)}"
    reason = "interrupted" if finished.interrupted else f"stopped by {finished.stopped_by}"
    failures = format_failures(finished.failures)
    lines = [f"{trials}, {reason}" + (f"; failed: {failures}" if failures else "")]
    if verbose and finished.core_seconds:
        parts = (f"{name} {spent:.1f} s" for name, spent in finished.core_seconds.items())
        lines.append(f"core time: {', '.join(parts)}")
    lines += [share_line(share) for share in finished.shares]
    if finished.output is None:
        return [*lines, "nothing was exported; run the same command again to continue"]
    return [
        *lines,
        f"library: {finished.output}",
        f"run it:  tune run {finished.output}",
        f'load it: lib = gpu_aware_tune.load("{finished.output}"); outputs = lib(inputs)',
    ]


def share_line(share: ShareResult) -> str:
    """One share's model latency before and after, and whether its numbers were checked."""
    gain = format_gain(share.untuned_s, share.tuned_s)
    error = "" if share.max_error is None else f", largest error {share.max_error:.1e}"
    checked = f"verified{error}" if share.verified else "not verified"
    before, after = format_seconds(share.untuned_s), format_seconds(share.tuned_s)
    return f"{share.share}: {before} untuned -> {after} tuned ({gain}), {checked}"


def _shorten(name: str, width: int = 48) -> str:
    return name if len(name) <= width else f"{name[: width - 21]}...{name[-18:]}"


def _console(stream: TextIO) -> Console:
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)
