"""Several sizes of a model's inputs: one run after the other, into one folder."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpu_aware_tune.input_shapes import Shapes, shape_text
from gpu_aware_tune.library.batches import merge_batches
from gpu_aware_tune.library.recovery import PARTIAL, beside
from gpu_aware_tune.library.several_shapes import merge_shapes
from gpu_aware_tune.run.jobs import ModelGoal, TuningJob

_FURTHER = 0.25  # of the first size's trials, for all others together: their kernels are alike


@dataclass(frozen=True)
class Size:
    """One size: what people call it, and the run that tunes for it."""

    label: str
    job: TuningJob


def divide_sizes(job: TuningJob, folder: Path) -> list[Size]:
    """A run for each size of a job's only model.

    The time is divided evenly. Trials are those of one run for the first size, and a quarter as many
    for all others together, whose searches start from what the first one found.

    Args:
        job: whose goal has several sizes.
        folder: for the results of the runs.

    Raises:
        UserError: there are to be batches, and the model has no dynamic batch.
    """
    (goal,) = job.goals
    settings, shapes = job.settings, _shapes(goal)
    count = len(shapes)
    sizes = []
    for number, (label, own_shapes) in enumerate(shapes.items()):
        trials = settings.trials
        if trials is not None and number:
            trials = math.ceil(trials * _FURTHER / (count - 1))
        time_s = None if settings.time_s is None else settings.time_s / count
        own = dataclasses.replace(
            goal,
            output=folder / f"{goal.name}-{number}",
            input_shapes=own_shapes,
            batches=(),
            further_shapes=(),
        )
        limits = dataclasses.replace(settings, trials=trials, time_s=time_s)
        sizes.append(Size(label, TuningJob(limits, (own,))))
    return sizes


def _shapes(goal: ModelGoal) -> dict[str, Shapes]:
    """The shapes of the inputs for each size, by what it is called."""
    if goal.batches:
        from gpu_aware_tune.onnx_prepare import read_model
        from gpu_aware_tune.onnx_prepare.shapes import batch_shapes

        model = read_model(goal.path)
        return {
            f"batch {batch}": batch_shapes(model, batch, goal.input_shapes)
            for batch in goal.batches
        }
    sets = [goal.input_shapes, *goal.further_shapes]
    differ = [name for name in sets[0] if len({each[name] for each in sets}) > 1]
    return {" ".join(f"{name}:{shape_text(each[name])}" for name in differ): each for each in sets}


def merge_sizes(goal: ModelGoal, made: Mapping[int, Path]) -> None:
    """Put the folders of the sizes that there are, by their numbers, into the goal's one."""
    if goal.batches:
        merge_batches(goal.output, {goal.batches[number]: path for number, path in made.items()})
    else:
        merge_shapes(goal.output, list(made.values()))


@contextmanager
def staging(output: Path) -> Generator[Path, None, None]:
    """A folder beside the output for the results of single sizes; removed in the end."""
    folder = beside(output.absolute(), PARTIAL).with_suffix(".sizes")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
