"""The figures of a run: latency over time and trials, against stock TVM, time spent, failures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_aware_tune.display.tables import format_seconds
from gpu_aware_tune.report.drawing import SERIES, Colors, Drawing
from gpu_aware_tune.report.history import Curve, History, Point, TaskHistory, model_curve
from gpu_aware_tune.report.inputs import Stock

WIDTH_IN = 9.2
COLUMNS = 4
ABOVE = 2  # a task's panel ends at so many times untuned
_SPENT = {"search": "s1", "build": "s2", "measure": "s3", "main": "s4", "idle": "idle"}


def units_text(units: int, history: History) -> str:
    """Return a number of units with its noun, such as "32 SMs"."""
    noun = "SM" if str(history.run.machine.get("device", "")).startswith("cuda") else "core"
    return f"{units} {noun}{'' if units == 1 else 's'}"


def model_figure(history: History) -> Drawing | None:
    """The model's best latency so far over time and over trials, each share against untuned."""
    if not any(history.model.values()):
        return None

    def draw(figure: Any, colors: Colors) -> None:
        # A run that found all of its trials in the store has only a line to show, over time.
        count = 2 if history.trials else 1
        left, *others = figure.subplots(1, count, sharey=True, squeeze=False)[0]
        for units, role in zip(history.units, _roles(history.units), strict=True):
            steps, untuned_s = history.model[units], history.untuned_s(units)
            if not steps:
                continue
            label = units_text(units, history)
            _steps(left, [(p.time_s, p.seconds) for p in steps], colors[role], label)
            for axes in others:
                _steps(axes, [(p.trial, p.seconds) for p in steps], colors[role], label)
                axes.set_xlabel("trials")
            for axes in (left, *others):
                axes.set_xlim(left=0)
                if untuned_s:
                    axes.axhline(untuned_s, color=colors[role], lw=1.1, ls=(0, (4, 3)))
        left.set_xlabel("seconds since the workers started")
        _latency_axis(left)
        shown = [
            max(history.untuned_s(u) or 0.0, s[0].seconds) for u, s in history.model.items() if s
        ]
        left.set_ylim(0, 1.08 * max(shown))
        left.set_ylabel("model latency (sum of kernels)")
        _key((left, *others)[-1], colors)

    return Drawing("model", "Model latency while tuning", WIDTH_IN, 3.1, draw)


def stock_figure(history: History, stocks: Sequence[Stock]) -> Drawing | None:
    """The same tasks tuned here and by stock TVM, latency over time."""
    if not stocks or not history.units:
        return None
    units = history.units[0]
    names = set().union(*(stock.tasks for stock in stocks))
    tasks = [task for task in history.tasks if not names or task.name in names]
    own = model_curve(tasks, units)

    def draw(figure: Any, colors: Colors) -> None:
        axes = figure.subplots()
        end_s = max(stock.points[-1][0] for stock in stocks)
        if own:
            points = [(p.time_s, p.seconds) for p in own]
            label = f"this run on {units_text(units, history)}"
            _steps(
                axes, [*points, (max(end_s, own[-1].time_s), own[-1].seconds)], colors["s1"], label
            )
        for stock, role in zip(stocks, SERIES[1:], strict=False):
            last = (max(end_s, stock.points[-1][0]), stock.points[-1][1])
            _steps(axes, [*stock.points, last], colors[role], stock.label)
        axes.set_xlabel("seconds")
        _latency_axis(axes)
        axes.set_ylabel(f"latency of {len(tasks)} tasks" if names else "model latency")
        axes.set_xlim(left=0)
        slowest = [stock.points[0][1] for stock in stocks] + [p.seconds for p in own]
        axes.set_ylim(0, 1.08 * max(slowest))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0)

    return Drawing("stock", "Against stock TVM", WIDTH_IN, 2.9, draw)


def tasks_figure(history: History, by_time: bool) -> Drawing | None:
    """A panel for each task that was searched: its candidates and the best so far."""
    tasks = searched_tasks(history)
    if not tasks:
        return None
    rows = math.ceil(len(tasks) / COLUMNS)

    def draw(figure: Any, colors: Colors) -> None:
        grid = figure.subplots(rows, COLUMNS, squeeze=False).flat
        for axes, task in zip(grid, tasks, strict=False):
            for units, role in zip(history.units, _roles(history.units), strict=True):
                _task_panel(axes, task.curves[units], history, colors[role], by_time)
            axes.set_title(f"{_short(task.name)}  ×{task.weight}", fontsize=7.5, loc="left")
            axes.tick_params(labelsize=7)
            axes.locator_params(axis="x", nbins=4, integer=not by_time)
            _latency_axis(axes, bins=4)
            shown = [c.untuned_s or c.best_s or 0.0 for c in task.curves.values()]
            axes.set_ylim(0, ABOVE * max(shown))
            axes.set_xlim(left=0)
        for axes in list(figure.axes)[len(tasks) :]:
            axes.set_visible(False)
        if len(history.units) > 1:
            figure.legend(handles=_share_keys(history, colors), loc="outside upper right", ncols=6)
        figure.supxlabel("seconds" if by_time else "trials of the task", fontsize=8.5)

    name, text = ("tasks-time", "time") if by_time else ("tasks", "trials")
    return Drawing(name, f"Each task over {text}", WIDTH_IN, 0.65 + 1.45 * rows, draw)


