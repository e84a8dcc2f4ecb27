"""The last stages of a run, model by model: kernels chosen, libraries compiled, timed, exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.events import (
    Event,
    Finished,
    Level,
    Note,
    Origin,
    ShareResult,
    Stage,
    StageName,
)
from gpu_aware_tune.finalize.library_build import (
    LibrarySpec,
    compile_all,
    compile_together,
    run_on,
    time_on,
    traces_of,
)
from gpu_aware_tune.finalize.oracle import Reference
from gpu_aware_tune.finalize.results import (
    losses,
    manifest,
    reordered,
    share_results,
    task_results,
)
from gpu_aware_tune.finalize.retiming import Reorder
from gpu_aware_tune.finalize.selection import Choice, choose
from gpu_aware_tune.finalize.verify import (
    AS_ORACLE,
    VerifyReport,
    base_error,
    compare,
    computed_in,
)
from gpu_aware_tune.partition import Device
from gpu_aware_tune.records.task_records import TaskRecords
from gpu_aware_tune.run.models import ImportedModel, target_of
from gpu_aware_tune.run.search_stage import RunWorkers
from gpu_aware_tune.run.session import Session
from gpu_aware_tune.search.objectives import most_throughput
from gpu_aware_tune.search.stage import SearchResult
from gpu_aware_tune.settings import Objective

TUNED, UNTUNED = "tuned", "untuned"


@dataclass(frozen=True)
class ChosenModel:
    """A model with the kernel of each task on each share."""

    imported: ImportedModel
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class BuiltModel:
    """A model's compiled and timed libraries.

    Args:
        imported: the model, on the shares that are kept.
        choices: the kernels in the libraries that are kept.
        files: by TUNED or UNTUNED, and units.
        latency_s: of one inference, by the same.
        losses: what one set of kernels for all shares costs, by units; see `results.losses`.
    """

    imported: ImportedModel
    choices: tuple[Choice, ...]
    files: Mapping[tuple[str, int], Path]
    latency_s: Mapping[tuple[str, int], float]
    losses: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportedModel:
    """A model whose folder is on disk; `shares` are its results."""

    built: BuiltModel
    shares: tuple[ShareResult, ...]


def choose_kernels(
    session: Session,
    models: Sequence[ImportedModel],
    records: TaskRecords,
    workers: RunWorkers,
    passed: Collection[tuple[str, str]] = (),
) -> Generator[Event, None, tuple[ChosenModel, ...]]:
    """Choose each task's kernel for each share of each model, numerically verified.

    Args:
        passed: kernels, as (task hash, trace), that have been verified already.
    """
    target = target_of(models, session.device)
    chosen = []
    for model in models:
        choices = yield from choose(
            model.tasks,
            model.units,
            records,
            workers.baselines,
            workers.pools.builders,
            session.settings,
            target,
            passed,
        )
        chosen.append(ChosenModel(model, choices))
    return tuple(chosen)


def build_libraries(
    session: Session,
    chosen: Sequence[ChosenModel],
    records: TaskRecords,
    workers: RunWorkers,
    rounds: int,
) -> Generator[Event, None, tuple[BuiltModel, ...]]:
    """Compile each model's libraries side by side, then time them one at a time inside their shares.

    Args:
        rounds: in which the libraries of a share take turns.
    """
    yield Stage(StageName.LIBRARY, "compiling and timing the library")
    specs = [s for model in chosen for s in _specs(model, session.device, records, workers)]
    paths = compile_all(specs, workers.pools.builders, session.compiled)
    built = []
    for model in chosen:
        files = {key[1:]: path for key, path in paths.items() if key[0] == model.imported.name}
        built.append((yield from _timed(session, model, files, records, workers, rounds)))
    return tuple(built)


def _specs(
    model: ChosenModel,
    device: Device,
    records: TaskRecords,
    workers: RunWorkers,
    names: Sequence[str] = (TUNED, UNTUNED),
) -> list[LibrarySpec]:
    """Each share's library, and the untuned one to compare with."""
    imported = model.imported
    own = {task.hash: workers.baselines[task.hash] for task in imported.tasks}
    specs = []
    for units in imported.units:
        traces = {
            TUNED: traces_of(model.choices, units),
            UNTUNED: records.baseline_traces(own, units),
        }
        target = device.target(units)
        specs += [LibrarySpec(imported.model, n, units, target, traces[n]) for n in names]
    return specs


