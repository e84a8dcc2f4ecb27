"""What can be known in a second, checked before anything costs time: files and folders of a run."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.run.jobs import ModelGoal
from gpu_aware_tune.settings import RunSettings, check_replaceable
from gpu_aware_tune.workers import scratch_place

_LIBRARY_BYTES = 32 << 20  # code, besides the weights
_RECORDS_BYTES = 16 << 20
_SCRATCH_BYTES = 24 << 20  # artifacts and libraries, besides the weights


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
        weights = _bytes_of(model)
        _check_writable("-o", goal.output, _LIBRARY_BYTES + 2 * weights)
        _check_writable("--db", settings.db, _RECORDS_BYTES)
        _check_scratch(_SCRATCH_BYTES + 2 * weights)
        if goal.verify_inputs is not None and not goal.verify_inputs.is_file():
            raise UserError(
                f"--verify-inputs {str(goal.verify_inputs)!r} is no file: give an .npz file with an"
                " array for each input"
            )


def _bytes_of(model: Path) -> int:
    """The size of a model, with the external data that may lie beside it."""
    beside = [*model.parent.glob(f"{model.name}*data"), *model.parent.glob(f"{model.stem}*.data")]
    return sum(path.stat().st_size for path in {model, *beside} if path.is_file())


def _check_scratch(needed: int) -> None:
    """Sees whether the temporary files of a run find room: artifacts, libraries, and their weights."""
    try:
        place = scratch_place()
        lack = _lack(place, needed)
    except OSError as error:
        raise SetupError(f"no folder for temporary files: {error.strerror}: set TMPDIR") from error
    if lack:
        raise SetupError(f"temporary files in {str(place)!r}: {lack}: free space or set TMPDIR")


def _check_writable(flag: str, folder: Path, needed: int) -> None:
    """Tries to write next to or in `folder`, as permissions alone do not tell (root, /proc).

    Args:
        needed: bytes that have to be free there.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".tune-", dir=existing):
            reason = _lack(existing, needed)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise SetupError(
            f"{flag} {str(folder)!r} cannot be written ({reason}): give a folder you may write to"
        )


def _lack(folder: Path, needed: int) -> str:
    """What a folder lacks of the bytes that are needed there; "" where they find room."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return ""
    return f"{free >> 20} MiB are free there, about {needed >> 20} MiB are needed"
