"""`tune watch`: a run that goes on in another process, live in the terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from gpu_aware_tune.cli.options import CONTEXT, db_option
from gpu_aware_tune.errors import UserError

PLAIN_INTERVAL_S = 5.0  # between lines where there is no terminal, unless --interval says more


@click.command(context_settings=CONTEXT)
@db_option
@click.option("--run", "run_id", type=click.IntRange(1), help="Which run [default: the latest].")
@click.option(
    "--interval", metavar="DURATION", default="1s", show_default=True, help="Look so often."
)
@click.option("--once", is_flag=True, help="Print where the run stands, and end.")
def watch(db: Path, run_id: int | None, interval: str, once: bool) -> None:
    """Follow a tuning run until it ends; Ctrl-C ends the watching, never the run.

    Only reads the record store, so a run is not disturbed however many watch it.
    """
    from gpu_aware_tune.records.store import Store
    from gpu_aware_tune.report.live import Watcher
    from gpu_aware_tune.report.terminal import Screen, lines
    from gpu_aware_tune.settings import parse_duration

    try:
        interval_s = parse_duration(interval)
    except UserError as error:
        raise UserError(str(error).replace("--time", "--interval")) from error
    if interval_s < 0.1:
        raise UserError(f"--interval {interval} is out of range: give at least 0.1s")
    with Store(db, readonly=True) as store:
        watcher = Watcher(store, run_id)
        if once:
            click.echo("\n".join(lines(watcher.look())))
            return
        with Screen(sys.stdout, PLAIN_INTERVAL_S) as screen:
            state = watcher.look()
            try:
                while state.goes_on:
                    screen.show(state)
                    time.sleep(interval_s)
                    state = watcher.look()
            except KeyboardInterrupt:
                state = watcher.look()
        click.echo("\n".join(lines(state)))