def _timed(
    session: Session,
    model: ChosenModel,
    files: Mapping[tuple[str, int], Path],
    records: TaskRecords,
    workers: RunWorkers,
    rounds: int,
) -> Generator[Event, None, BuiltModel]:
    """Time the libraries before and after, each on its own partition; the faster one is kept.

    Kernels that are faster alone need not be so behind one another, in each other's caches.
    """
    objective, imported = session.settings.objective, model.imported
    weights = save_weights(session, imported)
    files, choices = dict(files), model.choices
    latency_s: dict[tuple[str, int], float] = {}
    for units in imported.units:
        pair = {name: path for (name, u), path in files.items() if u == units}
        partition = workers.pools.partition_of(units)
        spent = time_on(session.host, partition, pair, weights, imported.model, rounds)
        if spent[UNTUNED] < spent[TUNED] and not objective.one_set:  # one set stays one set
            files[TUNED, units] = files[UNTUNED, units]
            baselines = workers.baselines
            choices = tuple(
                _untuned(c, records, baselines) if c.units == units else c for c in choices
            )
            yield Note(
                f"{imported.name}, {units} units: the whole model is faster untuned"
                f" ({1e3 * spent[UNTUNED]:.2f} ms) than tuned ({1e3 * spent[TUNED]:.2f} ms);"
                " the untuned kernels are kept",
                Level.WARNING,
            )
            spent[TUNED] = spent[UNTUNED]
        latency_s |= {(name, units): seconds for name, seconds in spent.items()}
    cost = losses(choices, records) if objective.one_set else {}
    built = BuiltModel(imported, choices, files, latency_s, cost)
    if objective == Objective.THROUGHPUT:
        built, note = _most_throughput(built, session.device)
        yield note
    return built


def _untuned(
    choice: Choice, records: TaskRecords, baselines: Mapping[str, Sequence[str]]
) -> Choice:
    """A choice with the baseline schedule in place of its kernel."""
    baseline = records.baseline(choice.task.hash, choice.units)
    trace = baseline.trace if baseline else next(iter(baselines[choice.task.hash]), "")
    seconds = (baseline.best_s or 0.0) if baseline else 0.0
    origin = Origin.BASELINE if trace else Origin.UNSCHEDULED
    return dataclasses.replace(choice, trace=trace, seconds=seconds, origin=origin)


def _most_throughput(built: BuiltModel, device: Device) -> tuple[BuiltModel, Note]:
    """Keep only the share with which the device serves most requests a second."""
    imported, total = built.imported, device.units_total
    latency_s = {units: built.latency_s[TUNED, units] for units in imported.units}
    best, rates = most_throughput(latency_s, total)
    told = ", ".join(
        f"{total // units} x {units} units: {rate:.0f}/s" for units, rate in rates.items()
    )
    shares = tuple(share for share in imported.shares if share.units == best)
    kept = dataclasses.replace(
        built,
        imported=dataclasses.replace(imported, shares=shares),
        choices=tuple(choice for choice in built.choices if choice.units == best),
    )
    return kept, Note(f"{imported.name}: throughput by share: {told}; kept {best} units")


def save_weights(session: Session, model: ImportedModel) -> Path:
    """Write a model's weights where the workers can read them."""
    from gpu_aware_tune.library import save_weights

    path = session.host.scratch / f"weights-{model.model.hash[:16]}.bin"
    if not path.exists():
        save_weights(model.model.weights, path)
    return path


