"""What a run is to do: its settings, and for each model its goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.input_shapes import Shapes
from gpu_aware_tune.settings import (
    SHARES,
    Objective,
    RunSettings,
    Settings,
    ShareRule,
    make_settings,
    plain,
)


@dataclass(frozen=True)
class ModelGoal:
    """What a run is to make of one model.

    Args:
        path: its ONNX file.
        percents: of the device, one library each; none: the knee of the model's own curve, or a
            part of the device by its work (`by_work`).
        output: the folder to write.
        input_shapes: shapes of inputs with dynamic dimensions, by ONNX name.
        further_shapes: further sizes to tune it for, one after the other: shapes as `input_shapes`.
        dtype: to convert the model to first; see `Settings`.
        by_work: the share follows from its part of all models' work.
        verify_inputs: an `.npz` file of inputs to verify it with, besides random ones.
        batches: batch sizes to tune it for, one after the other; none: the one that it has.
    """

    path: Path
    percents: tuple[int, ...]
    output: Path
    input_shapes: Shapes = field(default_factory=dict)
    further_shapes: tuple[Shapes, ...] = ()
    dtype: str | None = None
    by_work: bool = False
    verify_inputs: Path | None = None
    batches: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The model's name: that of its file."""
        return self.path.stem

    @property
    def has_sizes(self) -> bool:
        """Whether it is to be tuned for several sizes of its inputs, into one folder."""
        return bool(self.batches or self.further_shapes)

    @property
    def at_knee(self) -> bool:
        """Whether its share is to be found on its curve."""
        return not self.percents and not self.by_work

    def as_dict(self) -> dict[str, Any]:
        """Returns the goal as plain JSON values, under the names that `Settings` has for them."""
        return {
            "gpu_pct": list(self.percents),
            "output": str(self.output),
            "input_shapes": plain(self.input_shapes),
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class TuningJob:
    """One run: what holds for all of it, and what each of its models gets.

    Args:
        settings: of the run.
        goals: one for each model.
        relatives: hashes of the kernels that the only model has at another batch size, by name; the
            search starts from their records.
    """

    settings: RunSettings
    goals: tuple[ModelGoal, ...]
    relatives: Mapping[str, str] = field(default_factory=dict)


def make_jobs(models: Sequence[str | Path], **options: Any) -> TuningJob:
    """Builds a run over one or several models; see `tune` for the options.

    With one model, all of `gpu_pct` are its shares. With several, `gpu_pct` is one percentage for
    all of them or one for each; without it they get equal parts.

    Raises:
        UserError: an option is wrong, or does not fit the models.
    """
    if len(models) > 1 and options.get("gpu_pct") is None and options.get("share") is None:
        options["share"] = ShareRule.EQUAL
    return divide([Path(model) for model in models], make_settings(**options))


def divide(models: Sequence[Path], settings: Settings) -> TuningJob:
    """Gives each model its part of the settings: its share and its output folder."""
    if not models:
        raise UserError("no model is named: give the path of one .onnx file or of several")
    if settings.share == ShareRule.KNEE and settings.dry_run:
        raise UserError("--gpu-pct auto measures, which --dry-run does not: give percentages")
    _check_sizes(models, settings)
    percents = _of_one(settings) if len(models) == 1 else _of_several(models, settings)
    goals = [
        ModelGoal(
            path=model,
            percents=each,
            output=_output(model, settings, alone=len(models) == 1),
            input_shapes=settings.input_shapes,
            further_shapes=settings.further_shapes,
            dtype=settings.dtype,
            by_work=settings.share == ShareRule.AUTO,
            verify_inputs=settings.verify_inputs,
            batches=settings.batches,
        )
        for model, each in zip(models, percents, strict=True)
    ]
    return TuningJob(settings, tuple(goals))


def _check_sizes(models: Sequence[Path], settings: Settings) -> None:
    """Refuse several sizes of the inputs where they have no meaning."""
    several = "--batch" if settings.batches else "--input with several shapes"
    if not settings.batches and not settings.further_shapes:
        return
    if len(models) > 1:
        raise UserError(f"{several} is for one model: tune the models one after the other")
    if settings.verify_inputs is not None:
        raise UserError(f"--verify-inputs holds inputs of one size: leave {several} out")
    if settings.batches and settings.further_shapes:
        raise UserError("--batch and --input with several shapes do not go together: leave one out")


def _of_one(settings: Settings) -> list[tuple[int, ...]]:
    """The shares of the only model."""
    if settings.objective != Objective.SHARE and len(set(settings.gpu_pct)) == 1:
        raise UserError(
            f"--objective {settings.objective} compares shares: give several, such as"
            " --gpu-pct 10,30,100"
        )
    if settings.share in SHARES:
        raise UserError(
            f"--share {settings.share} divides a device between several models: give --gpu-pct"
        )
    if settings.share == ShareRule.KNEE:
        return [()]
    return [tuple(dict.fromkeys(settings.gpu_pct))]


def _of_several(models: Sequence[Path], settings: Settings) -> list[tuple[int, ...]]:
    """The share of each model, none where it is found out later."""
    if settings.objective != Objective.SHARE:
        raise UserError(
            f"--objective {settings.objective} is for one model on several shares: tune the models"
            " one after the other"
        )
    stems = [model.stem for model in models]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(
                f"several models are called {stem!r}, and so would their folders be: rename one"
            )
    if settings.share in (ShareRule.KNEE, ShareRule.AUTO):
        return [()] * len(models)
    percents = settings.gpu_pct
    if settings.share == ShareRule.EQUAL:
        percents = (max(1, 100 // len(models)),)
    if len(percents) not in (1, len(models)):
        raise UserError(
            f"--gpu-pct gives {len(percents)} shares for {len(models)} models:"
            " give one for all of them, or one for each"
        )
    each = percents * len(models) if len(percents) == 1 else percents
    return [(percent,) for percent in each]


def _output(model: Path, settings: Settings, alone: bool) -> Path:
    """A model's folder: what was asked for, of several models one below it, or here."""
    name = f"{model.stem}.tuned"
    if settings.output is None:
        return Path(name)
    return settings.output if alone else settings.output / name
