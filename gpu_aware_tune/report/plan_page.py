"""A plan as one HTML file that needs nothing else: a Gantt picture of the lanes, and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from gpu_aware_tune.display.plan_view import model_cells, model_heads, verdict
from gpu_aware_tune.planning.outcome import Outcome
from gpu_aware_tune.planning.schedule import Lane, Plan, Slot
from gpu_aware_tune.report.drawing import SERIES
from gpu_aware_tune.report.style import style

_WIDTH, _LEFT, _ROW, _GAP, _TOP = 1000.0, 120.0, 26.0, 4.0, 8.0
_TICKS = 8
_LETTER = 6.2  # units of the drawing that a letter takes
_FEW = 0.18  # opacity steps of models beyond the first six colors

_OWN_RULES = """\
svg.gantt text { font-size: 11px; fill: var(--ink); }
svg.gantt .soft { fill: var(--muted); }
svg.gantt .rule { stroke: var(--grid); }
svg.gantt .empty { fill: var(--idle); opacity: .35; }
svg.gantt .slot { stroke: var(--surface); }
svg.gantt .slot + text { fill: var(--surface); pointer-events: none; }
"""


def plan_page(plan: Plan, devices: Sequence[Plan] = (), outcomes: Sequence[Outcome] = ()) -> str:
    """Return the whole page.

    Args:
        plan: for one device.
        devices: a plan for each device, where one is not enough.
        outcomes: of simulations.
    """
    title = escape(f"Plan: {len(plan.models)} models on {plan.device.name}")
    parts = [
        f'<h1>{title}</h1>\n<p class="lead">{escape(_sentence(plan))}</p>',
        *_why(plan),
        *_one(plan),
    ]
    for number, each in enumerate(devices if len(devices) > 1 else ()):
        parts.append(f"<h2>Device {number + 1} of {len(devices)}</h2>")
        parts.append(f"<p>{escape(_sentence(each))}</p>")
        parts += _one(each)
    if outcomes:
        parts.append("<h2>Simulation</h2>")
        parts.append(_table(*_outcome_rows(outcomes)))
    data = json.dumps(plan.as_dict()).replace("<", "\\u003c")
    body = "\n".join(parts)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style()}{_OWN_RULES}</style>\n</head>\n<body>\n"
        f'{body}\n<script type="application/json" id="data">{data}</script>\n</body>\n</html>\n'
    )


def gantt(plan: Plan) -> str:
    """The lanes over one cycle of the longest of them, as an SVG element."""
    span_s = max((lane.cycle_s for lane in plan.lanes), default=0.0) or 1e-3
    height = _TOP + len(plan.lanes) * (_ROW + _GAP) + 24
    parts = [
        f'<svg class="gantt" viewBox="0 0 {_WIDTH:g} {height:g}" role="img"'
        ' aria-label="Lanes and their slots over time">'
    ]
    parts += _axis(span_s, height)
    for row, lane in enumerate(plan.lanes):
        top = _TOP + row * (_ROW + _GAP)
        parts.append(
            f'<text class="soft" x="0" y="{top + 17:g}">{plan.device.unit}s {lane.first_unit}-'
            f"{lane.first_unit + lane.units - 1}</text>"
            f'<rect class="empty" x="{_LEFT:g}" y="{top:g}" width="{_WIDTH - _LEFT:g}"'
            f' height="{_ROW:g}" rx="3"/>'
        )
        parts += _slots(plan, lane, span_s, top)
    return "\n".join([*parts, "</svg>"])


def _axis(span_s: float, height: float) -> Iterable[str]:
    for tick in range(_TICKS + 1):
        x = _LEFT + (_WIDTH - _LEFT) * tick / _TICKS
        anchor = "end" if tick == _TICKS else "middle"
        yield (
            f'<line class="rule" x1="{x:g}" x2="{x:g}" y1="0" y2="{height - 18:g}"/>'
            f'<text class="soft" x="{x:g}" y="{height - 4:g}" text-anchor="{anchor}">'
            f"{1e3 * span_s * tick / _TICKS:.3g} ms</text>"
        )


def _slots(plan: Plan, lane: Lane, span_s: float, top: float) -> Iterable[str]:
    """A lane's slots, repeated until the picture ends; what reaches over its edges is cut."""
    if not lane.slots:
        yield f'<text class="soft" x="{_LEFT + 8:g}" y="{top + 17:g}">spare</text>'
        return
    places = {model.model: place for place, model in enumerate(plan.models)}
    scale = (_WIDTH - _LEFT) / span_s
    for cycle in range(-1, int(span_s / lane.cycle_s + 1e-6) + 1):
        for slot in lane.slots:
            start_s = max(0.0, slot.start_s + cycle * lane.cycle_s)
            end_s = min(span_s, slot.start_s + cycle * lane.cycle_s + slot.length_s)
            if end_s - start_s > 1e-9:
                x, width = _LEFT + start_s * scale, (end_s - start_s) * scale
                yield _slot(slot, lane, places[slot.model], x, top, width)


