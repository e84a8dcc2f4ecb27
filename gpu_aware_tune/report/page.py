"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any

from gpu_aware_tune.display.tables import format_clock, format_gain, format_seconds
from gpu_aware_tune.errors import printable
from gpu_aware_tune.report import figures, shares, tables
from gpu_aware_tune.report.drawing import Drawing, to_svg
from gpu_aware_tune.report.history import History, Latency, latencies
from gpu_aware_tune.report.inputs import Profile, Stock
from gpu_aware_tune.report.style import style

_PROFILE = (
    "Run <code>tune profile LIB --json &gt; p.json</code> and pass <code>--profile p.json</code>."
)
_HEAT = (
    "Run <code>tune profile LIB --tuned-at UNITS --json</code> for kernels tuned at different shares"
    " and pass <code>--profile</code> once for each."
)
_STOCK = (
    "Run <code>python -m benchmarks.vs_metaschedule</code> for this model and pass its results with"
    " <code>--stock FILE</code>."
)
_WEIGHTS = (
    " The run's row does not say how often the model uses each task, so each counts once here;"
    " give the library's folder to <code>tune report</code>."
)


@dataclass(frozen=True)
class Report:
    """What a report shows; sections without data say which command gives it."""

    history: History
    profiles: Sequence[Profile] = ()
    stocks: Sequence[Stock] = ()

    def drawings(self) -> list[Drawing]:
        """The figures that there is data for, in the page's order."""
        history = self.history
        found = (
            figures.model_figure(history),
            figures.stock_figure(history, self.stocks),
            figures.tasks_figure(history, by_time=False),
            figures.tasks_figure(history, by_time=True),
            shares.curve_figure(self.profiles),
            shares.heat_figure(self.profiles),
            figures.time_figure(history),
            figures.failures_figure(history),
        )
        return [drawing for drawing in found if drawing is not None]


def page(report: Report) -> str:
    """Return the whole page."""
    history = report.history
    svgs = {drawing.name: (drawing, to_svg(drawing)) for drawing in report.drawings()}
    title = escape(f"Tuning report: {history.name}")
    body = "\n".join(part for part in _sections(report, svgs) if part)
    data = json.dumps(plain_data(report)).replace("<", "\\u003c")
    whole = (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style()}</style>\n</head>\n<body>\n"
        f'{_head(history)}\n{body}\n<script type="application/json" id="data">{data}</script>\n'
        "</body>\n</html>\n"
    )
    return printable(whole)  # HTML has no control characters, and UTF-8 no halves of characters


def plain_data(report: Report) -> dict[str, Any]:
    """Return what the page shows as JSON values; the page carries it for other programs."""
    history = report.history
    return {
        "model": history.name,
        "run": asdict(history.run),
        "units": history.units,
        "weighted": history.weighted,
        "latency": [asdict(latency) for latency in latencies(history)],
        "untuned_s": {units: history.untuned_s(units) for units in history.units},
        "model_curve": history.model,
        "tasks": [asdict(task) for task in history.tasks],
        "trials": history.trials,
        "candidates": history.candidates,
        "failures": history.failures,
        "phases_s": history.phases,
        "profiles": [asdict(profile) for profile in report.profiles],
        "stock": [asdict(stock) for stock in report.stocks],
    }


Svgs = Mapping[str, tuple[Drawing, str]]


