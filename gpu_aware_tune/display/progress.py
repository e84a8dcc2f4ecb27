"""Draws a run's events: a live view on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpu_aware_tune.display.console import LiveView, open_console
from gpu_aware_tune.display.tables import (
    closing_lines,
    counts,
    format_clock,
    fraction_done,
    latencies,
    plan_table,
    share_labels,
    task_table,
)
from gpu_aware_tune.events import Event, Finished, Note, Planned, Progress, Stage, Trial

ROWS_SHOWN = 24


class Display(LiveView):
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
        self._messages = None if messages is None else open_console(messages)
        self._results = None if results is None else open_console(results)
        super().__init__(self._messages, interval_s, clock)
        self._verbose = verbose
        self._stage = ""
        self._planned: dict[str, Planned] = {}  # by model, as the two below
        self._last: dict[str, Progress] = {}
        self._printed: dict[str, Progress] = {}

    def show(self, event: Event) -> None:
        """Draws one event."""
        match event:
            case Note():
                self._say(f"{'warning: ' if event.level == 'warning' else ''}{event.text}")
            case Stage():
                self._stage = event.text
                if not self.live:
                    self._say(event.text)
            case Planned():
                self._show_plan(event)
            case Trial():
                if self._verbose and event.failure is not None:
                    self._say(f"{event.task}: candidate failed: {event.failure}")
            case Progress():
                self._last[event.model] = event
                self._show_progress_lines()
            case Finished():
                self._show_finished(event)
        if self.live:
            self.redraw(self._draw())

    def _say(self, text: str) -> None:
        if self._messages is not None:
            self._messages.print(Text(text), soft_wrap=True)

    def _labels(self, model: str) -> dict[int, str]:
        return share_labels(self._planned[model]) if model in self._planned else {}

    def _show_plan(self, planned: Planned) -> None:
        self._planned[planned.model] = planned
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

    def _show_progress_lines(self) -> None:
        if self.line_due():
            for progress in self._last.values():
                self._print_progress(progress)

    def _print_progress(self, progress: Progress) -> None:
        self._printed[progress.model] = progress
        name = f"{progress.model}: " if len(self._planned) > 1 else ""
        parts = [*counts(progress), *latencies(progress, self._labels(progress.model))]
        self._say(name + ", ".join(parts))

    def _draw(self) -> RenderableType:
        """The stage, a row for each model, and below what each slice and the builders do."""
        if not self._last:
            return Text(self._stage, style="cyan")
        rows, lines = Table.grid(padding=(0, 2)), []
        for model, progress in self._last.items():
            planned = self._planned.get(model)
            done = fraction_done(progress, None if planned is None else planned.time_s)
            bar = ProgressBar(total=1.0, completed=done, width=30)
            name = self._stage if len(self._last) == 1 else model
            rows.add_row(Text(name, style="cyan"), bar, ", ".join(counts(progress)))
            prefix = "" if len(self._last) == 1 else f"{model}: "
            lines += [prefix + line for line in latencies(progress, self._labels(model))]
        best = Text("\n".join(lines), style="green")
        return Group(rows, best, Text(self._work(), style="dim"))

    def _work(self) -> str:
        """What is under way now: each slice's task, builds, artifacts that wait."""
        now = next(reversed(self._last.values()))
        if not any(task for _, task in now.slices) and not now.builds_in_flight:
            return ""
        slices = [f"[{name}] {task or 'idle'}" for name, task in now.slices]
        waiting = f"{now.builds_in_flight} builds, {now.waiting_to_measure} wait to be measured"
        return "   ".join([*slices, waiting])

    def _show_finished(self, finished: Finished) -> None:
        last = self._last.get(finished.model)
        printed = self._printed.get(finished.model)
        if not self.live and last is not None and last is not printed:
            self._print_progress(last)
        self.stop()
        if self._results is None:
            return
        if len(self._planned) > 1:
            self._results.print(Text(finished.model, style="bold"))
        if finished.tasks:
            rows = None if self._verbose else ROWS_SHOWN
            self._results.print(task_table(finished.tasks, self._labels(finished.model), rows))
        for line in closing_lines(finished, self._verbose):
            self._results.print(Text(line), soft_wrap=True)
