"""`tune run LIB`: run a tuned model on random or given inputs and time it."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpu_aware_tune.cli.options import CONTEXT, debug_option
from gpu_aware_tune.errors import SetupError, UserError

if TYPE_CHECKING:
    import numpy as np

    from gpu_aware_tune.library import LatencyStats, Library


@click.command(context_settings=CONTEXT)
@click.argument("library", metavar="LIB", type=click.Path(path_type=Path))
@click.option(
    "--inputs",
    "inputs_file",
    metavar="FILE.npz",
    type=click.Path(path_type=Path),
    help="Arrays by input name [default: random ones].",
)
@click.option(
    "--outputs",
    "outputs_file",
    metavar="FILE.npz",
    type=click.Path(path_type=Path),
    help="Write the outputs, by name.",
)
@click.option(
    "--units",
    type=click.IntRange(1),
    help="Run on so many cores or SMs, with the library tuned for the nearest number [default: the "
    "library nearest to what is visible, on its own number].",
)
@click.option(
    "--partition",
    metavar="NAME",
    help="How the GPU is shared: green, mps, mig, or full for all of it [default: as tuned].",
)
@click.option("--repeat", type=click.IntRange(1), help="Time so many runs [default: by seconds].")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="Time runs for so long.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of random inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def run(
    library: Path,
    inputs_file: Path | None,
    outputs_file: Path | None,
    units: int | None,
    partition: str | None,
    repeat: int | None,
    seconds: float,
    seed: int,
    as_json: bool,
) -> None:
    """Run the tuned model in the folder LIB and show its latency."""
    given = _read_arrays(inputs_file) if inputs_file is not None else None

    from gpu_aware_tune.library import load
    from gpu_aware_tune.model.importer import random_inputs

    with contextlib.closing(load(library, units, partition=partition)) as loaded:
        inputs = given if given is not None else random_inputs(loaded.about.inputs, seed)
        outputs = loaded(inputs)
        if outputs_file is not None:
            _write_arrays(outputs_file, outputs)
        stats = loaded.benchmark(repeat, seconds, inputs)
    if as_json:
        print(json.dumps(_as_json(loaded, outputs, stats)))
    else:
        _show(loaded, outputs, stats)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"--inputs {path}: no such file") from None
    except Exception as error:  # numpy, zipfile and pickle each have errors of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--inputs {path} is no .npz of arrays by input name ({reason})") from error


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    import numpy as np

    try:
        with path.open("wb") as file:  # np.savez would add a suffix to a path without one
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise SetupError(f"cannot write --outputs {path} ({error.strerror})") from error


def _as_json(
    library: Library, outputs: dict[str, np.ndarray], stats: LatencyStats
) -> dict[str, Any]:
    return {
        "model": library.about.model.name,
        "device": library.about.device,
        "units": library.units,
        **({"partition": library.evidence} if library.evidence else {}),
        "latency": asdict(stats),
        "outputs": {
            name: {"shape": list(array.shape), "dtype": str(array.dtype)}
            for name, array in outputs.items()
        },
    }


def _show(library: Library, outputs: dict[str, np.ndarray], stats: LatencyStats) -> None:
    from rich.table import Table

    from gpu_aware_tune.display.console import open_console

    console = open_console(sys.stdout)
    device = library.about.device
    name = library.about.model.name
    console.print(f"{name}: {library.units} units of {device}")
    if seen := library.evidence:
        console.print(f"partition {seen['backend']}: {seen['units']} SMs")
    table = Table("median", "p10", "p90", "min", "mean", "runs")
    row = (stats.median_ms, stats.p10_ms, stats.p90_ms, stats.min_ms, stats.mean_ms)
    table.add_row(*(f"{value:.3f} ms" for value in row), str(stats.n))
    console.print(table)
    for output, array in outputs.items():
        shape = "x".join(str(extent) for extent in array.shape) or "scalar"
        console.print(f"output {output}: {shape} {array.dtype}")
