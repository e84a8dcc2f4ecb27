"""THE MAIN PATH: ONNX files and shares of a device in, verified libraries out.

Each stage takes what it needs and returns what the next one takes; only the session (device, store,
worker host) is kept for the whole run:

    device               what there is, and how shares of it are made real   partition/
    models, tasks        ONNX -> fused Relax module -> unique kernels        onnx_prepare/, model/
    shares               the knee of a model's curve, where none is given    run/auto_share.py
    records              what is known already                               records/
    oracles              the original file, run by ONNX Runtime meanwhile    finalize/oracle.py
    workers              search, build and measuring workers                 workers/, run/search_stage.py
    check                the imported model against the original file        run/check_stage.py
    search               baseline first, then trials: search, build and      search/, codegen/, measure/
                         measurement at the same time
    retiming             the best measured again, alone                      finalize/retiming.py
    choices              numerically verified kernels                        finalize/selection.py
    libraries            compiled, timed, verified whole, exported           finalize/, library/
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_aware_tune.events import Event, Finished, Note, Planned, Stage, StageName
from gpu_aware_tune.run.checks import check_files
from gpu_aware_tune.run.jobs import TuningJob, divide, make_jobs
from gpu_aware_tune.search.budget import StopRequest
from gpu_aware_tune.settings import Settings

if TYPE_CHECKING:
    from gpu_aware_tune.library import Library

Shapes = Mapping[str, Sequence[int] | Sequence[Sequence[int]]] | Sequence[str]


def tune(
    model: str | Path,
    *,
    gpu_pct: int | str | Sequence[int] | None = None,
    objective: str = "share",
    target: str = "auto",
    arch: str | None = None,
    device: int = 0,
    partition: str = "auto",
    trials: int | None = None,
    time: str | float | None = None,
    import_timeout: str | float | None = None,
    effort: str = "default",
    patience: int | None = None,
    output: str | Path | None = None,
    db: str | Path = "tuning_logs",
    inputs: Shapes | None = None,
    batch: int | str | Sequence[int] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    resume: bool = True,
    verify: bool = True,
    verify_inputs: str | Path | None = None,
    slices: int = 0,
    exclusive: bool = False,
    ray: str | None = None,
    dry_run: bool = False,
) -> Library | None:
    """Tune a model for a share of a device and load the library.

    Args:
        model: path of an ONNX file.
        gpu_pct: share of the device in percent, 1 to 100, or several: `30`, `"30,50"`, `(30, 50)`;
            `"auto"`: the knee of the model's own curve. By default the whole device.
        objective: with several shares: "share", kernels of its own for each; "robust" or "mean", one
            set of kernels for all; "throughput", the share that serves most requests.
        target: "cuda", "llvm", or "auto": the GPU where there is one, else the CPU.
        arch: architecture to compile for, such as "sm_90a"; by default this machine's own.
        device: which device to tune on.
        partition: how the share is made real: "green", "mps", "mig", "cores", "full" or "auto".
        trials: candidates to build and measure; by default the effort's.
        time: the time that the whole run may take, in seconds or as "10m".
        import_timeout: the time that the import of one model may take; 10 minutes by default.
        effort: preset of trials and search size: "quick", "default" or "full".
        patience: stop after so many trials without a gain; 0 never stops early.
        output: the folder to write; by default `MODEL.tuned` in the current folder.
        db: folder of the record store.
        inputs: shapes of inputs with dynamic dimensions, by name: `{"data": (1, 3, 224, 224)}`;
            several, `{"data": [(1, 3, 224, 224), (1, 3, 320, 320)]}`: the library takes each of them.
        batch: sizes of a dynamic first dimension to tune for: `4`, `"1,4"`, `(1, 4)`; the library
            takes any batch up to the largest.
        dtype: "float16" converts a float32 model; "tf32" lets its products be computed in TF32.
        seed: of the search and of the inputs.
        resume: start from the records of earlier runs.
        verify: check the numbers of what is exported against the original file.
        verify_inputs: an `.npz` file with an array for each input, to verify with besides random ones.
        slices: how many parts of the device measure side by side; 0: one for each model.
        exclusive: measure one candidate at a time, always alone.
        ray: spread the search over a Ray cluster: "auto" or "HOST:PORT".
        dry_run: list tasks and budget, measure and write nothing.

    Returns:
        The library for the first share asked for, ready to be called; None after a dry run.

    Raises:
        UserError: an option or the model cannot be used.
        SetupError: the machine lacks something.
    """
    options = {name: value for name, value in locals().items() if name != "model"}
    libraries = tune_many([model], **options)
    return libraries[0] if libraries else None


def tune_many(models: Sequence[str | Path], **options: object) -> list[Library]:
    """Tune several models at the same time, each for its share of one device, and load them.

    Args:
        models: paths of ONNX files.
        **options: as for `tune`; `gpu_pct` is one percentage for all models or one for each, and
            equal parts of the device without it. `share="auto"` divides it by the models' work.
            `output` is a folder for all of the libraries.

    Returns:
        A library for each model, in their order; none after a dry run.

    Raises:
        UserError: an option or a model cannot be used.
        SetupError: the machine lacks something.
    """
    finished = [e for e in tune_jobs(make_jobs(models, **options)) if isinstance(e, Finished)]
    if not finished:
        return []
    from gpu_aware_tune.library import load

    return [
        load(outcome.output, units=outcome.shares[0].units)
        for outcome in finished
        if outcome.output is not None
    ]


def tune_events(
    model: str | Path | Sequence[Path], settings: Settings, stop: StopRequest | None = None
) -> Iterator[Event]:
    """Tune one model or several, reporting what happens; see `tune_jobs`."""
    models = [Path(model)] if isinstance(model, str | Path) else list(model)
    return tune_jobs(divide(models, settings), stop)


def tune_jobs(job: TuningJob, stop: StopRequest | None = None) -> Generator[Event, None, None]:
    """Tune models: a generator of `events` that ends with one `Finished` for each.

    Closing it early, or an error, ends every worker; what was measured is on disk by then.

    Args:
        job: what `make_jobs` returned.
        stop: its `request()` ends the search and exports the best so far.
    """
    from gpu_aware_tune.run.session import Session

    settings = job.settings
    for goal in job.goals:
        check_files(goal, settings)
    if job.goals[0].has_sizes:
        yield from _tune_sizes(job, stop)
        return
    with Session(settings, stop) as session:
        # Here, because they need TVM, which the process that the session has just started loads, too.
        from gpu_aware_tune.workers.warm import load_tvm

        load_tvm()
        from gpu_aware_tune.finalize.retiming import measure_drift, retime
        from gpu_aware_tune.run.auto_share import choose_shares
        from gpu_aware_tune.run.check_stage import check_models, start_oracles
        from gpu_aware_tune.run.libraries import (
            build_libraries,
            choose_kernels,
            export_libraries,
            finish,
        )
        from gpu_aware_tune.run.models import import_models, plans, recall_models
        from gpu_aware_tune.run.search_stage import run_search, start_workers
        from gpu_aware_tune.run.time_budget import divide_time

        yield from session.find_device(job.goals)
        oracles = start_oracles(session, job.goals)
        models = yield from import_models(session, job.goals)
        models = yield from choose_shares(session, models)
        models, work, known = yield from recall_models(session, models, job.relatives)
        yield from plans(session, models, work, known)
        if settings.dry_run:
            return
        records = known.records
        seeded = [task for task, traces in known.seeds.items() if traces]
        workers = yield from start_workers(session, models, work, seeded=seeded)
        checked = yield from check_models(session, models, oracles, workers)
        workers = checked.workers
        shares = sum(len(model.shares) for model in models)
        times, notes = divide_time(session, checked.seconds, shares, bool(job.relatives))
        yield from notes
        found = yield from run_search(session, models, work, known, workers, times.search_s)
        yield Stage(StageName.RETIME, "measuring the best again, alone")
        pools = workers.pools
        reorders = yield from retime(
            work, found, records, settings, pools, times.retime_s, session.stop
        )
        drift = measure_drift(work, records, workers.pipeline, settings.measure_s)
        chosen = yield from choose_kernels(session, models, records, workers, checked.passed)
        built = yield from build_libraries(session, chosen, records, workers, times.rounds)
        exported = yield from export_libraries(session, built, checked.references, records, workers)
        yield from finish(session, exported, found, reorders, drift, records, workers)


def _tune_sizes(job: TuningJob, stop: StopRequest | None) -> Generator[Event, None, None]:
    """Tune a model for several sizes of its inputs, one after the other, into one folder."""
    from gpu_aware_tune.run.sizes import divide_sizes, merge_sizes, staging

    (goal,) = job.goals
    finished: dict[str, Finished] = {}
    relatives: dict[str, str] = {}  # of the first size: its kernels seed the others' search
    made: dict[int, Path] = {}
    with staging(goal.output) as folder:
        for number, size in enumerate(divide_sizes(job, folder)):
            yield Note(size.label)
            for event in tune_jobs(dataclasses.replace(size.job, relatives=relatives), stop):
                if isinstance(event, Planned) and not relatives:
                    relatives = {task.name: task.hash for task in event.tasks}
                if isinstance(event, Finished):
                    finished[size.label] = event
                    if event.output:
                        made[number] = event.output
                else:
                    yield event
        if made:
            merge_sizes(goal, made)
    for number, (label, event) in enumerate(finished.items()):
        output = goal.output if number in made else None
        yield dataclasses.replace(event, model=f"{goal.name}, {label}", output=output)
