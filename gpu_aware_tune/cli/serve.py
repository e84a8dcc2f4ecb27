"""`tune serve`: an inference server for tuned models that share a device by a plan."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpu_aware_tune.cli.options import CONTEXT, debug_option
from gpu_aware_tune.errors import UserError

if TYPE_CHECKING:
    from gpu_aware_tune.serving.deployments import Deployment
    from gpu_aware_tune.serving.engine import Engine
    from gpu_aware_tune.serving.front_end import FrontEndOptions
    from gpu_aware_tune.serving.server import Addresses

_OFF = "off"


@click.command(context_settings=CONTEXT)
@click.argument("sources", metavar="SOURCE...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--slo", metavar="T[,T...]", help="Latency objectives: 25ms,50ms; one each or for all."
)
@click.option(
    "--rate",
    metavar="R[,R...]",
    help="Expected requests a second [default: the plan begins with equal loads, and adapts].",
)
@click.option("--units", type=int, metavar="N", help="Cores to use [default: all].")
@click.option(
    "--http",
    default="127.0.0.1:8000",
    show_default=True,
    metavar="HOST:PORT|off",
    help="Where to listen; port 0 takes a free one.",
)
@click.option(
    "--grpc", default="127.0.0.1:8001", show_default=True, metavar="HOST:PORT|off", help="Likewise."
)
@click.option(
    "--curves",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Curves of `tune profile --save` [default: measure at the start, a second a model].",
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Carry out this plan of `tune plan --json`, whatever comes.",
)
@click.option(
    "--policy",
    default="plan",
    show_default=True,
    metavar="NAME",
    help="What decides: the plan, or a baseline such as d-stack, gslice, temporal-fifo.",
)
@click.option("--no-adapt", is_flag=True, help="Keep the first plan when rates change.")
@click.option(
    "--queue",
    type=click.IntRange(1, 100_000),
    default=256,
    show_default=True,
    metavar="ROWS",
    help="The most rows of a model that wait.",
)
@click.option(
    "--max-request",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    metavar="MIB",
    help="The largest request.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="At a time.",
)
@click.option(
    "--shared-memory",
    is_flag=True,
    help="Let clients register system shared memory of this user.",
)
@click.option("--admin", is_flag=True, help="Let clients load and unload models and set the plan.")
@click.option(
    "--ray",
    metavar="auto|HOST:PORT",
    help="Deploy with Ray Serve: a replica on each machine of the cluster, listening there.",
)
@debug_option
def serve(sources: tuple[Path, ...], http: str, grpc: str, **options: Any) -> None:
    """Serve tuned models over HTTP and gRPC (open inference protocol v2).

    A SOURCE is a folder that `tune MODEL` wrote, or one fleet.toml; folders of one model with
    several batch sizes are served together. Requests that cannot be answered within their
    objective are refused at once. SIGTERM or Ctrl-C answers what was accepted, and ends.
    """
    from gpu_aware_tune.serving.server import parse_address

    addresses = [None if text == _OFF else text for text in (http, grpc)]
    if addresses == [None, None]:
        raise UserError("--http off --grpc off: leave one of them on")
    for address in addresses:
        if address is not None:
            parse_address(address)
    plan = _read_plan(options["plan_file"])
    deployments = _deployments(sources, options)
    if options["ray"] is not None:
        _serve_with_ray(deployments, addresses[0], addresses[1], plan, options)
        return
    from gpu_aware_tune.serving.engine import Engine

    engine = Engine(deployments, **_engine_options(options))
    try:
        if plan is not None:
            engine.set_plan(plan)
        asyncio.run(_serve(engine, addresses[0], addresses[1], options))
    finally:
        engine.close()


async def _serve(
    engine: Engine, http: str | None, grpc: str | None, options: dict[str, Any]
) -> None:
    from gpu_aware_tune.serving.server import serve as serve_engine

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    limits = _limits(options)
    await serve_engine(engine, stop, http, grpc, limits, lambda found: _say_ready(engine, found))
    click.echo("stopped: what was accepted is answered")


def _serve_with_ray(
    deployments: list[Deployment],
    http: str | None,
    grpc: str | None,
    plan: dict[str, Any] | None,
    options: dict[str, Any],
) -> None:
    """Deploy, say where the replicas listen, and remove them at a signal."""
    from gpu_aware_tune.serving.ray_app import ReplicaOptions, served_by_ray

    stop = threading.Event()
    engine = _engine_options(options)
    engine["curves"] = None if engine["curves"] is None else str(engine["curves"].absolute())
    replica = ReplicaOptions(engine, http, grpc, _limits(options))
    cores = options["units"]
    with served_by_ray(options["ray"], deployments, replica, cores=cores, plan=plan) as app:
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray has set its own
            signal.signal(number, lambda *_: stop.set())
        for where in app.where():
            for name in ("http", "grpc"):
                _say_where(name, where[name], f" on {where['machine']}")
        sys.stdout.flush()
        stop.wait()
    click.echo("stopped: what was accepted is answered")


def _limits(options: dict[str, Any]) -> FrontEndOptions:
    from gpu_aware_tune.serving.front_end import FrontEndOptions

    return FrontEndOptions(
        max_request_bytes=options["max_request"] << 20,
        max_connections=options["max_connections"],
        admin=options["admin"],
        shared_memory=options["shared_memory"],
    )


def _engine_options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "units": options["units"],
        "policy": options["policy"],
        "adaptive": not options["no_adapt"],
        "curves": options["curves"],
        "queue_rows": options["queue"],
    }


def _deployments(sources: tuple[Path, ...], options: dict[str, Any]) -> list[Deployment]:
    from gpu_aware_tune.serving.deployments import make_deployments, read_deployments

    if not sources:
        raise UserError("no SOURCE given: name tuned folders, or a fleet.toml")
    if any(source.suffix == ".toml" for source in sources):
        if len(sources) > 1:
            raise UserError("a fleet.toml names all models: give it alone")
        if given := [f"--{name}" for name in ("slo", "rate") if options[name] is not None]:
            raise UserError(f"{', '.join(given)}: {sources[0]} says that for each model")
        return read_deployments(sources[0])
    return make_deployments(sources, options["slo"], options["rate"])


def _read_plan(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        facts = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read --plan {path} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(
            f"--plan {path} is no JSON ({error}): write it with tune plan --json"
        ) from None
    if not isinstance(facts, dict):
        raise UserError(f"--plan {path} is no plan: write it with tune plan --json")
    return facts


def _say_ready(engine: Engine, addresses: Addresses) -> None:
    from gpu_aware_tune.display.server_view import lanes_text

    status = engine.status()
    for model in engine.models:
        batch = f", batches up to {model.max_batch}" if model.max_batch else ""
        click.echo(f"{model.name}: {1e3 * model.slo_s:g} ms{batch}")
    click.echo(f"{lanes_text(status)}; headroom {status['headroom']:.2f}")
    _say_where("http", addresses.http)
    _say_where("grpc", addresses.grpc)
    sys.stdout.flush()


def _say_where(name: str, address: str | None, machine: str = "") -> None:
    if address is not None:
        click.echo(f"ready: {name}://{address}{machine}")
