"""What `tune records` shows: rows of keys and records, as a table, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from gpu_aware_tune.cli.csv_cells import csv_row
from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.records.store import Counts, Record

PLAIN_WIDTH = 160  # of a table that does not go to a terminal
KEY_FIELDS = ("task", "name", "device", "units", "target", "tvm")
COUNT_FIELDS = (*KEY_FIELDS, "trials", "failures", "wrong", "best_s", "default_s", "gain")
TRIAL_FIELDS = (
    *KEY_FIELDS, "origin", "seconds", "retimed_s", "spread", "repeats", "failure", "failure_text",
    "partition", "flags", "wrong", "run", "created",
)  # fmt: skip
BEST_FIELDS = (
    *KEY_FIELDS, "place", "best_s", "default_s", "gain", "origin", "retimed", "partition",
    "created", "trace",
)  # fmt: skip

Row = Mapping[str, Any]


def key_row(counts: Counts) -> Row:
    """Return what `list` says about a key."""
    return {
        **_key(counts),
        "trials": counts.trials,
        "failures": counts.failures,
        "wrong": counts.wrong,
        "best_s": counts.best_s,
        "default_s": counts.default_s,
        "gain": _gain(counts.default_s, counts.best_s),
    }


def trial_row(counts: Counts, record: Record) -> Row:
    """Return what `list --trials` says about a record."""
    return {
        **_key(counts),
        "origin": record.origin,
        "seconds": record.seconds,
        "retimed_s": record.retimed,
        "spread": record.spread,
        "repeats": record.repeats,
        "failure": record.failure,
        "failure_text": record.failure_text,
        "partition": record.partition,
        "flags": record.flags,
        "wrong": record.wrong,
        "run": record.run_id,
        "created": _date(record.created),
    }


def best_row(counts: Counts, place: int, record: Record) -> Row:
    """Return what `best` says about a record."""
    return {
        **_key(counts),
        "place": place,
        "best_s": record.best_s,
        "default_s": counts.default_s,
        "gain": _gain(counts.default_s, record.best_s),
        "origin": record.origin,
        "retimed": record.retimed is not None,
        "partition": record.partition,
        "created": _date(record.created),
        "trace": record.trace,
    }


def show(
    rows: Sequence[Row],
    fields: Sequence[str],
    as_json: bool,
    csv_file: str | None,
    hidden: Sequence[str],
) -> None:
    """Print rows as a table, JSON or CSV; the fields that are too wide for a table are hidden."""
    if as_json and csv_file is not None:
        raise UserError("--json and --csv are two forms of one answer; give one of them")
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    elif csv_file is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(csv_row, rows))
        if csv_file == "-":
            click.echo(text.getvalue(), nl=False)
        else:
            try:
                Path(csv_file).write_text(text.getvalue(), encoding="utf-8")
            except OSError as error:
                raise SetupError(
                    f"cannot write --csv {csv_file} ({error.strerror}); choose another file"
                ) from error
    elif rows:
        _table(rows, [field for field in fields if field not in hidden])
    else:
        click.echo("no records match")


def _table(rows: Sequence[Row], fields: Sequence[str]) -> None:
    from rich.table import Table

    from gpu_aware_tune.display.console import open_console

    # A device's name is long and mostly the same in every row: then it is said once, above.
    devices = {str(row["device"]) for row in rows}
    shared = devices.pop() if len(devices) == 1 else None
    table = Table(title=shared, title_justify="left", title_style="bold")
    shown = [field for field in fields if field != "device" or shared is None]
    for field in shown:
        number = field not in ("task", "name", "device", "origin", "failure", "partition", "flags")
        heading = _TIMES.get(field, field.replace("_", " "))
        # The text columns give way first where a terminal is narrow.
        table.add_column(
            heading,
            justify="right" if number else "left",
            no_wrap=True,
            overflow="ellipsis",
            min_width=len(heading) if number else None,
        )
    for row in rows:
        table.add_row(*(_cell(field, row[field]) for field in shown))
    open_console(sys.stdout, PLAIN_WIDTH).print(table)


_TIMES = {
    "best_s": "best ms",
    "default_s": "untuned ms",
    "seconds": "ms",
    "retimed_s": "retimed ms",
}


def _cell(field: str, value: Any) -> str:
    if value is None:
        return "-"
    if field == "task":
        return str(value)[:8]
    if field in _TIMES:
        return f"{value * 1e3:.4g}"
    if field == "gain":
        return f"{value:.2f}x"
    if field == "spread":
        return f"{value:.1%}"
    if isinstance(value, bool):
        return "yes" if value else ""
    return str(value)


def _key(counts: Counts) -> dict[str, Any]:
    key = counts.key
    return {
        "task": key.task,
        "name": counts.name,
        "device": key.device,
        "units": key.units,
        "target": key.target,
        "tvm": key.tvm,
    }


def _gain(default_s: float | None, best_s: float | None) -> float | None:
    return default_s / best_s if default_s and best_s else None


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