def _head(history: History) -> str:
    run = history.run
    leads = "\n".join(f'<p class="lead">{_lead(item, history)}</p>' for item in latencies(history))
    failed = sum(history.failures.values())
    ended = run.finished or run.started + history.last_s
    parts = [
        f"run {run.id}, {run.status}",
        datetime.fromtimestamp(run.started, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        f"{history.trials} trials in {format_clock(ended - run.started)}",
        f"{failed} of {history.candidates} candidates failed",
    ]
    return (
        f"<h1>{escape(history.name)} on {escape(_device(history))}</h1>\n{leads}\n"
        f'<p class="meta">{escape(", ".join(parts))}</p>'
    )


def _device(history: History) -> str:
    """Write a device's key as its name: "llvm/AMD EPYC/znver4" is "AMD EPYC (znver4)"."""
    parts = str(history.run.machine.get("device", "unknown device")).split("/")
    return f"{'/'.join(parts[1:-1])} ({parts[-1]})" if len(parts) > 2 else "/".join(parts)


def _lead(latency: Latency, history: History) -> str:
    where = escape(units_label := figures.units_text(latency.units, history))
    if latency.tuned_s is None:
        return f"{escape(units_label)}: no latency yet, not every task has a measurement"
    before, after = format_seconds(latency.untuned_s), format_seconds(latency.tuned_s)
    if latency.whole and latency.untuned_s == latency.tuned_s:
        return f"{where}: <b>{after}</b>, the untuned kernels were the faster and were kept"
    text = f"{where}: <b>{before} → {after}</b>, {format_gain(latency.untuned_s, latency.tuned_s)}"
    text += " as fast as untuned"
    if not latency.whole:
        return f'{text} <span class="note">(sum of kernels)</span>'
    return f'{text} <span class="note">(whole library)</span>'


def _sections(report: Report, svgs: Svgs) -> Iterator[str]:
    history = report.history
    yield "<h2>Latency while tuning</h2>"
    yield _figure(
        svgs,
        "model",
        "The best kernels found so far, summed over the model with each task's weight, as measured"
        " during the search. Dashed: the fastest untuned schedule of each task."
        + ("" if history.weighted else _WEIGHTS),
        "Not every task has a measurement yet; run <code>tune</code> on the model again to go on.",
    )
    yield "<h2>Against stock TVM</h2>"
    named = any(stock.tasks for stock in report.stocks)
    about = "The tasks that stock TVM tuned" if named else "The whole model"
    yield _figure(
        svgs,
        "stock",
        f"{about}, as a sum of kernels, here and with TVM's own MetaSchedule tuner.",
        _STOCK,
    )
    yield "<h2>Tasks</h2>"
    yield from _tasks(report, svgs)
    yield "<h2>Latency over share</h2>"
    yield _figure(svgs, "shares", "The library inside smaller and larger shares.", _PROFILE)
    if report.profiles:
        yield tables.profiles_table(report.profiles)
    yield "<h2>Tuned at × run at</h2>"
    text = "Median latency, and its ratio to the best in its column; the stronger the color, the slower."
    yield _figure(svgs, "heat", text, _HEAT)
    yield "<h2>Where the tuning time went</h2>"
    yield _figure(
        svgs,
        "time",
        "Wall clock by phase, and the time of all cores of the machine by use; idle is what no part"
        " of the run used. Importing the model comes before the clock starts.",
        "The run has no record yet.",
    )
    yield "<h2>Failures by kind</h2>"
    none = f"None of the {history.candidates} candidates failed."
    yield _figure(svgs, "failures", "Each failed candidate once, however many shares.", none)
    if history.failures:
        yield tables.failures_table(history)
    yield "<h2>Environment</h2>"
    yield from _environment(history)


def _tasks(report: Report, svgs: Svgs) -> Iterator[str]:
    history = report.history
    searched = len(figures.searched_tasks(history))
    rest = len(history.tasks) - searched
    note = f" {rest} more tasks got their untuned schedules only." if rest else ""
    yield _figure(
        svgs,
        "tasks",
        "Dots: candidates; line: best so far; dashed: untuned; × weight. Candidates slower than"
        f" {figures.ABOVE} times untuned lie above the frame.{note}",
        "No task was searched: the run measured untuned schedules only.",
    )
    if searched:
        yield _figure(svgs, "tasks-time", "The same tasks' best so far over the run's time.", "")
    yield tables.tasks_table(history, report.stocks)
    yield (
        '<p class="meta">Best and untuned by the second, exclusive measurement where there is one;'
        " “from” says what the best kernel is: found by the search, a seed from another share, or the"
        " untuned schedule itself.</p>"
    )


def _environment(history: History) -> Iterator[str]:
    run = history.run
    machine = {name: value for name, value in run.machine.items() if name != "tasks"}
    drift = run.facts.get("drift")
    if drift:
        low, high = min(drift.values()), max(drift.values())
        text = f"{low:.2f} to {high:.2f}"
        machine["drift"] = f"{text} (untuned schedules at the run's end over its start)"
    yield tables.facts_table(machine)
    yield "<p>Settings of the run:</p>"
    yield tables.facts_table({n: v for n, v in run.settings.items() if v not in (None, {})})


def _figure(svgs: Svgs, name: str, caption: str, missing: str) -> str:
    if name not in svgs:
        return f'<p class="missing">{missing}</p>'
    return f"<figure>\n{svgs[name][1]}\n<figcaption>{caption}</figcaption>\n</figure>"
