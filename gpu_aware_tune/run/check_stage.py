"""Checked before anything is searched: does the imported model compute what the user's file does?

Each model's baseline library is compiled and run once inside its share, on every draw of inputs. What
is wrong or does not compile is reported before the search starts.
"""

from __future__ import annotations

import dataclasses
import select
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import TuneError, UserError
from gpu_aware_tune.events import Event, Level, Note, Stage, StageName
from gpu_aware_tune.finalize import oracle
from gpu_aware_tune.finalize.library_build import LibrarySpec, compile_all, run_on
from gpu_aware_tune.finalize.locate import locate
from gpu_aware_tune.finalize.oracle import Reference
from gpu_aware_tune.finalize.selection import check_kernel
from gpu_aware_tune.finalize.verify import VerifyReport, base_error, compare, computed_in
from gpu_aware_tune.measure.measurement import Failure
from gpu_aware_tune.model.tasks import Task
from gpu_aware_tune.run.jobs import ModelGoal
from gpu_aware_tune.run.libraries import save_weights
from gpu_aware_tune.run.models import ImportedModel
from gpu_aware_tune.run.search_stage import RunWorkers
from gpu_aware_tune.run.session import Session
from gpu_aware_tune.workers import Worker

_ORACLE_LIMIT_S = 600.0

Baselines = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Checked:
    """What the check before the search came to.

    Args:
        references: what each model should compute, by name; none for models that no oracle can run.
        workers: the run's, without baseline schedules that compute wrong numbers.
        passed: kernels, as (task hash, trace), that ran in a library that is right.
        seconds: that compiling and running the libraries took: the end of the run will take about
            as long again.
    """

    references: Mapping[str, Reference]
    workers: RunWorkers
    passed: frozenset[tuple[str, str]]
    seconds: float


def start_oracles(session: Session, goals: Sequence[ModelGoal]) -> dict[str, Worker]:
    """Start an oracle for each model: a process that runs its original file while it is imported here."""
    if not session.settings.verify or session.settings.dry_run:
        return {}
    return {
        goal.name: session.host.spawn(
            oracle.serve,
            goal.path.absolute(),
            dict(goal.input_shapes),
            session.settings.seed,
            goal.verify_inputs and goal.verify_inputs.absolute(),
            goal.dtype,
        )
        for goal in goals
    }


def check_models(
    session: Session,
    models: Sequence[ImportedModel],
    oracles: Mapping[str, Worker],
    workers: RunWorkers,
) -> Generator[Event, None, Checked]:
    """Compile each model with its baseline schedules, and compare it with its original file.

    Raises:
        TuneError: a model does not compile, crashes, or computes wrong numbers, with the node where
            they first differ.
    """
    yield Stage(StageName.CHECK, "checking the imported model against the original file")
    references: dict[str, Reference] = {}
    for model in models:
        if model.name in oracles:
            reference = _answer(oracles[model.name])
            if isinstance(reference, UserError):  # of the inputs that the user gave
                raise reference
            if isinstance(reference, TuneError):
                yield Note(f"{model.name}: not verified: {reference}", Level.WARNING)
            else:
                references[model.name] = reference
    begun = time.monotonic()
    for model in models:
        workers = yield from _checked(session, model, references.get(model.name), workers)
    passed = {
        item
        for model in models
        if model.name in references
        for item in _first_of(workers.baselines, model).items()
    }
    return Checked(references, workers, frozenset(passed), time.monotonic() - begun)


def _answer(worker: Worker) -> Reference | TuneError:
    """What an oracle found, or why there is nothing."""
    why = f"the original file was not run within {_ORACLE_LIMIT_S:.0f} s"
    try:
        if select.select([worker], [], [], _ORACLE_LIMIT_S)[0]:
            answer: Reference | TuneError = worker.recv()
            worker.kill()
            return answer
    except EOFError:
        why = "running the original file failed"
    return TuneError(f"{why} ({worker.kill().text})")


