"""Several batch sizes of a model in one folder.

The folder is that of the smallest batch size, and holds a whole folder for each further one:
`batch-4/`, ... Each has its code and its manifest; weights of the same content are one file with several
names (hard links), or copies where the file system has no links.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.folder import move_inside, replacing
from gpu_aware_tune.library.manifest import Manifest, read_manifest, write_manifest
from gpu_aware_tune.model.importer import TensorSpec


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
    """How many rows a folder's code takes at once."""
    return leading_extent(spec.shape for spec in manifest.inputs)


def leading_extent(shapes: Iterable[Sequence[int]]) -> int:
    """The batch size: the first extent of the first input that has a shape; 1 where none has."""
    return next((int(shape[0]) for shape in shapes if shape), 1)


def is_batched(manifest: Manifest) -> bool:
    """Whether every input and output begins with the batch size."""
    return _unbatched(manifest) is None


def check_batched(manifest: Manifest, path: Path) -> None:
    """Refuse a model whose outputs do not begin with the batch size: answers could not be divided.

    Raises:
        UserError: with the input or output.
    """
    spec = _unbatched(manifest)
    if spec is not None:
        raise UserError(
            f"{path}: {spec.name!r} does not begin with the batch size {batch_size(manifest)}, so"
            " batches cannot be put together or divided: tune without --batch"
        )


def open_ended(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of any number of rows."""
    return tuple(TensorSpec(spec.name, (-1, *spec.shape[1:]), spec.dtype) for spec in specs)


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
    smallest, *further = sorted(made)
    manifests = {batch: read_manifest(path) for batch, path in made.items()}
    for batch, path in made.items():
        check_batched(manifests[batch], path)
    first = manifests[smallest]
    with replacing(folder) as fresh:
        for file in made[smallest].iterdir():
            shutil.move(file, fresh)
        write_manifest(fresh, dataclasses.replace(first, batches=tuple(further)))
        for batch in further:
            move_inside(made[batch], batch_folder(fresh, batch), fresh / first.weights.file)
    return folder


def _unbatched(manifest: Manifest) -> TensorSpec | None:
    """The first input or output that does not begin with the batch size."""
    batch = batch_size(manifest)
    specs = (*manifest.inputs, *manifest.outputs)
    return next((spec for spec in specs if spec.shape[:1] != (batch,)), None)
