"""What can be known in a second, checked before anything costs time: files and folders of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.run.jobs import ModelGoal
from gpu_aware_tune.settings import RunSettings, check_replaceable


def check_files(goal: ModelGoal, settings: RunSettings) -> None:
    """Checks, before anything costs time, that the model can be read and the results written.

    A dry run writes nothing, not even to see whether it could.

    Raises:
        UserError: the model is not a readable file, or the output folder is something else.
        SetupError: the output or the record store's folder cannot be written.
    """
    model = goal.path
    if model.is_dir():
        raise UserError(f"model {str(model)!r} is a folder: give the path of a .onnx file")
    try:
        with model.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise UserError(
            f"model {str(model)!r} cannot be read ({error.strerror}): give the path of a .onnx file"
        ) from error
    if empty:
        raise UserError(f"model {str(model)!r} is empty: give the path of a .onnx file")
    if not settings.dry_run:
        check_replaceable(goal.output)
        _check_writable("-o", goal.output)
        _check_writable("--db", settings.db)


def _check_writable(flag: str, folder: Path) -> None:
    """Tries to write next to or in `folder`, as permissions alone do not tell (root, /proc)."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".tune-", dir=existing):
            return
    except OSError as error:
        reason = error.strerror
    raise SetupError(
        f"{flag} {str(folder)!r} cannot be written ({reason}): give a folder you may write to"
    )
