"""`tune MODEL`: tune a model for one or more shares of a device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from gpu_aware_tune.cli.options import CONTEXT, debug_option
from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.partition.linking import find_compiler
from gpu_aware_tune.run.checks import check_files
from gpu_aware_tune.run.jobs import ModelGoal, TuningJob, make_jobs
from gpu_aware_tune.search.budget import StopRequest
from gpu_aware_tune.settings import (
    DTYPES,
    EFFORTS,
    OBJECTIVES,
    PARTITIONS,
    SHARES,
    TARGETS,
)

if TYPE_CHECKING:
    from gpu_aware_tune.events import Finished, Planned

INTERRUPTED = 130
NOISE_SHOWN = 4000  # bytes


@click.command(context_settings=CONTEXT)
@click.argument(
    "models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--gpu-pct",
    metavar="PCT[,PCT...]|auto",
    help="Share of the device in percent, 1 to 100, or several: 30,50,100; of several models one for"
    " each; auto: the knee of the model's own curve [default: 100, equal parts for several models].",
)
@click.option(
    "--share",
    metavar="|".join(SHARES),
    help="Instead of --gpu-pct, how several models divide the device: equally, or by their work.",
)
@click.option(
    "--objective",
    metavar="|".join(OBJECTIVES),
    default="share",
    show_default=True,
    help="With several shares: kernels of its own for each; one set of kernels that loses least on"
    " any of them (robust) or on average (mean); the share that serves most requests (throughput).",
)
@click.option(
    "--slices",
    type=int,
    default=0,
    help="How many parts of the device measure side by side [default: one for each model].",
)
@click.option(
    "--ray",
    metavar="auto|ADDRESS",
    help="Spread the search over a Ray cluster: the one of this machine (or a new one), or HOST:PORT.",
)
@click.option("--exclusive", is_flag=True, help="Measure one candidate at a time, always alone.")
@click.option(
    "--target",
    metavar="|".join(TARGETS),
    default="auto",
    show_default=True,
    help="What to compile for; auto takes the GPU where there is one, else the CPU.",
)
@click.option(
    "--arch", help="Architecture to compile for, such as sm_90a or znver5 [default: own]."
)
@click.option("--device", type=int, default=0, show_default=True, help="Which device to tune on.")
@click.option(
    "--partition",
    metavar="|".join(PARTITIONS),
    default="auto",
    show_default=True,
    help="How the share is made real; see `tune doctor`.",
)
@click.option("--trials", type=int, help="Candidates to build and measure [default: the effort's].")
@click.option("--time", metavar="DURATION", help="Time that the whole run may take: 90s, 10m, 2h.")
@click.option(
    "--import-timeout",
    metavar="DURATION",
    help="Time that the import of one model may take [default: 10m].",
)
@click.option(
    "--effort",
    metavar="|".join(EFFORTS),
    default="default",
    show_default=True,
    help="Preset of trials and search size: "
    + ", ".join(f"{name} = {effort.trials} trials" for name, effort in EFFORTS.items())
    + ".",
)
@click.option("--patience", type=int, help="Stop after this many trials without a gain; 0 = never.")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    help="Where the library goes, of several models a folder for all [default: MODEL.tuned].",
)
@click.option(
    "--db",
    metavar="FOLDER",
    default="tuning_logs",
    show_default=True,
    help="Folder of the record store, shared by all models and runs.",
)
@click.option(
    "--input",
    "inputs",
    metavar="NAME:SHAPE",
    multiple=True,
    help="Fix an input's dynamic dimensions, such as data:1x3x224x224; may be repeated, also for other "
    "shapes of the same input: the library takes each of them.",
)
@click.option(
    "--batch",
    metavar="N[,N...]",
    help="Tune for these batch sizes, in one folder that takes any up to the largest.",
)
@click.option(
    "--dtype",
    metavar="|".join(DTYPES),
    help="Convert the model to this type first; tf32 keeps float32 and rounds factors on tensor cores.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the search and inputs."
)
@click.option(
    "--resume/--fresh",
    default=True,
    show_default=True,
    help="Start from the records of earlier runs, or ignore them.",
)
@click.option("--verify/--no-verify", default=True, help="Check the numbers of what is exported.")
@click.option(
    "--verify-inputs",
    metavar="FILE.npz",
    help="Verify with these inputs, too: an array for each input, by name.",
)
@click.option("--dry-run", is_flag=True, help="Show tasks and budget; measure nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Print more: every task, where time went.")
@debug_option
def tune(
    models: tuple[Path, ...], as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> int:
    """Tune each MODEL (an ONNX file) for a share of a device and write a library.

    Several models are tuned at the same time, each on its own slice of the device. Ctrl-C stops the
    search and exports the best so far; a second Ctrl-C aborts.
    """
    job = make_jobs(models, **options)
    for goal in job.goals:
        check_files(goal, job.settings)
    if not job.settings.dry_run:
        find_compiler()
    if not verbose:
        warnings.simplefilter("ignore")  # the libraries' warnings are not for users
    with _own_output(verbose) as (results, messages):
        for goal in job.goals:
            _check_model(goal)
        planned, finished = _run(job, results, messages, quiet, as_json, verbose)
        if as_json:
            outcomes = [_plain(outcome) for outcome in finished or planned]
            answer = outcomes[0] if len(job.goals) == 1 else {"models": outcomes}
            print(json.dumps(answer), file=results, flush=True)
    if any(outcome.interrupted and outcome.output is None for outcome in finished):
        return INTERRUPTED
    return 0


def _check_model(goal: ModelGoal) -> None:
    """Reads the model once before TVM is loaded: what the file alone tells is told in a second."""
    from gpu_aware_tune.onnx_prepare import read_model
    from gpu_aware_tune.onnx_prepare.shapes import batch_shapes, fix_inputs

    model, shapes = read_model(goal.path), goal.input_shapes
    if goal.batches:
        shapes = batch_shapes(model, goal.batches[0], shapes)
    fix_inputs(model, shapes)
    for further in goal.further_shapes:  # what is fixed is not dynamic any more
        fix_inputs(read_model(goal.path), further)


def _run(
    job: TuningJob,
    results: TextIO,
    messages: TextIO,
    quiet: bool,
    as_json: bool,
    verbose: bool,
) -> tuple[list[Planned], list[Finished]]:
    """Follows the run to its end and returns each model's plan and outcome (none for a dry run)."""
    from gpu_aware_tune.display.progress import Display
    from gpu_aware_tune.events import Finished, Planned
    from gpu_aware_tune.tuning import tune_jobs

    planned: list[Planned] = []
    finished: list[Finished] = []
    stop = StopRequest()
    stream = tune_jobs(job, stop)  # closed, so that the run ends at once when drawing fails
    show_results = None if quiet or as_json else results
    with (
        Display(None if quiet else messages, show_results, verbose) as display,
        contextlib.closing(stream) as events,
        _first_signal(stop),
    ):
        for event in events:
            display.show(event)
            if isinstance(event, Planned):
                planned.append(event)
            elif isinstance(event, Finished):
                finished.append(event)
    return planned, finished


