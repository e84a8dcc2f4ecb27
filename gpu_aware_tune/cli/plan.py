"""`tune plan`: which model gets which share of a device, when, and in which batches."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpu_aware_tune.cli.options import CONTEXT, debug_option
from gpu_aware_tune.errors import SetupError, UserError

if TYPE_CHECKING:
    from gpu_aware_tune.planning.fleet import Fleet
    from gpu_aware_tune.planning.lanes import Workload
    from gpu_aware_tune.planning.outcome import Outcome
    from gpu_aware_tune.planning.schedule import Plan

_SECONDS_DEFAULT = "60s"


@click.command(context_settings=CONTEXT)
@click.argument("sources", metavar="SOURCE...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--rate", metavar="R[,R...]", help="Requests a second, one for each model or for all."
)
@click.option(
    "--slo", metavar="T[,T...]", help="Latency objectives: 25ms,50ms; one each or for all."
)
@click.option("--percentile", metavar="P[,P...]", help="Of requests within the SLO [default: 99].")
@click.option("--weight", metavar="W[,W...]", help="Weights of the models' requests [default: 1].")
@click.option(
    "--cv",
    metavar="C[,C...]",
    help="Burstiness that slots leave room for: 0 even, 1 Poisson [default: 0].",
)
@click.option(
    "--curves",
    type=click.Path(path_type=Path),
    default="curves",
    show_default=True,
    metavar="FOLDER",
    help="Where `tune profile --save` put the curves of tuned folders.",
)
@click.option(
    "--device",
    metavar="'NAME, N SMs'",
    help="Plan for this device [default: the one that the curves were measured on].",
)
@click.option("--margin", type=float, help="Planning latency over the measured p90 [default: 1.1].")
@click.option(
    "--batching",
    metavar="affine|padded",
    help="A batch size that was not measured takes: a time between those of its neighbours, or the"
    " next larger one's [default: affine].",
)
@click.option(
    "--interference",
    type=float,
    help="How many times longer a run takes beside others [default: 1.0].",
)
@click.option(
    "--objective",
    metavar="headroom|goodput|units",
    help="What to make the most of [default: headroom].",
)
@click.option(
    "--simulate", metavar="DURATION", help="Simulate the plan under load: 60s, 10m.", default=None
)
@click.option(
    "--arrivals",
    default="poisson",
    show_default=True,
    metavar="KIND",
    help="Of the simulation: poisson, uniform, gamma:CV, square:FACTOR, or a trace file.",
)
@click.option(
    "--policy",
    default="plan",
    show_default=True,
    metavar="NAME[,NAME...]|all",
    help="What the simulation runs: the plan's own policy, or others to compare it with.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the arrivals.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write that JSON object to a file too.",
)
@debug_option
def plan(
    sources: tuple[Path, ...],
    curves: Path,
    device: str | None,
    simulate: str | None,
    arrivals: str,
    policy: str,
    seed: int,
    html: Path | None,
    as_json: bool,
    output: Path | None,
    **options: Any,
) -> None:
    """Plan how models share a device: lanes, batches, headroom, and what is in the way.

    A SOURCE is a folder that `tune MODEL` wrote, a curve that `tune profile --save` wrote, or one
    fleet.toml. docs/planning.md has the formats.
    """
    if not sources:
        raise UserError("no SOURCE given: name tuned folders, curves, or a fleet.toml")
    for option, path in (("--html", html), ("--output", output)):
        _check_writable(option, path)

    from gpu_aware_tune.planning.planner import plan_workload

    fleet = _fleet(sources, curves, device, options)
    work = fleet.workload()
    made = plan_workload(work, fleet.objective, fleet.margin)
    devices = _devices(work, fleet) if not made.fits else ()
    outcomes = _simulate(fleet, work, made, simulate, arrivals, policy, seed)
    facts = {
        **made.as_dict(),
        "devices": [each.as_dict() for each in devices],
        "simulation": [outcome.as_dict() for outcome in outcomes],
    }
    if output is not None:
        _write(output, "--output", json.dumps(facts, indent=1) + "\n")
    if html is not None:
        from gpu_aware_tune.report.plan_page import plan_page

        _write(html, "--html", plan_page(made, devices, outcomes))
    if as_json:
        print(json.dumps(facts))
    else:
        from gpu_aware_tune.display.console import open_console
        from gpu_aware_tune.display.plan_view import show_plan

        show_plan(open_console(sys.stdout), made, devices, outcomes)


def _fleet(
    sources: tuple[Path, ...], folder: Path, device: str | None, options: dict[str, Any]
) -> Fleet:
    """What is planned: from a fleet.toml, or from lists on the command line."""
    from gpu_aware_tune.planning.fleet import Fleet, choose_device, find_curve, read_fleet

    lists = ("rate", "slo", "percentile", "weight", "cv")
    if any(source.suffix == ".toml" for source in sources):
        if len(sources) > 1:
            raise UserError("a fleet.toml names all models: give it alone")
        if given := [f"--{name}" for name in lists if options[name] is not None]:
            raise UserError(f"{', '.join(given)}: {sources[0]} says that for each model")
        return _with_options(read_fleet(sources[0], device), options)
    found = tuple(find_curve(source, folder) for source in sources)
    demands = _demands([curve.model for curve in found], options)
    return _with_options(Fleet(choose_device(device, found), demands, found), options)


def _demands(names: list[str], options: dict[str, Any]) -> Any:
    from gpu_aware_tune.planning.demand import Demand
    from gpu_aware_tune.planning.fleet import parse_slo, split_list

    for name, form in (("rate", "120,40"), ("slo", "25ms,50ms")):
        if options[name] is None:
            raise UserError(f"--{name} is missing: give one for each model, such as {form}")
    rates = _numbers("rate", options["rate"], len(names))
    slos = [parse_slo(text) for text in split_list("slo", options["slo"], len(names))]
    percentiles = _numbers("percentile", options["percentile"] or "99", len(names))
    weights = _numbers("weight", options["weight"] or "1", len(names))
    cvs = _numbers("cv", options["cv"] or "0", len(names))
    rows = zip(names, rates, slos, percentiles, weights, cvs, strict=True)
    return tuple(Demand(*row) for row in rows)


def _with_options(fleet: Fleet, options: dict[str, Any]) -> Fleet:
    """The fleet, with what the command line says of it in the place of the file's."""
    from gpu_aware_tune.planning.curve import Batching
    from gpu_aware_tune.planning.interference import Interference
    from gpu_aware_tune.planning.schedule import PlanObjective

    changed: dict[str, Any] = {}
    if options["margin"] is not None:
        changed["margin"] = options["margin"]
    if options["interference"] is not None:
        changed["interference"] = Interference(options["interference"])
    for name, kind in (("batching", Batching), ("objective", PlanObjective)):
        if options[name] is not None:
            allowed = [each.value for each in kind]
            if options[name] not in allowed:
                raise UserError(
                    f"--{name} {options[name]!r} is not known; allowed: {', '.join(allowed)}"
                )
            changed[name] = kind(options[name])
    return dataclasses.replace(fleet, **changed)


