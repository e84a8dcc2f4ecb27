"""Several batch sizes of a model: one run after the other, into one folder."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gpu_aware_tune.library.recovery import PARTIAL, beside
from gpu_aware_tune.run.jobs import ModelGoal, TuningJob

_FURTHER = (
    0.25  # of the first batch size's trials, for all others together: their kernels are alike
)


def divide_batches(job: TuningJob, folder: Path) -> dict[int, TuningJob]:
    """A run for each batch size of a job's only model.

    The time is divided evenly. Trials are those of one run for the smallest batch size, and a
    quarter as many for all others together, whose searches start from what the first one found.

    Args:
        job: whose goal has batch sizes.
        folder: for the results of the runs.

    Raises:
        UserError: the model has no dynamic batch.
    """
    from gpu_aware_tune.onnx_prepare import read_model
    from gpu_aware_tune.onnx_prepare.shapes import batch_shapes

    (goal,) = job.goals
    model, settings = read_model(goal.path), job.settings
    count = len(goal.batches)
    jobs = {}
    for number, batch in enumerate(goal.batches):
        trials = settings.trials
        if trials is not None and number:
            trials = math.ceil(trials * _FURTHER / (count - 1))
        time_s = None if settings.time_s is None else settings.time_s / count
        own: ModelGoal = dataclasses.replace(
            goal,
            output=folder / f"{goal.name}-{batch}",
            input_shapes=batch_shapes(model, batch, goal.input_shapes),
            batches=(),
        )
        limits = dataclasses.replace(settings, trials=trials, time_s=time_s)
        jobs[batch] = TuningJob(limits, (own,))
    return jobs


@contextmanager
def staging(output: Path) -> Generator[Path, None, None]:
    """A folder beside the output for the results of single batch sizes; removed in the end."""
    folder = beside(output.absolute(), PARTIAL).with_suffix(".batches")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