def _slot(slot: Slot, lane: Lane, place: int, x: float, top: float, width: float) -> str:
    color, opacity = SERIES[place % len(SERIES)], 1 - _FEW * (place // len(SERIES) % 4)
    about = (
        f"{slot.model}, batch {slot.batch} on {lane.units} units:"
        f" {1e3 * slot.start_s:.3g} ms to {1e3 * (slot.start_s + slot.length_s):.3g} ms"
    )
    label = next(
        (
            text
            for text in (f"{slot.model} x{slot.batch}", slot.model, f"x{slot.batch}")
            if len(text) * _LETTER < width - 6
        ),
        "",
    )
    return (
        f'<rect class="slot" x="{x:.1f}" y="{top:g}" width="{width:.1f}" height="{_ROW:g}" rx="3"'
        f' fill="var(--{color})" fill-opacity="{opacity:g}"><title>{escape(about)}</title></rect>'
        f'<text x="{x + 5:.1f}" y="{top + 17:g}">{escape(label)}</text>'
    )


def _sentence(plan: Plan) -> str:
    return f"{plan.device.name}, {plan.device.count(plan.device.units)}: {verdict(plan)}"


def _why(plan: Plan) -> Iterable[str]:
    if plan.reason is not None:
        yield f"<p><b>Why:</b> {escape(plan.reason)}.</p>"
    if plan.helps:
        items = "".join(f"<li>{escape(text)}</li>" for text in plan.helps)
        yield f"<p>Would help:</p>\n<ul>{items}</ul>"


def _one(plan: Plan) -> Iterable[str]:
    yield (
        f"<figure>\n{gantt(plan)}\n<figcaption>Each row is a lane of its own units; a slot is a run"
        " of a model that is reserved in every cycle of its lane, at its planned length. Lanes of one"
        " group run the same cycle, staggered.</figcaption>\n</figure>"
    )
    yield "<h2>Models</h2>"
    yield _table(model_heads(plan), [model_cells(plan, model) for model in plan.models], texts=1)


def _outcome_rows(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]], int]:
    heads = ["policy", "model", "offered", "in time", "refused", "p50 ms", "p99 ms", "mean batch"]
    rows = []
    for outcome in outcomes:
        for model in outcome.models:
            rows.append(
                [
                    outcome.policy,
                    model.model,
                    str(model.offered),
                    f"{model.attainment:.2%}",
                    str(model.refused),
                    f"{1e3 * model.latency_at(50):.3g}",
                    f"{1e3 * model.latency_at(99):.3g}",
                    f"{model.batch:.1f}",
                ]
            )
    return heads, rows, 2


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """A table whose first columns are texts and the others numbers."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = [' class="text"' if place < texts else "" for place in range(len(row))]
        return "".join(
            f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{cells(heads, "th")}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )
