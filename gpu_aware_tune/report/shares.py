"""The figures of profiles: latency over share with its knee, and tuned at x run at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_aware_tune.report.drawing import SERIES, Colors, Drawing
from gpu_aware_tune.report.figures import WIDTH_IN
from gpu_aware_tune.report.inputs import Profile, ShareLatency


def curve_figure(profiles: Sequence[Profile]) -> Drawing | None:
    """Latency over units, a line for each set of kernels, the knee marked."""
    if not profiles:
        return None

    def draw(figure: Any, colors: Colors) -> None:
        axes = figure.subplots()
        for number, profile in enumerate(profiles):
            color, points = colors[SERIES[number % len(SERIES)]], profile.points
            xs, ys = [p.units for p in points], [p.latency_ms for p in points]
            axes.plot(xs, ys, "o-", ms=4.5, color=color, label=_key(profile, len(profiles)))
            low = [p.latency_ms if p.p10_ms is None else p.p10_ms for p in points]
            high = [p.latency_ms if p.p90_ms is None else p.p90_ms for p in points]
            axes.fill_between(xs, low, high, color=color, alpha=0.18, lw=0)
            _mark_knee(axes, profile, color, alone=len(profiles) == 1)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(f"{profiles[0].unit}s that the share comes to")
        axes.set_ylabel("latency, ms (median, 10 to 90 %)")
        axes.legend(loc="best")

    return Drawing("shares", "Latency over share", WIDTH_IN, 3.3, draw)


def heat_figure(profiles: Sequence[Profile]) -> Drawing | None:
    """Kernels tuned at one share, run at another: how much slower than the best there."""
    cells = heat_cells(profiles)
    rows, columns = (sorted({key[side] for key in cells}) for side in (0, 1))
    if len(rows) < 2:
        return None
    best = {u: min(ms for (_, run_at), ms in cells.items() if run_at == u) for u in columns}
    worst = max(ms / best[run_at] for (_, run_at), ms in cells.items())

    def draw(figure: Any, colors: Colors) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        for (tuned_at, run_at), latency_ms in cells.items():
            x, y = columns.index(run_at), rows.index(tuned_at)
            ratio = latency_ms / best[run_at]
            depth = 0.06 + (0.5 * (ratio - 1) / (worst - 1) if worst > 1 else 0.0)
            axes.add_patch(Rectangle((x, y), 0.97, 0.95, color=colors["s2"], alpha=depth, lw=0))
            weight = "bold" if ratio == 1 else "normal"
            text = f"{latency_ms:#.3g} ms\n{ratio:.2f}×"
            axes.text(x + 0.485, y + 0.475, text, ha="center", va="center", weight=weight)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks([x + 0.5 for x in range(len(columns))], map(str, columns))
        axes.set_yticks([y + 0.5 for y in range(len(rows))], map(str, rows))
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(f"run at ({profiles[0].unit}s)")
        axes.set_ylabel(f"tuned at ({profiles[0].unit}s)")

    return Drawing("heat", "Tuned at × run at", WIDTH_IN, 0.8 + 0.55 * len(rows), draw)


def heat_cells(profiles: Sequence[Profile]) -> dict[tuple[int, int], float]:
    """Median milliseconds by (units tuned at, units run at), at the smallest batch size."""
    cells: dict[tuple[int, int], float] = {}
    batch = min((profile.batch for profile in profiles), default=1)
    for profile in profiles:
        for point in profile.points if profile.batch == batch else ():
            cells.setdefault((point.tuned_at, point.units), point.latency_ms)
    return cells


def _mark_knee(axes: Any, profile: Profile, color: str, alone: bool) -> None:
    knee = _knee(profile)
    if knee is None:
        return
    place = (knee.units, knee.latency_ms)
    axes.plot(*place, "o", ms=11, mfc="none", mew=1.8, color=color)
    if alone:
        offset = {"xytext": (8, 14), "textcoords": "offset points"}
        axes.annotate(_knee_text(knee), place, color=color, **offset)


def _key(profile: Profile, count: int) -> str:
    """The legend's text; beside other lines it has the knee, whose labels would overlap."""
    knee = _knee(profile)
    return profile.label if knee is None or count == 1 else f"{profile.label}, {_knee_text(knee)}"


def _knee(profile: Profile) -> ShareLatency | None:
    return next((point for point in profile.points if point.units == profile.knee), None)


def _knee_text(knee: ShareLatency) -> str:
    return f"knee at {knee.units}" + ("" if knee.percent is None else f" = {knee.percent:g} %")
