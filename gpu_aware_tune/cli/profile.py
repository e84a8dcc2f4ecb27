"""`tune profile LIB...`: latency, throughput and energy at each share, and the knee."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpu_aware_tune.cli.csv_cells import csv_row
from gpu_aware_tune.cli.options import CONTEXT, debug_option
from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.settings import PARTITIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_aware_tune.profiling.curves import Curve, Point

_BAR_WIDTH = 10


@click.command(context_settings=CONTEXT)
@click.argument("libraries", metavar="LIB...", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--batch",
    metavar="N[,N...]",
    help="Of the folders LIB those with these batch sizes [default: all of them].",
)
@click.option(
    "--units",
    metavar="N[,N...]",
    help="Shares to measure, in cores or SMs [default: every tenth of the device, every tuned one].",
)
@click.option(
    "--tuned-at",
    type=click.IntRange(1),
    metavar="N",
    help="Run the library tuned for N units at every share [default: the nearest one, as `load`].",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=0.3,
    show_default=True,
    help="Length of one slice; the shares take turns.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=7,
    show_default=True,
    help="Slices of each share; figures are medians over them.",
)
@click.option(
    "--partition",
    metavar="|".join(PARTITIONS),
    default="auto",
    show_default=True,
    help="How the shares are made real; see `tune doctor`.",
)
@click.option("--device", type=int, default=0, show_default=True, help="Which GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--csv",
    "csv_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the points to a CSV file too.",
)
@click.option(
    "--save",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Write each model's curve to FOLDER/MODEL.json, for `tune plan`.",
)
@debug_option
def profile(
    libraries: tuple[Path, ...],
    batch: str | None,
    units: str | None,
    tuned_at: int | None,
    seconds: float,
    rounds: int,
    partition: str,
    device: int,
    as_json: bool,
    csv_file: Path | None,
    save: Path | None,
) -> None:
    """Measure the tuned model in the folder LIB on shares of its device.

    Give several folders to compare batch sizes: each holds the model at one of them. Folders of
    several models are measured one model after the other.
    """
    if not libraries:
        raise UserError("no LIB given: name the folder that `tune MODEL` wrote")
    if partition not in PARTITIONS:
        allowed = ", ".join(PARTITIONS)
        raise UserError(f"--partition {partition!r} is not known; allowed: {allowed}")
    wanted, batches = _parse_counts("--units", units), _parse_counts("--batch", batch)
    if csv_file is not None:
        _check_writable(csv_file)
    if save is not None:
        _make_folder(save)

    from gpu_aware_tune.profiling.profiles import group_by_model
    from gpu_aware_tune.profiling.profiles import profile as measure

    curves = []
    for folders in group_by_model(libraries, batches):
        with _progress() as progress:
            curve = measure(
                folders,
                wanted,
                tuned_at=tuned_at,
                seconds=seconds,
                rounds=rounds,
                partition=partition,
                device=device,
                progress=progress,
            )
        curves.append(curve)
        if save is not None:
            _save(curve, save)
    if csv_file is not None:
        _write_csv(curves, csv_file)
    if as_json:
        facts = [curve.as_dict() for curve in curves]
        print(json.dumps(facts[0] if len(facts) == 1 else {"curves": facts}))
    else:
        for curve in curves:
            _show(curve)


def _parse_counts(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        what = "cores or SMs" if option == "--units" else "batch sizes"
        raise UserError(
            f"{option} {text!r} is no list of {what}; allowed: whole numbers from 1 on,"
            " such as 1,2,4"
        )
    return [int(part) for part in parts]


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"cannot write --save {path} ({error.strerror}): give another folder"
        ) from error


def _save(curve: Curve, folder: Path) -> None:
    path = folder / f"{curve.model.replace('/', '-')}.json"
    try:
        path.write_text(json.dumps(curve.as_dict(), indent=1) + "\n")
    except OSError as error:
        raise SetupError(f"cannot write --save {path} ({error.strerror})") from error


def _check_writable(path: Path) -> None:
    """A mistyped folder is told before the measuring, not after it."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        reason = "it is a folder" if path.is_dir() else "there is no such folder"
        raise SetupError(f"cannot write --csv {path} ({reason}): give another file")


@contextmanager
def _progress() -> Iterator[Callable[[float], None] | None]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=1.0)
        yield lambda done: bar.update(task, completed=done)


def _write_csv(curves: Sequence[Curve], path: Path) -> None:
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = [_row(curve, point, curve.knees) for curve in curves for point in curve.points]
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(map(csv_row, rows))
    except OSError as error:
        raise SetupError(f"cannot write --csv {path} ({error.strerror})") from error


def _row(curve: Curve, point: Point, knees: dict[int, int]) -> dict[str, Any]:
    knee = knees[point.batch] == point.units
    return {"model": curve.model, **dataclasses.asdict(point), "knee": int(knee)}


def _show(curve: Curve) -> None:
    from rich.table import Table

    from gpu_aware_tune.display.console import open_console
    from gpu_aware_tune.profiling.knee import choose_share

    console = open_console(sys.stdout)
    title = f"{curve.model} on {curve.device}, partition {curve.backend}; latency in ms"
    console.print(title, highlight=False, soft_wrap=True)
    batches = len({point.batch for point in curve.points}) > 1
    power = any(point.power_w is not None for point in curve.points)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    names = [f"{curve.unit}s", "share", "code", *(["batch"] if batches else [])]
    names += ["median", "p10", "p90", "per s", "efficacy"]
    names += ["W", "mJ each"] if power else []
    most = max(point.efficacy for point in curve.points)
    rows = [_cells(point, most, batches, power) for point in curve.points]
    for name, *cells in zip(names, *rows, strict=True):
        # Where it is narrow the bars give way: a number that is cut says something else.
        width = max(map(len, (name, *cells)))
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    table.add_column("", no_wrap=True, overflow="crop")
    slowest_ms = max(point.latency_ms for point in curve.points)
    knees = curve.knees
    for point, cells in zip(curve.points, rows, strict=True):
        bar = "█" * max(1, round(_BAR_WIDTH * point.latency_ms / slowest_ms))
        mark = "knee" if knees[point.batch] == point.units else ""
        table.add_row(*cells, mark.ljust(5) + bar)
    console.print(table)
    if len(curve.points) > len(knees):
        percent, why = choose_share(curve.points)
        console.print(f"--gpu-pct {percent}: {why}", highlight=False, soft_wrap=True)


def _cells(point: Point, most: float, with_batch: bool, with_power: bool) -> list[str]:
    """One row; the efficacy is shown as a part of the best one, its unit says nothing."""
    cells = [str(point.units), f"{point.percent} %", str(point.tuned_at)]
    if with_batch:
        cells.append(str(point.batch))
    cells += [f"{ms:.3f}" for ms in (point.latency_ms, point.p10_ms, point.p90_ms)]
    cells += [f"{point.throughput_per_s:.1f}", f"{point.efficacy / most:.0%}"]
    if with_power:
        cells.append("-" if point.power_w is None else f"{point.power_w:.0f}")
        cells.append("-" if point.energy_j is None else f"{1e3 * point.energy_j:.2f}")
    return cells
