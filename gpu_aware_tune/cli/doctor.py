"""`tune doctor`: what this machine offers, what it lacks, and what to do about it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from gpu_aware_tune.cli.machine import Check, checks
from gpu_aware_tune.cli.options import CONTEXT
from gpu_aware_tune.errors import SetupError

MARKS = {"ok": "ok", "info": "-", "warn": "WARN", "fail": "FAIL"}


@click.command(context_settings=CONTEXT)
@click.option(
    "--db",
    type=click.Path(path_type=Path),
    default="tuning_logs",
    show_default=True,
    metavar="FOLDER",
    help="The record store's folder, to see whether it can be written and has room.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the facts as one JSON object.")
def doctor(db: Path, as_json: bool) -> int:
    """Show what this machine offers and what it lacks.

    The exit code is 0 where tuning on the CPU is possible, else 3.
    """
    found = list(checks(db))
    possible = not any(check.status == "fail" for check in found)
    if as_json:
        facts = [dataclasses.asdict(check) for check in found]
        click.echo(json.dumps({"cpu_tuning": possible, "checks": facts}))
    else:
        for line in lines(found):
            click.echo(line)
        if possible:
            click.echo("tuning on the CPU is possible here")
    return 0 if possible else SetupError.exit_code


def lines(found: list[Check]) -> list[str]:
    """One line a fact, and one below it where something can be done."""
    width = max(len(check.name) for check in found)
    texts = []
    for check in found:
        texts.append(f"{MARKS[check.status]:>4}  {check.name:<{width}}  {check.value}")
        if check.fix:
            texts.append(f"{'':>4}  {'':<{width}}  -> {check.fix}")
    return texts
