"""Goals -> imported models: their kernels as tasks, and the units that their shares come to."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.events import Event, Level, Note, Planned, Stage, StageName, TaskPlan
from gpu_aware_tune.partition import Device, Share, share_of
from gpu_aware_tune.records.store import RecordKey, damaged_text
from gpu_aware_tune.records.task_records import TaskRecords
from gpu_aware_tune.run.import_child import import_apart
from gpu_aware_tune.run.jobs import ModelGoal
from gpu_aware_tune.run.session import Session
from gpu_aware_tune.search.allocation import Goal
from gpu_aware_tune.search.task_set import (
    Known,
    TaskSet,
    allocation_of,
    heaviest_first,
    recall,
    with_relatives,
)

if TYPE_CHECKING:
    from gpu_aware_tune.model.importer import Model
    from gpu_aware_tune.model.tasks import Task


@dataclass(frozen=True)
class ImportedModel:
    """A model ready to be tuned for its shares.

    Args:
        goal: what was asked for.
        model: the fused module.
        tasks: its unique kernels, heaviest first.
        shares: of the device, in the order asked for; none while they are to be found out.
    """

    goal: ModelGoal
    model: Model
    tasks: tuple[Task, ...]
    shares: tuple[Share, ...] = ()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.goal.name

    @property
    def units(self) -> tuple[int, ...]:
        """The number of units of each share."""
        return tuple(share.units for share in self.shares)

    @property
    def work(self) -> float:
        """Floating point operations of one inference."""
        return sum(task.flops * task.weight for task in self.tasks)


def import_models(
    session: Session, goals: Sequence[ModelGoal]
) -> Generator[Event, None, tuple[ImportedModel, ...]]:
    """Import the ONNX files, list their kernels, and give each model its units."""
    models = []
    for goal in goals:
        yield Stage(StageName.MODEL, f"importing {goal.path.name}")
        model = _import(goal, session)
        for note in model.model.notes:
            yield Note(f"{model.name}: {note}")
        models.append(model)
    total = sum(model.work for model in models) or 1.0
    shared = []
    for model in models:
        percents = model.goal.percents
        if model.goal.by_work:
            percents = (max(1, int(100 * model.work / total)),)
        given = with_shares(model, percents, session)
        if len(given.shares) < len(percents):
            yield Note("some shares come to the same units: each number of units is tuned once")
        shared.append(given)
    return tuple(shared)


def with_shares(model: ImportedModel, percents: Sequence[int], session: Session) -> ImportedModel:
    """The model on these shares of the device, each number of units once."""
    shares = [share_of(session.device, percent, session.backend) for percent in percents]
    unique = {share.units: share for share in shares}
    return dataclasses.replace(model, shares=tuple(unique.values()))


def _import(goal: ModelGoal, session: Session) -> ImportedModel:
    import tvm

    from gpu_aware_tune.model.tasks import extract

    target = session.device.target(session.device.units_total)
    model = import_apart(session, goal.path, target, goal.input_shapes, goal.dtype)
    return ImportedModel(goal, model, tuple(extract(model, tvm.target.Target(dict(target)))))


def target_of(models: Sequence[ImportedModel], device: Device) -> Mapping[str, Any]:
    """JSON of the target that kernels are compiled for during the search."""
    return device.target(max(units for model in models for units in model.units))


def recall_models(
    session: Session, models: Sequence[ImportedModel], relatives: Mapping[str, str] | None = None
) -> Generator[Event, None, tuple[tuple[ImportedModel, ...], TaskSet, Known]]:
    """Keep the models' tasks in the store, and read what it holds of them.

    Args:
        relatives: see `TuningJob`.

    Returns:
        The models, without tasks whose hash the store already uses for a different kernel; what is
        to be searched; what is known of that.
    """
    yield Stage(StageName.RECORDS, "reading what is known")
    kept = []
    for model in models:
        kept.append((yield from _with_known_tasks(session, model)))
    goals = [
        Goal(model.name, units, {task.hash: task.weight for task in model.tasks})
        for model in kept
        for units in model.units
    ]
    work = TaskSet(heaviest_first([task for m in kept for task in m.tasks]), tuple(goals))
    records = TaskRecords(session.store, _keys(session, kept))
    known = recall(work, records, session.settings.resume)
    known = with_relatives(known, work, relatives or {})
    if session.store.damaged:
        yield Note(damaged_text(session.store), Level.WARNING)
    return tuple(kept), work, known


def _with_known_tasks(
    session: Session, model: ImportedModel
) -> Generator[Event, None, ImportedModel]:
    """Keep a model's tasks in the store; of two different kernels with one hash only the first."""
    from gpu_aware_tune.records.tvm_database import adopt_task, args_json, is_same_task

    unfit = 0
    tasks = []
    for task in model.tasks:
        if not is_same_task(session.store, task.module):
            yield Note(f"{task.name} stays untuned: another kernel has its hash", Level.WARNING)
            continue
        tasks.append(task)
        if not session.settings.dry_run:
            args = args_json(task.module)
            session.store.add_task(task.hash, task.name, task.module_json, args)
            unfit += adopt_task(session.store, task.module)
    if unfit:
        yield Note(f"{model.name}: {unfit} schedules in the records do not fit; left out")
    return dataclasses.replace(model, tasks=tuple(tasks))


def _keys(session: Session, models: Sequence[ImportedModel]) -> Mapping[tuple[str, int], RecordKey]:
    import tvm

    from gpu_aware_tune.records.tvm_database import target_text

    device = session.device
    text = target_text(tvm.target.Target(dict(target_of(models, device))))
    return {
        (task.hash, units): RecordKey(task.hash, device.key, units, text, tvm.__version__)
        for model in models
        for task in model.tasks
        for units in model.units
    }


def plans(
    session: Session, models: Sequence[ImportedModel], work: TaskSet, known: Known
) -> list[Planned]:
    """What is known and what is left to do, for each model."""
    settings = session.settings
    allocation = allocation_of(work, known, settings)
    planned = []
    for model in models:
        limit = settings.trials if settings.trials is not None else 1 << 30
        left = max(0, limit - known.spent[model.name])
        forecast = allocation.planned(left, model.name)
        tasks = tuple(
            TaskPlan(
                name=task.name,
                hash=task.hash,
                weight=task.weight,
                flops=task.flops,
                planned_trials=forecast[task.hash] if settings.trials else 0,
                known=allocation.trials(task.hash),
            )
            for task in model.tasks
        )
        planned.append(
            Planned(
                model=model.name,
                device=session.device.name,
                shares=tuple(share.describe() for share in model.shares),
                units=model.units,
                backend=session.backend,
                tasks=tasks,
                trials=settings.trials or 0,
                time_s=settings.time_s,
                dry_run=settings.dry_run,
            )
        )
    return planned