@contextlib.contextmanager
def _first_signal(stop: StopRequest) -> Iterator[None]:
    """Make of the first Ctrl-C, or SIGTERM, a request to stop; a second one acts as usual."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def first(number: int, frame: object) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        stop.request()

    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _own_output(verbose: bool) -> Iterator[tuple[TextIO, TextIO]]:
    """Keeps stdout and stderr for us alone: yields them, and sends what libraries print elsewhere.

    TVM and its workers write to file descriptors 1 and 2 from C++; a JSON reader or a progress bar
    must not see that. It goes to stderr when verbose, else to a file whose end is shown only if the
    run ends with a defect.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with (
        open(saved[0], "w", encoding="utf-8", buffering=1) as results,
        open(saved[1], "w", encoding="utf-8", buffering=1) as messages,
        tempfile.TemporaryFile() as noise,
    ):
        os.dup2(saved[1] if verbose else noise.fileno(), 1)
        os.dup2(saved[1] if verbose else noise.fileno(), 2)
        try:
            yield results, messages
        except (TuneError, BrokenPipeError):
            raise
        except Exception:
            noise.seek(max(0, noise.seek(0, os.SEEK_END) - NOISE_SHOWN))
            messages.write(noise.read().decode(errors="replace"))
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)


def _plain(value: Any) -> Any:
    """Turns events into JSON values; mappings by units get text keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
