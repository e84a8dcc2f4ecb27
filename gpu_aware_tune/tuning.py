"""THE MAIN PATH: ONNX files and shares of a device in, verified libraries out.

Stages, in this order, each one call that gives one noun to the next:

    share                the knee of the model's curve, where none is given  run/auto_share.py
    device               what there is, and how shares of it are made real   partition/
    models, tasks        ONNX -> fused Relax module -> unique kernels        onnx_prepare/, model/
    records              what is known already                               records/
    baseline, trials     search, build and measure at the same time          search/, codegen/, measure/
    choices              re-measured alone, checked for their numbers        finalize/
    libraries            compiled, timed, verified, exported                 finalize/, library/
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.events import Event, Finished, Stage
from gpu_aware_tune.run.jobs import Job, divide, make_jobs
from gpu_aware_tune.settings import KNEE, Settings, check_files

if TYPE_CHECKING:
    from gpu_aware_tune.library import Library


def tune(model: str | Path, **options: Any) -> Library:
    """Tune a model for a share of a device and load the library.

    Args:
        model: path of an ONNX file.
        **options: fields of `Settings`, in the forms people write, such as `gpu_pct=30`, `time="10m"`.

    Returns:
        The library for the first share asked for, ready to be called.

    Raises:
        UserError: an option or the model cannot be used.
        SetupError: the machine lacks something.
    """
    return tune_many([model], **options)[0]


def tune_many(models: Sequence[str | Path], **options: Any) -> list[Library]:
    """Tune several models at the same time, each for its share of one device, and load them.

    Args:
        models: paths of ONNX files.
        **options: as for `tune`; `gpu_pct` is one percentage for all models or one for each, and
            equal parts of the device without it. `output` is a folder for all of the libraries.

    Returns:
        A library for each model, in their order.

    Raises:
        UserError: an option or a model cannot be used.
        SetupError: the machine lacks something.
    """
    from gpu_aware_tune.library import load

    finished = [e for e in tune_jobs(make_jobs(models, **options)) if isinstance(e, Finished)]
    libraries = []
    for outcome in finished:
        assert outcome.output is not None
        libraries.append(load(outcome.output, units=outcome.shares[0].units))
    return libraries


def tune_events(model: str | Path | Sequence[Path], settings: Settings) -> Iterator[Event]:
    """Tune one model or several, telling what happens; see `tune_jobs`."""
    models = [Path(model)] if isinstance(model, str | Path) else list(model)
    return tune_jobs(divide(models, settings))


def tune_jobs(jobs: Sequence[Job]) -> Iterator[Event]:
    """Tune models, telling what happens: a generator of `events` that ends with one `Finished` each.

    Closing it early, Ctrl-C and errors all end every worker; what was measured is on disk by then.
    The first Ctrl-C ends the search and exports the best so far; a second one raises
    `KeyboardInterrupt`.
    """
    from gpu_aware_tune.run.auto_share import with_share
    from gpu_aware_tune.run.session import Run

    for path, settings in jobs:
        check_files(path, settings)
    jobs = list(jobs)
    for number, job in enumerate(jobs):
        if job[1].share == KNEE:
            jobs[number] = yield from with_share(job)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(Run(jobs))
        yield from run.open_device()
        yield from run.load_models()
        yield Stage("records", "reading what is known")
        yield from run.open_records()
        yield from run.plan()
        if run.settings.dry_run:
            return
        stack.enter_context(_interrupt(run.interrupt))
        yield Stage("search", "measuring the untuned schedules")
        yield from run.start_workers()
        yield from run.search.baseline()
        if not run.search.interrupted:
            yield Stage("search", "searching")
            yield from run.search.trials()
        yield Stage("retime", "measuring the best again, alone")
        yield from run.choose()
        yield Stage("library", "compiling and timing the library")
        run.compile()
        yield from run.time()
        yield Stage("verify", "checking the library's numbers")
        yield from run.export()
        yield from run.finish()


@contextlib.contextmanager
def _interrupt(handler: Any) -> Iterator[None]:
    """Route the first Ctrl-C to `handler`; a second one raises as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; the caller's own stays in force
        return
    before = signal.getsignal(signal.SIGINT)

    def first(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        handler()

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
