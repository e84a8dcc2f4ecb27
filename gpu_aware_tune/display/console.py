"""Where a run shows itself: a console, and a part of the terminal that is drawn in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment

from gpu_aware_tune.errors import printable

PLAIN_WIDTH = 120


class TextConsole(Console):
    """A console on which no name of a model, a task or a device can control the terminal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as `Console` does, with control characters in texts escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def open_console(stream: TextIO, plain_width: int = PLAIN_WIDTH) -> Console:
    """A console on a stream, so many columns wide where that is no terminal; text stays as it is."""
    width = None if stream.isatty() else plain_width
    return TextConsole(file=stream, width=width, highlight=False, markup=False, emoji=False)


class LiveView:
    """A view that is drawn in place on a terminal, and told by a line now and then elsewhere.

    A context manager, so the terminal is always left as it was.

    Args:
        console: where to; None for nowhere.
        interval_s: the least time between two lines where there is no terminal.
        clock: the time; tests pass their own.
    """

    def __init__(
        self, console: Console | None, interval_s: float, clock: Callable[[], float]
    ) -> None:
        self._view_console = console
        self._view: Live | None = None
        self._interval_s, self._clock = interval_s, clock
        self._next_line = clock()

    def __enter__(self) -> Self:
        if self._view_console is not None and self._view_console.is_terminal:
            # No refresh thread: new content comes about once a second, and the cores are busy.
            self._view = Live(
                console=self._view_console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._view.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def live(self) -> bool:
        """Whether it is drawn in place now."""
        return self._view is not None

    def redraw(self, content: RenderableType) -> None:
        """Put new content in place of the old."""
        if self._view is not None:
            self._view.update(content, refresh=True)

    def line_due(self) -> bool:
        """Whether it is time for a line, and there is no view in place; then the next one waits."""
        if self.live or self._clock() < self._next_line:
            return False
        self._next_line = self._clock() + self._interval_s
        return True

    def stop(self) -> None:
        """Take the view off the terminal."""
        if self._view is not None:
            self._view.stop()
            self._view = None