def searched_tasks(history: History) -> list[TaskHistory]:
    """The tasks that have candidates besides their untuned schedules, costliest first."""
    return [task for task in history.tasks if task.trials]


def time_figure(history: History) -> Drawing | None:
    """Where the wall clock and the cores' time went."""
    cores = dict(history.run.facts.get("core_seconds") or {})
    total = float(cores.pop("total", 0.0)) or sum(cores.values())
    phases = {name: spent for name, spent in history.phases.items() if spent > 0}
    if not phases:
        return None
    rows = [("wall clock", phases, dict(zip(history.phases, ("s5", "s1", "s6"), strict=False)))]
    if total:
        rows.append(("core time", cores, {n: _SPENT.get(n, "s6") for n in cores}))

    def draw(figure: Any, colors: Colors) -> None:
        panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
        for axes, (title, parts, roles) in zip(panels, rows, strict=True):
            _stacked(axes, parts, {name: colors[role] for name, role in roles.items()}, colors)
            axes.set_title(f"{title}: {sum(parts.values()):.0f} s", loc="left")

    return Drawing("time", "Where the tuning time went", WIDTH_IN, 1.3 * len(rows), draw)


def failures_figure(history: History) -> Drawing | None:
    """Failed candidates by kind."""
    if not history.failures:
        return None

    def draw(figure: Any, colors: Colors) -> None:
        axes = figure.subplots()
        kinds, counts = zip(*reversed(list(history.failures.items())), strict=True)
        bars = axes.barh(kinds, counts, color=colors["s2"], height=0.6)
        axes.bar_label(bars, padding=4, color=colors["ink"])
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, max(5, 1.12 * max(counts)))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(f"candidates, of {history.candidates}")

    height = 0.75 + 0.3 * len(history.failures)
    return Drawing("failures", "Failures by kind", WIDTH_IN, height, draw)


def _task_panel(axes: Any, curve: Curve, history: History, color: str, by_time: bool) -> None:
    def place(point: Point) -> float:
        return point.time_s if by_time else point.number

    if not by_time:
        xs, ys = [place(p) for p in curve.points], [p.seconds for p in curve.points]
        axes.plot(xs, ys, "o", ms=3.2, mew=0, alpha=0.6, color=color)
    steps = [(place(p), p.seconds) for p in curve.steps]
    if steps:
        end = max([history.last_s if by_time else 0.0, *map(place, curve.points), steps[-1][0]])
        _steps(axes, [*steps, (end, steps[-1][1])], color, None, width=1.4)
    if curve.untuned_s:
        axes.axhline(curve.untuned_s, color=color, lw=0.9, ls=(0, (4, 3)))


def _steps(
    axes: Any,
    points: Sequence[tuple[float, float]],
    color: str,
    label: str | None,
    width: float = 1.8,
) -> None:
    xs, ys = zip(*points, strict=True)
    axes.step(xs, ys, where="post", color=color, label=label, lw=width)


def _key(axes: Any, colors: Colors) -> None:
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    dashed = Line2D([], [], color=colors["muted"], lw=1.1, ls=(0, (4, 3)))
    axes.legend(
        [*handles, dashed],
        [*labels, "untuned"],
        loc="lower right",
        bbox_to_anchor=(1, 1),  # above the panel: the lines go down to the corner
        borderpad=0,
        ncols=len(handles) + 1,
    )


def _share_keys(history: History, colors: Colors) -> list[Any]:
    from matplotlib.lines import Line2D

    roles = zip(history.units, _roles(history.units), strict=True)
    return [Line2D([], [], color=colors[r], label=units_text(u, history)) for u, r in roles]


def _latency_axis(axes: Any, bins: int = 5) -> None:
    """From 0 on, so that heights compare as times do."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(bins))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: format_seconds(value) if value > 0 else "0")
    )


def _stacked(
    axes: Any, parts: Mapping[str, float], fills: Mapping[str, str], colors: Colors
) -> None:
    left, total = 0.0, sum(parts.values())
    for name, spent in parts.items():
        share = f"{spent:.0f} s" if spent >= 9.5 else f"{spent:.1f} s"
        axes.barh(0, spent, left=left, color=fills[name], height=0.8, label=f"{name} {share}",
                  edgecolor=colors["surface"], linewidth=1.2)  # fmt: skip
        left += spent
    axes.set_xlim(0, total)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.35), ncols=len(parts), borderpad=0,
                handlelength=0.9, handleheight=0.9, columnspacing=1.4)  # fmt: skip


def _roles(units: Sequence[int]) -> list[str]:
    return [SERIES[number % len(SERIES)] for number in range(len(units))]


def _short(name: str, width: int = 27) -> str:
    name = name.removeprefix("fused_")
    return name if len(name) <= width else f"{name[: width - 12]}…{name[-11:]}"
