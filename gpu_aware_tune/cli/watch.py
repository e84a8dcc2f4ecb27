"""`tune watch`: a run that goes on in another process, live in the terminal."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import click

from gpu_aware_tune.cli.options import CONTEXT, db_option
from gpu_aware_tune.errors import SetupError, UserError, one_line

PLAIN_INTERVAL_S = 5.0  # between lines where there is no terminal, unless --interval says more


@click.command(context_settings=CONTEXT)
@click.argument("url", required=False)
@db_option
@click.option("--run", "run_id", type=click.IntRange(1), help="Which run [default: the latest].")
@click.option(
    "--interval", metavar="DURATION", default="1s", show_default=True, help="Look so often."
)
@click.option("--once", is_flag=True, help="Print where the run stands, and end.")
def watch(url: str | None, db: Path, run_id: int | None, interval: str, once: bool) -> None:
    """Follow a tuning run until it ends, or the server at URL; Ctrl-C ends the watching only.

    Of a run only the record store is read, so it is not disturbed however many watch it.
    """
    interval_s = _interval(interval)
    if url is not None:
        _watch_server(url.rstrip("/"), interval_s, once)
        return
    from gpu_aware_tune.records.store import Store
    from gpu_aware_tune.report.live import Watcher
    from gpu_aware_tune.report.terminal import Screen, lines

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


def _interval(text: str) -> float:
    from gpu_aware_tune.settings import parse_duration

    interval_s = parse_duration(text, "--interval")
    if interval_s < 0.1:
        raise UserError(f"--interval {text} is out of range: give at least 0.1s")
    return interval_s


def _watch_server(url: str, interval_s: float, once: bool) -> None:
    """Show a server's status until it stops or Ctrl-C."""
    from gpu_aware_tune.display.console import open_console
    from gpu_aware_tune.display.server_view import server_line, server_view

    console = open_console(sys.stdout)
    status = _server_status(url)
    if once:
        console.print(server_view(status))
        return
    try:
        if not console.is_terminal:
            while True:
                click.echo(server_line(status))
                time.sleep(max(interval_s, PLAIN_INTERVAL_S))
                status = _server_status(url)
        from rich.live import Live

        with Live(server_view(status), console=console, auto_refresh=False) as view:
            while True:
                time.sleep(interval_s)
                view.update(server_view(_server_status(url)), refresh=True)
    except KeyboardInterrupt:
        return


def _server_status(url: str) -> dict[str, Any]:
    """What the server says of itself.

    Raises:
        UserError: it is no address, or no server of `tune serve`.
        SetupError: nothing answers there.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url} is no address of a server: give one such as http://127.0.0.1:8000")
    try:
        with urllib.request.urlopen(f"{url}/v2/status", timeout=10) as answer:
            status = json.load(answer)
        if not {"models", "lanes", "policy"} <= set(status):
            raise ValueError("it tells no lanes")
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} is no server of `tune serve` ({error})") from error
    except OSError as error:
        raise SetupError(f"no server answers at {url} ({one_line(error)})") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{url} is no server of `tune serve` ({one_line(error)})") from error
    return dict(status)
