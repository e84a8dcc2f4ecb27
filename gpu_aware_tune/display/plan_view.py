"""A plan on the terminal: models, lanes over one cycle, what is in the way, and a simulation."""

from __future__ import annotations

import string
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gpu_aware_tune.planning.outcome import Outcome
from gpu_aware_tune.planning.schedule import Lane, ModelPlan, Plan

_BAR = 48  # columns of a lane's picture


def show_plan(
    console: Console, plan: Plan, devices: Sequence[Plan] = (), outcomes: Sequence[Outcome] = ()
) -> None:
    """Print a plan, the devices that it takes where one is not enough, and simulations of it."""
    _show_one(console, plan)
    if plan.reason is not None:
        console.print(f"\nwhy: {plan.reason}", soft_wrap=True)
        for text in plan.helps:
            console.print(f"  would help: {text}", soft_wrap=True)
    for number, each in enumerate(devices if len(devices) > 1 else ()):
        console.print(f"\ndevice {number + 1} of {len(devices)}")
        _show_one(console, each)
    if outcomes:
        console.print()
        console.print(_outcome_table(outcomes))


def verdict(plan: Plan) -> str:
    """One line that says how a plan turned out."""
    used = f"{plan.units_used} of {plan.device.count(plan.device.units)}"
    if plan.fits:
        text = f"fits: {used}, and {plan.headroom:.2f} times these rates would"
    else:
        text = f"does not fit: {plan.headroom:.0%} of these rates would"
    return f"{text} (no schedule can pass {plan.headroom_limit:.2f})"


def model_cells(plan: Plan, model: ModelPlan) -> list[str]:
    """One row of the table of models."""
    lanes = plan.group_lanes(model.group)
    widths = f"{len(lanes)} x {plan.lanes[lanes[0]].units}" if lanes else "none"
    return [
        model.model,
        _rate(model.rate_per_s),
        _rate(model.served_per_s),
        _rate(model.capacity_per_s),
        f"{1e3 * model.slo_s:g}",
        f"{1e3 * model.worst_case_s:.3g}",
        widths,
        str(model.batch),
        f"{1e3 * model.run_s:.3g}",
        f"{1e3 * model.period_s:.3g}",
        f"{_rate(model.lowest_per_s)} to {_rate(model.capacity_per_s)}",
    ]


def model_heads(plan: Plan) -> list[str]:
    """The heads of the table of models."""
    return [
        "model", "rate/s", "served/s", "capacity/s", "SLO ms", "worst ms",
        f"lanes x {plan.device.unit}s", "batch", "run ms", "every ms", "holds for /s",
    ]  # fmt: skip


def _rate(per_s: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{per_s:.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _show_one(console: Console, plan: Plan) -> None:
    device = plan.device
    console.print(f"{device.name}, {device.count(device.units)}: {verdict(plan)}", soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    rows = [["", *model_heads(plan)]]
    marks = _marks(plan)
    rows += [[marks[model.model], *model_cells(plan, model)] for model in plan.models]
    for place, name in enumerate(rows[0]):
        width = max(len(row[place]) for row in rows)
        justify = "left" if place < 2 else "right"
        table.add_column(name, justify=justify, no_wrap=True, min_width=width)  # type: ignore[arg-type]
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    for place, lane in enumerate(plan.lanes):
        units = f"{lane.first_unit}-{lane.first_unit + lane.units - 1}"
        cycle = f"{1e3 * lane.cycle_s:.3g} ms" if lane.slots else "spare"
        console.print(
            f"lane {place:2d}  units {units:>7}  |{_picture(lane, marks)}| {cycle}", soft_wrap=True
        )


def _marks(plan: Plan) -> dict[str, str]:
    """A letter for each model."""
    letters = string.ascii_uppercase + string.ascii_lowercase + string.digits
    return {model.model: letters[place % len(letters)] for place, model in enumerate(plan.models)}


def _picture(lane: Lane, marks: dict[str, str]) -> str:
    """One cycle of a lane, a letter for each piece of time; a slot may wrap around its end."""
    cells = ["."] * _BAR if lane.slots else [" "] * _BAR
    for slot in lane.slots:
        first = round(_BAR * slot.start_s / lane.cycle_s)
        length = max(1, round(_BAR * slot.length_s / lane.cycle_s))
        for place in range(first, first + length):
            cells[place % _BAR] = marks[slot.model]
    return "".join(cells)


def _outcome_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("simulated", "model", "offered/s", "good/s", "in time", "refused", "p50 ms",
                 "p99 ms", "batch"):  # fmt: skip
        left = name in ("simulated", "model")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for outcome in outcomes:
        seconds = outcome.duration_s
        total = sum(model.offered for model in outcome.models)
        table.add_row(
            outcome.policy, "all", f"{total / seconds:.4g}", f"{outcome.goodput_per_s:.4g}",
            f"{outcome.attainment:.2%}", "", "", "",
            f"use {outcome.utilisation:.0%}",
        )  # fmt: skip
        for model in outcome.models:
            table.add_row(
                "", model.model, f"{model.offered / seconds:.4g}", f"{model.good / seconds:.4g}",
                f"{model.attainment:.2%}", str(model.refused),
                f"{1e3 * model.latency_at(50):.3g}", f"{1e3 * model.latency_at(99):.3g}",
                f"{model.batch:.1f}",
            )  # fmt: skip
    return table