def _numbers(name: str, text: str, count: int) -> list[float]:
    from gpu_aware_tune.planning.fleet import split_list

    try:
        return [float(part) for part in split_list(name, text, count)]
    except ValueError:
        raise UserError(
            f"--{name} {text!r} is no list of numbers: give a form such as 120,40"
        ) from None


def _devices(work: Workload, fleet: Fleet) -> tuple[Plan, ...]:
    """Where one device is not enough: a plan for each of the fewest that are."""
    from gpu_aware_tune.planning.placement import place
    from gpu_aware_tune.planning.planner import plan_workload

    placement = place(work)
    return tuple(
        plan_workload(placement.workload(work, number), fleet.objective, fleet.margin)
        for number in range(len(placement.devices))
    )


def _simulate(
    fleet: Fleet,
    work: Workload,
    made: Plan,
    duration: str | None,
    arrivals: str,
    policy: str,
    seed: int,
) -> tuple[Outcome, ...]:
    from gpu_aware_tune.planning.arrivals import parse_arrivals
    from gpu_aware_tune.planning.policies import POLICIES, make_policy
    from gpu_aware_tune.planning.simulator import curve_durations, draw_arrivals, simulate
    from gpu_aware_tune.settings import parse_duration

    kind = parse_arrivals(arrivals)
    names = POLICIES if policy == "all" else tuple(policy.split(","))
    policies = [make_policy(name, work, made) for name in names]
    if duration is None:
        return ()
    seconds = parse_duration(duration, "--simulate")
    if not seconds > 0:
        raise UserError(
            f"--simulate {duration}: give a duration above 0, such as {_SECONDS_DEFAULT}"
        )
    streams = draw_arrivals(work, kind, seconds, seed)
    return tuple(
        simulate(each, work, streams, seconds, curve_durations(work, fleet.interference, seed))
        for each in policies
    )


def _check_writable(option: str, path: Path | None) -> None:
    """A mistyped folder is told before the planning, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        reason = "it is a folder" if path.is_dir() else "there is no such folder"
        raise SetupError(f"cannot write {option} {path} ({reason}): give another file")


def _write(path: Path, option: str, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write {option} {path} ({error.strerror})") from error
