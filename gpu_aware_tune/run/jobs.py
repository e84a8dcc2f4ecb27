"""Which models a run tunes, and what each of them gets of the settings: its share and its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.settings import KNEE, SHARES, Settings, make_settings

Job = tuple[Path, Settings]  # a model's file, and what to do with it


def make_jobs(models: Sequence[str | Path], **options: Any) -> list[Job]:
    """Builds the settings of each of several models; see `make_settings` for the options.

    With one model, all of `gpu_pct` are its shares. With several, `gpu_pct` is one percentage for
    all of them or one for each; without it they get equal parts.

    Raises:
        UserError: an option is wrong, or does not fit the models.
    """
    if len(models) > 1 and options.get("gpu_pct") is None and options.get("share") is None:
        options["share"] = "equal"
    return divide([Path(model) for model in models], make_settings(**options))


def divide(models: Sequence[Path], settings: Settings) -> list[Job]:
    """Gives each model its part of the settings: its share and its output folder."""
    if not models:
        raise UserError("no model is named: give the path of one .onnx file or of several")
    if settings.share == KNEE and settings.dry_run:
        raise UserError("--gpu-pct auto measures, which --dry-run does not: give percentages")
    if len(models) == 1:
        if settings.objective != "share" and len(set(settings.gpu_pct)) == 1:
            raise UserError(
                f"--objective {settings.objective} compares shares: give several, such as"
                " --gpu-pct 10,30,100"
            )
        if settings.share in SHARES:
            raise UserError(
                f"--share {settings.share} divides a device between several models: give --gpu-pct"
            )
        unique = tuple(dict.fromkeys(settings.gpu_pct))
        return [(models[0], dataclasses.replace(settings, gpu_pct=unique))]
    if settings.objective != "share":
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
    percents = settings.gpu_pct
    if settings.share == "equal":
        percents = (max(1, 100 // len(models)),)
    if len(percents) not in (1, len(models)):
        raise UserError(
            f"--gpu-pct gives {len(percents)} shares for {len(models)} models:"
            " give one for all of them, or one for each"
        )
    each = percents * len(models) if len(percents) == 1 else percents
    jobs = []
    for model, percent in zip(models, each, strict=True):
        output = settings.output and settings.output / f"{model.stem}.tuned"
        jobs.append((model, dataclasses.replace(settings, gpu_pct=(percent,), output=output)))
    return jobs
