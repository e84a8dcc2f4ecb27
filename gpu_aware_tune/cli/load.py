"""`tune load`: open-loop requests to a running server, and what came of them."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from gpu_aware_tune.cli.options import CONTEXT, debug_option
from gpu_aware_tune.errors import UserError

if TYPE_CHECKING:
    from gpu_aware_tune.planning.outcome import Outcome

_LATE_S = 0.005  # of which the report says that the generator was too slow


@click.command(context_settings=CONTEXT)
@click.argument("url", default="http://127.0.0.1:8000")
@click.option(
    "--rate",
    required=True,
    metavar="R[,R...]",
    help="Requests a second, one for each model or for all.",
)
@click.option("--model", metavar="M[,M...]", help="Which models [default: all of the server].")
@click.option(
    "--slo", metavar="T[,T...]", help="Count answers within this [default: the server's]."
)
@click.option("--duration", default="10s", show_default=True, metavar="DURATION")
@click.option(
    "--arrivals",
    default="poisson",
    show_default=True,
    metavar="KIND",
    help="poisson, uniform, gamma:CV, square:FACTOR[:PERIOD_S], or a trace file.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the arrivals.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def load(url: str, as_json: bool, **options: Any) -> None:
    """Send requests to a server of `tune serve`, whether or not answers come.

    Latency counts from when a request was planned, so a slow server is not spared. Every request
    has one row of random numbers.
    """
    outcome, late_s = asyncio.run(_load(url.rstrip("/"), options))
    if as_json:
        facts = {**outcome.as_dict(), "sent_late_p99_s": late_s}
        del facts["utilisation"]  # the client knows nothing of it
        print(json.dumps(facts))
        return
    from gpu_aware_tune.display.console import open_console
    from gpu_aware_tune.display.load_view import show_load

    show_load(open_console(sys.stdout), outcome, late_s if late_s > _LATE_S else None)


async def _load(url: str, options: dict[str, Any]) -> tuple[Outcome, float]:
    from gpu_aware_tune.serving.server import missing_package

    try:
        from gpu_aware_tune.serving.http_load import drive_http, server_models
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    from gpu_aware_tune.planning.arrivals import draw_streams, parse_arrivals
    from gpu_aware_tune.planning.fleet import parse_slo, split_list
    from gpu_aware_tune.serving.deployments import parse_rates
    from gpu_aware_tune.serving.load import as_outcome
    from gpu_aware_tune.settings import parse_duration

    arrivals = parse_arrivals(options["arrivals"])
    duration_s = parse_duration(options["duration"], "--duration")
    if not duration_s > 0:
        raise UserError(f"--duration {options['duration']}: give a time above 0, such as 10s")
    known = await server_models(url)
    names = options["model"].split(",") if options["model"] else list(known)
    for name in names:
        if name not in known:
            raise UserError(f"--model {name}: the server has {', '.join(known)}")
    rates = parse_rates(options["rate"], len(names))
    if options["slo"]:
        slos = [parse_slo(text) for text in split_list("slo", options["slo"], len(names))]
    else:
        slos = [known[name]["slo_ms"] / 1e3 for name in names]
    streams = draw_streams(arrivals, rates, duration_s, options["seed"])
    tallies, late_s = await drive_http(url, [known[name] for name in names], streams, slos)
    failed = sum(tally.failed for tally in tallies)
    if failed:
        click.echo(f"{failed} requests failed", err=True)
    return as_outcome(url, names, streams, tallies, duration_s), late_s
