"""What came of a load, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from gpu_aware_tune.planning.outcome import Outcome


def show_load(console: Console, outcome: Outcome, late_s: float | None = None) -> None:
    """Print a load's outcome.

    Args:
        console: where to.
        outcome: what came of it.
        late_s: how late requests were sent, where that is worth saying.
    """
    table = Table("model", *_COLUMNS, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for model in outcome.models:
        table.add_row(
            model.model,
            str(model.offered),
            f"{model.good / outcome.duration_s:.1f}",
            f"{100 * model.attainment:.1f} %",
            str(model.refused),
            *[f"{1e3 * model.latency_at(part):.2f}" for part in (50, 90, 99)],
        )
    console.print(table)
    console.print(
        f"goodput {outcome.goodput_per_s:.1f} a second, {100 * outcome.attainment:.1f} % within"
        f" their objectives, Jain's index {outcome.fairness:.3f}"
    )
    if late_s is not None:
        console.print(
            f"requests were sent up to {1e3 * late_s:.1f} ms late (p99): this generator is too slow"
            " for the rate, or has too little of the machine"
        )


_COLUMNS = ("requests", "good/s", "in time", "refused", "p50 ms", "p90 ms", "p99 ms")
