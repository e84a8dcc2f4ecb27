"""The share to tune for where none is given: the knee of the untuned model's own curve."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

from gpu_aware_tune.events import Event, Note, Stage
from gpu_aware_tune.finalize.library_build import compile_all
from gpu_aware_tune.profiling.knee import choose_share
from gpu_aware_tune.profiling.profiles import profile_untuned, share_for
from gpu_aware_tune.run.jobs import Job
from gpu_aware_tune.run.session import Run

_GRID_PERCENT = tuple(range(10, 101, 10))


def with_share(job: Job) -> Generator[Event, None, Job]:
    """Measure the untuned model on every tenth of the device, and give the job the knee's share.

    The default schedules' records stay in the store, so the run itself need not measure them again.

    Returns:
        The job, its share chosen; a note says which and why.
    """
    path, settings = job
    curve_settings = dataclasses.replace(settings, share=None, gpu_pct=_GRID_PERCENT)
    with Run([(path, curve_settings)]) as run:
        yield from run.open_device()
        yield from run.load_models()
        yield from run.open_records()
        yield Stage("knee", "measuring the untuned model on several shares")
        yield from run.start_workers()
        yield from run.search.baseline()
        (model,) = run.models
        wanted = model.wanted(run.search, ("untuned",))
        made = compile_all(wanted, run.pools.builders, run.host.scratch)
        paths = {units: path for (_, _, units), path in made.items()}
        weights = model.save_weights(run.host)
        curve = profile_untuned(run.host, run.pools.partitions, paths, weights, model.model)
        percent, why = choose_share(curve.points)
        units = next(point.units for point in curve.points if point.percent == percent)
        share = share_for(run.device, model.backend, units)
    yield Note(f"{model.name}: tuned for {share.describe()}: {why}")
    return path, dataclasses.replace(settings, share=None, gpu_pct=(share.percent,))
