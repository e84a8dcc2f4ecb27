"""THE MAIN PATH: an ONNX file and shares of a device in, a verified library out.

Stages, in this order, each one call that gives one noun to the next:

    device, partitions   what the shares come to on this machine          partition/
    model                ONNX -> fused Relax module                       model.py
    tasks                unique kernels                                   tasks.py
    records              what is known already                            records.py
    baseline, trials     search, build and measure at the same time       search.py, pipeline.py
    choices              re-measured alone, checked for their numbers     selection.py
    library              compiled, timed, verified, exported              shipping.py, library.py
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.events import Event, Finished, Note, Planned, Stage
from gpu_aware_tune.settings import Settings, check_files, make_settings

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
    from gpu_aware_tune.library import load

    settings = make_settings(**options)
    finished: Finished | None = None
    for event in tune_events(model, settings):
        if isinstance(event, Finished):
            finished = event
    assert finished is not None and finished.output is not None
    return load(finished.output, units=finished.shares[0].units)


def tune_events(model: str | Path, settings: Settings) -> Iterator[Event]:
    """Tune a model, telling what happens: a generator of `events`, the last one `Finished`.

    Closing it early, Ctrl-C and errors all end every worker; what was measured is on disk by then.
    The first Ctrl-C ends the search and exports the best so far; a second one raises
    `KeyboardInterrupt`.
    """
    from gpu_aware_tune.run import Run

    path = Path(model)
    check_files(path, settings)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(Run(path, settings))
        yield from run.open_device()
        yield Stage("model", f"importing {path.name}")
        run.load_model()
        yield Stage("tasks", "extracting tasks")
        run.extract_tasks()
        run.open_records()
        plan = run.plan()
        yield plan
        if settings.dry_run:
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
        yield from run.verify()
        yield run.finish()


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


__all__ = ["Note", "Planned", "tune", "tune_events"]
