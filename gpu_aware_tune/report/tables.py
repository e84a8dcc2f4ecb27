"""The page's tables: tasks, failures, profiles, the environment."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from gpu_aware_tune.display.tables import format_gain, format_seconds
from gpu_aware_tune.report.figures import units_text
from gpu_aware_tune.report.history import History, TaskHistory
from gpu_aware_tune.report.inputs import Profile, Stock

_ORIGINS = {"default": "untuned", "search": "search", "seed": "seed"}


def tasks_table(history: History, stocks: Sequence[Stock]) -> str:
    """A row a task, costliest first: before and after on each share."""
    stock = next((stock.tasks for stock in stocks if stock.tasks), {})
    heads = ["untuned", "best", "gain", "from"]
    groups = "".join(
        f'<th class="group" colspan="{len(heads)}">{escape(units_text(units, history))}</th>'
        for units in history.units
    )
    extra = "<th rowspan='2'>stock</th>" if stock else ""
    head = (
        "<tr><th class='text' rowspan='2'>task</th><th rowspan='2'>weight</th>"
        f"<th rowspan='2'>trials</th><th rowspan='2'>failed</th>{extra}{groups}</tr>"
        f"<tr>{''.join(f'<th>{name}</th>' for name in heads * len(history.units))}</tr>"
    )
    rows = (_task_row(task, history, stock) for task in history.tasks)
    return _table(head, rows)


def failures_table(history: History) -> str:
    """A row a kind of failure, with its first message."""
    head = (
        "<tr><th class='text'>kind</th><th>candidates</th><th class='text'>first message</th></tr>"
    )
    rows = (
        f"<th class='text'>{escape(kind)}</th><td>{count}</td>"
        f"<td class='text wide'><code>{escape(_first_line(history.examples[kind]))}</code></td>"
        for kind, count in history.failures.items()
    )
    return _table(head, rows)


def profiles_table(profiles: Sequence[Profile]) -> str:
    """A row a set of kernels and share."""
    names = ["units", "share", "median", "10 %", "90 %", "per second", "efficacy"]
    energy = any(point.energy_j is not None for profile in profiles for point in profile.points)
    names += ["energy"] if energy else []
    head = f"<tr><th class='text'>kernels</th>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    rows = []
    for profile in profiles:
        for point in profile.points:
            cells = [
                f"{point.units}{' (knee)' if point.units == profile.knee else ''}",
                _number(point.percent, "{:g} %"),
                _number(point.latency_ms, "{:#.3g} ms"),
                _number(point.p10_ms, "{:#.3g} ms"),
                _number(point.p90_ms, "{:#.3g} ms"),
                _number(point.throughput_per_s, "{:.4g}"),
                _number(point.efficacy, "{:,.1f}"),
            ]
            cells += [_number(point.energy_j, "{:.3g} J")] if energy else []
            numbers = "".join(f"<td>{cell}</td>" for cell in cells)
            rows.append(f"<th class='text'>{escape(profile.label)}</th>{numbers}")
    return _table(head, rows)


def facts_table(facts: Mapping[str, Any]) -> str:
    """A row a fact."""
    rows = (
        f"<th class='text'>{escape(str(name).replace('_', ' '))}</th>"
        f"<td class='text wide'>{escape(_plain(value))}</td>"
        for name, value in facts.items()
    )
    return _table("", rows)


def _task_row(task: TaskHistory, history: History, stock: Mapping[str, float]) -> str:
    cells = [str(task.weight), str(task.trials), str(task.failed or "")]
    cells += [format_seconds(stock.get(task.name))] if stock else []
    for units in history.units:
        curve = task.curves[units]
        cells += [
            format_seconds(curve.final_untuned_s),
            format_seconds(curve.final_s),
            format_gain(curve.final_untuned_s, curve.final_s),
            _ORIGINS.get(curve.origin, curve.origin) or "-",
        ]
    return f"<th class='text'>{escape(task.name)}</th>" + "".join(
        f"<td>{escape(cell)}</td>" for cell in cells
    )


def _table(head: str, rows: Iterable[str]) -> str:
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    top = f"<thead>{head}</thead>\n" if head else ""
    return f'<div class="scroll"><table>\n{top}<tbody>\n{body}\n</tbody>\n</table></div>'


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _first_line(text: str, width: int = 240) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= width else f"{line[:width]}…"


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, int | float | str) for item in value):
        return ", ".join(map(str, value))
    return json.dumps(value)
