"""Several batch sizes of a model in one folder.

The folder is that of the smallest batch size, and holds a whole folder for each further one:
`batch-4/`, ... Each has its code and its manifest; weights of the same content are one file with several
names (hard links), or copies where the file system has no links.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.folder import flush, put, writing
from gpu_aware_tune.library.manifest import Manifest, ModelId, read_manifest, write_manifest
from gpu_aware_tune.library.recovery import PARTIAL, beside, remove_stale
from gpu_aware_tune.settings import MANIFEST, check_replaceable


def batch_folder(folder: Path, batch: int) -> Path:
    """The folder of a further batch size inside a model's folder."""
    return folder / f"batch-{batch}"


def batch_folders(folder: Path) -> dict[int, Path]:
    """The folders of all batch sizes of a model's folder, by batch size, ascending.

    Raises:
        UserError: a manifest is missing or damaged.
    """
    manifest = read_manifest(folder)
    first = {batch_size(manifest): folder}
    return first | {batch: batch_folder(folder, batch) for batch in sorted(manifest.batches)}


def batch_size(manifest: Manifest) -> int:
    """The leading extent of the first input that has a shape."""
    return next((spec.shape[0] for spec in manifest.inputs if spec.shape), 1)


def check_batched(manifest: Manifest, path: Path) -> None:
    """Refuse a model whose outputs do not begin with the batch size: answers could not be divided.

    Raises:
        UserError: with the output.
    """
    batch = batch_size(manifest)
    for spec in (*manifest.inputs, *manifest.outputs):
        if spec.shape[:1] != (batch,):
            raise UserError(
                f"{path}: {spec.name!r} does not begin with the batch size {batch}, so batches cannot"
                " be put together or divided: tune without --batch"
            )


def merge_batches(folder: Path, made: Mapping[int, Path]) -> Path:
    """Put the folders of single batch sizes into one, in one step.

    Args:
        folder: the model's folder; one that is there is replaced.
        made: a folder that `export` wrote for each batch size; they are moved.

    Raises:
        UserError: `folder` is something else, or the model has no batch.
        SetupError: it cannot be written.
    """
    folder = folder.absolute()
    remove_stale(folder)
    check_replaceable(folder)
    smallest, *further = sorted(made)
    for path in made.values():
        check_batched(read_manifest(path), path)
    name = folder_name(read_manifest(made[smallest]).model.name, smallest)
    fresh = beside(folder, PARTIAL)
    with writing(folder):
        try:
            shutil.move(made[smallest], fresh)
            _rename(fresh, name, tuple(further))
            for batch in further:
                own = batch_folder(fresh, batch)
                shutil.move(made[batch], own)
                _rename(own, name, ())
                _share_weights(fresh, own)
            for path in (fresh / MANIFEST, *fresh.glob("*/*"), *fresh.glob("batch-*"), fresh):
                flush(path)
            put(fresh, folder)
            flush(folder.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def folder_name(model: str, batch: int) -> str:
    """A model's name without the batch size that a run for it alone has added."""
    return model.removesuffix(f"-{batch}")


def _rename(folder: Path, name: str, batches: tuple[int, ...]) -> None:
    manifest = read_manifest(folder)
    changed = dataclasses.replace(
        manifest, model=ModelId(name, manifest.model.hash), batches=batches
    )
    write_manifest(folder, changed)


def _share_weights(first: Path, other: Path) -> None:
    one, two = read_manifest(first).weights, read_manifest(other).weights
    if one.sha256 != two.sha256:
        return
    (other / two.file).unlink()
    try:
        os.link(first / one.file, other / two.file)
    except OSError:
        shutil.copyfile(first / one.file, other / two.file)
