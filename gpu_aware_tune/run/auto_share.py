"""The share to tune for where none is given: the knee of the untuned model's own curve."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence

from gpu_aware_tune.events import Event, Note, Stage, StageName
from gpu_aware_tune.finalize.library_build import LibrarySpec, compile_all
from gpu_aware_tune.profiling.knee import choose_share
from gpu_aware_tune.profiling.profiles import profile_untuned, share_for
from gpu_aware_tune.run.libraries import UNTUNED, save_weights
from gpu_aware_tune.run.models import ImportedModel, recall_models, with_shares
from gpu_aware_tune.run.search_stage import measure_baseline, start_workers
from gpu_aware_tune.run.session import Session

_GRID_PERCENT = tuple(range(10, 101, 10))


def choose_shares(
    session: Session, models: Sequence[ImportedModel]
) -> Generator[Event, None, tuple[ImportedModel, ...]]:
    """Give each model without a share the one at its knee; a note says which and why.

    The untuned model is measured on every tenth of the device. The records of its baseline
    schedules stay in the store, so the run itself need not measure them again.
    """
    chosen = []
    for model in models:
        if model.goal.at_knee:
            model = yield from _at_knee(session, model)
        chosen.append(model)
    return tuple(chosen)


def _at_knee(session: Session, model: ImportedModel) -> Generator[Event, None, ImportedModel]:
    (on_grid,), work, known = yield from recall_models(
        session, [with_shares(model, _GRID_PERCENT, session)]
    )
    yield Stage(StageName.KNEE, "measuring the untuned model on several shares")
    workers = yield from start_workers(session, [on_grid], work, here=True)
    with workers.pools:
        yield from measure_baseline(session, work, known, workers)
        own = {task.hash: workers.baselines[task.hash] for task in on_grid.tasks}
        specs = [
            LibrarySpec(
                model.model,
                UNTUNED,
                units,
                session.device.target(units),
                known.records.baseline_traces(own, units),
            )
            for units in on_grid.units
        ]
        made = compile_all(specs, workers.pools.builders, session.compiled)
        paths = {units: path for (_, _, units), path in made.items()}
        weights = save_weights(session, model)
        curve = profile_untuned(session.host, workers.pools.partitions, paths, weights, model.model)
    percent, why = choose_share(curve.points)
    units = next(point.units for point in curve.points if point.percent == percent)
    share = share_for(session.device, session.backend, units)
    yield Note(f"{model.name}: tuned for {share.describe()}: {why}")
    return dataclasses.replace(
        model,
        goal=dataclasses.replace(model.goal, percents=(share.percent,)),
        shares=(share,),
    )