def export_libraries(
    session: Session,
    built: Sequence[BuiltModel],
    references: Mapping[str, Reference],
    records: TaskRecords,
    workers: RunWorkers,
) -> Generator[Event, None, tuple[ExportedModel, ...]]:
    """Compile the shares of each model into one library, verify it, and write the folders.

    Args:
        references: what each model should compute, by name, where that is known.
    """
    yield Stage(StageName.VERIFY, "checking the library's numbers against the original file")
    several = [
        ChosenModel(model.imported, model.choices)
        for model in built
        if len(model.imported.units) > 1
    ]
    specs = [
        spec
        for model in several
        for spec in _specs(model, session.device, records, workers, (TUNED,))
    ]
    together = compile_together(specs, workers.pools.builders, session.host.scratch)
    workers.pools.builders.close()
    exported = []
    for model in built:
        path = together.get(model.imported.name)
        reference = references.get(model.imported.name)
        exported.append((yield from _export(session, model, path, reference, workers)))
    return tuple(exported)


def _export(
    session: Session,
    built: BuiltModel,
    together: Path | None,
    reference: Reference | None,
    workers: RunWorkers,
) -> Generator[Event, None, ExportedModel]:
    """Check the whole model's numbers on each share, then write the folder.

    Args:
        together: the library of all shares, None where there is one share.
        reference: what is right, None where nobody can say.
    """
    from gpu_aware_tune.library import export

    imported = built.imported
    files = {units: together or built.files[TUNED, units] for units in imported.units}
    entry = "main_{units}" if together else "main"
    reports: dict[int, VerifyReport] = {}
    if reference is not None:
        weights = save_weights(session, imported)
        base = base_error(imported.model, computed_in(imported.model))
        for units, path in files.items():
            where, main = workers.pools.partition_of(units), entry.format(units=units)
            given = run_on(session.host, where, path, main, weights, reference)
            report = reports[units] = compare(reference, given, base)
            if not report.ok:
                raise TuneError(
                    f"{imported.name}: the library for {units} units computes wrong numbers"
                    f" ({report.text}): not exported; its records are kept, run again with"
                    " --no-verify to look at it"
                )
            doubts = report.special != AS_ORACLE or report.undecided or report.unvarying
            level = Level.WARNING if doubts else Level.INFO
            yield Note(f"{imported.name}, {units} units: {report.text}", level)
    shares = share_results(imported.shares, built.latency_s, reports, built.losses)
    facts = manifest(
        session.device, session.backend, session.settings, imported.shares, shares, built.choices,
        reports,
    )  # fmt: skip
    export(imported.goal.output, imported.model, files, facts, entry)
    return ExportedModel(built, shares)


def finish(
    session: Session,
    exported: Sequence[ExportedModel],
    found: SearchResult,
    reorders: Mapping[tuple[str, int], Reorder],
    drift: Mapping[str, Mapping[str, float]],
    records: TaskRecords,
    workers: RunWorkers,
) -> Generator[Event, None, None]:
    """Close the runs' rows and say what came of each model."""
    pipeline = workers.pipeline
    core_s = session.core_seconds(pipeline.core_seconds(), pipeline.cores)
    elapsed_s = session.elapsed_s()
    for model in exported:
        imported, choices = model.built.imported, model.built.choices
        units, hashes = set(imported.units), {task.hash for task in imported.tasks}
        mine = [r for (task, count), r in reorders.items() if count in units and task in hashes]
        finished = Finished(
            model=imported.name,
            output=imported.goal.output,
            tasks=task_results(choices, records, found.trials),
            shares=model.shares,
            trials=found.trials_of[imported.name],
            elapsed_s=elapsed_s,
            interrupted=found.interrupted,
            failures=found.failures,
            core_seconds=core_s,
            stopped_by=found.stopped_by[imported.name],
            reordered=reordered(mine),
        )
        latency: dict[str, Any] = {f"{n}-{u}": s for (n, u), s in model.built.latency_s.items()}
        session.close_row(
            finished,
            drift=drift[imported.name],
            core_seconds=core_s,
            trials=finished.trials,
            latency_s=latency,
        )
        yield finished
