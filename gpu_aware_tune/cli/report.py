"""`tune report`: one HTML page, and PNG files, of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpu_aware_tune.cli.options import CONTEXT, db_option
from gpu_aware_tune.errors import SetupError, UserError, printable

if TYPE_CHECKING:
    from gpu_aware_tune.report.drawing import Drawing

FILE = click.Path(path_type=Path)


@click.command(context_settings=CONTEXT)
@click.argument("library", metavar="[LIB]", type=FILE, required=False)
@db_option
@click.option("--run", "run_id", type=click.IntRange(1), help="Which run [default: the latest].")
@click.option(
    "-o",
    "--output",
    metavar="FILE.html",
    type=FILE,
    default="report.html",
    show_default=True,
    help="The page; one that is there is replaced.",
)
@click.option(
    "--png",
    metavar="FOLDER|FILE.png",
    type=FILE,
    help="Also write each figure into FOLDER, or all of them into one FILE.png.",
)
@click.option(
    "--profile",
    "profile_files",
    metavar="FILE",
    type=FILE,
    multiple=True,
    help="Latency over share, from `tune profile --json`; repeat it for libraries tuned at other shares.",
)
@click.option(
    "--stock",
    "stock_file",
    metavar="FILE",
    type=FILE,
    help="TVM's own tuner: {\"stock\": [[seconds, latency_s], ...]} or a comparison's results.",
)
def report(
    library: Path | None,
    db: Path,
    run_id: int | None,
    output: Path,
    png: Path | None,
    profile_files: tuple[Path, ...],
    stock_file: Path | None,
) -> None:
    """Write a page about a tuning run: the latest one, or the latest of LIB's model.

    It is one file that needs no network, light or dark as the reader likes, and can be printed.
    """
    from gpu_aware_tune.library.manifest import read_manifest
    from gpu_aware_tune.records.store import Store
    from gpu_aware_tune.report.history import read_history
    from gpu_aware_tune.report.inputs import find_run, find_tasks, read_profiles, read_stock
    from gpu_aware_tune.report.page import Report, page

    if output.is_dir():
        raise UserError(f"-o {output} is a folder; give a file such as {output / 'report.html'}")
    manifest = None if library is None else read_manifest(library)
    profiles = [profile for path in profile_files for profile in read_profiles(path)]
    with Store(db, readonly=True) as store:
        run = find_run(store, run_id, manifest)
        history = read_history(store, run, find_tasks(store, run, manifest))
    for other in sorted({p.model for p in profiles} - {history.name, ""}):
        text = f"warning: --profile is of {other}, the run is of {history.name}"
        click.echo(printable(text), err=True)
    stocks = [] if stock_file is None else read_stock(stock_file, history.name)
    whole = Report(history, profiles, stocks)
    _write(output, page(whole))
    if png is not None:
        _write_pngs(whole.drawings(), png)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SetupError(
            f"cannot write -o {path} ({error.strerror}); choose another file"
        ) from error
    click.echo(f"{path}  {len(text.encode()) / 1024:.0f} KiB")


def _write_pngs(drawings: list[Drawing], png: Path) -> None:
    from gpu_aware_tune.report.drawing import to_png

    if not drawings:
        click.echo("no figure to draw: the run has no record yet", err=True)
        return
    if png.suffix.lower() == ".png":
        wanted = {png: drawings}
    else:
        wanted = {png / f"{drawing.name}.png": [drawing] for drawing in drawings}
    try:
        for path, parts in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            to_png(parts, path)
            click.echo(f"{path}  {path.stat().st_size / 1024:.0f} KiB")
    except OSError as error:
        raise SetupError(f"cannot write --png {png} ({error.strerror}); choose another") from error