def _checked(
    session: Session, model: ImportedModel, reference: Reference | None, workers: RunWorkers
) -> Generator[Event, None, RunWorkers]:
    """Check one model; returns the workers without baseline schedules that are wrong."""
    first = _first_of(workers.baselines, model)
    library = _compiled(session, model, first, workers)
    if reference is None:
        return workers
    report, problem = _compared(session, model, library, reference, workers)
    if report is not None and report.ok:
        yield Note(f"{model.name}: imported as the original file computes it: {report.text}")
        return workers
    unscheduled, why = None, ""
    if session.device.kind != "cuda":
        plain = _compiled(session, model, {}, workers)
        unscheduled, why = _compared(session, model, plain, reference, workers)
    if unscheduled is not None and unscheduled.ok:
        workers, dropped = _without_wrong(session, model, workers)
        if dropped:
            yield Note(
                f"{model.name}: baseline schedules of {', '.join(dropped)} compute wrong numbers;"
                " left out",
                Level.WARNING,
            )
            return (yield from _checked(session, model, reference, workers))
    shown = unscheduled or report
    text = shown.text if shown is not None else why or problem
    where = _located(session, model, reference, workers)
    raise TuneError(
        f"{model.name}: the imported model computes wrong numbers: {where}; {text}; nothing was"
        " searched: report the model, or run with --no-verify to go on all the same"
    )


def _first_of(baselines: Baselines, model: ImportedModel) -> dict[str, str]:
    """The most promising baseline schedule of each task; unscheduled kernels are left out."""
    first = {task.hash: next(iter(baselines[task.hash]), "") for task in model.tasks}
    return {task: trace for task, trace in first.items() if trace}


def _compiled(
    session: Session, model: ImportedModel, traces: Mapping[str, str], workers: RunWorkers
) -> Path:
    units = max(model.units)
    spec = LibrarySpec(model.model, "baseline", units, session.device.target(units), traces)
    (path,) = compile_all([spec], workers.pools.builders, session.compiled).values()
    return path


def _compared(
    session: Session,
    model: ImportedModel,
    library: Path,
    reference: Reference,
    workers: RunWorkers,
) -> tuple[VerifyReport | None, str]:
    """A library against the oracle, inside the model's largest share; or how it failed to run."""
    partition = workers.pools.partition_of(max(model.units))
    weights = save_weights(session, model)
    try:
        outputs = run_on(session.host, partition, library, "main", weights, reference)
    except TuneError as error:
        return None, str(error)
    base = base_error(model.model, computed_in(model.model))
    return compare(reference, outputs, base), ""


def _without_wrong(
    session: Session, model: ImportedModel, workers: RunWorkers
) -> tuple[RunWorkers, list[str]]:
    """Leave out the model's baseline schedules that compute something else than their kernel."""
    target, seed = dict(workers.pools.target), session.settings.seed
    calls: dict[tuple[str, str], tuple[Any, tuple[Any, ...]]] = {
        (task.hash, trace): (check_kernel, (task.module_json, trace, target, seed))
        for task in model.tasks
        for trace in workers.baselines[task.hash]
        if trace
    }
    wrong = {
        name
        for name, answer in workers.pools.builders.call_all(calls)
        if isinstance(answer, Failure) or answer is not None
    }
    names = {task.hash: task for task in model.tasks}
    kept = {
        task: tuple(trace for trace in traces if (task, trace) not in wrong)
        for task, traces in workers.baselines.items()
    }
    dropped = sorted({_name(names[task]) for task, _ in wrong})
    return dataclasses.replace(workers, baselines=kept), dropped


def _name(task: Task) -> str:
    return task.name


def _located(
    session: Session, model: ImportedModel, reference: Reference, workers: RunWorkers
) -> str:
    """Which node is at fault, as far as that can be found out."""
    goal = model.goal
    args = (
        goal.path.absolute(),
        dict(goal.input_shapes),
        goal.dtype,
        reference.plan,
        dict(workers.pools.target),
    )
    for _, answer in workers.pools.builders.call_all({"locate": (locate, args)}):
        if isinstance(answer, str):
            return answer
        return f"the node was not found ({answer.text})"
    return "the node was not found"
