"""Several shapes of the inputs in one folder, and the library that takes each of them.

The folder is that of the first shapes, and holds a whole folder for each further ones: `shape-2/`, ...
It is as with batch sizes (see `batches`), but nothing is divided or padded.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.input_shapes import Shape, shape_text
from gpu_aware_tune.library.arguments import check_inputs
from gpu_aware_tune.library.folder import move_inside, replacing
from gpu_aware_tune.library.latency import LatencyStats
from gpu_aware_tune.library.manifest import Manifest, read_manifest, write_manifest
from gpu_aware_tune.library.several_folders import SeveralFolders
from gpu_aware_tune.model.importer import TensorSpec


class ShapesLibrary(SeveralFolders):
    """A tuned model with code for several shapes of its inputs; a call runs the code for its own.

    `inputs` and `outputs` have -1 where the shapes differ.
    """

    def __init__(
        self, path: Path, manifest: Manifest, units: int | None, partition: str | None = None
    ) -> None:
        """Open the library for a share; the code of further shapes is opened when it is used."""
        further = shape_folders(path, manifest)
        super().__init__(path, manifest, units, partition, further)
        all_ = [manifest, *map(read_manifest, further)]
        self.inputs = _common([each.inputs for each in all_])
        self.outputs = _common([each.outputs for each in all_])
        self.folders = {
            tuple(spec.shape for spec in each.inputs): folder
            for each, folder in zip(all_, (path, *further), strict=True)
        }

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the model on inputs of shapes that it was tuned for.

        Args:
            inputs: as for `Library`.

        Raises:
            UserError: as for `Library`, or it was not tuned for these shapes together.
        """
        folder = self._folder(inputs)
        return super().__call__(inputs) if folder == self.path else self._at(folder)(inputs)

    def benchmark(
        self,
        repeat: int | None = None,
        seconds: float = 2.0,
        inputs: Mapping[str, Any] | None = None,
    ) -> LatencyStats:
        """Time inferences on inputs of shapes that it was tuned for, by default the first; see `Library`."""
        folder = self.path if inputs is None else self._folder(inputs)
        if folder == self.path:
            return super().benchmark(repeat, seconds, inputs)
        return self._at(folder).benchmark(repeat, seconds, inputs)

    def _folder(self, inputs: Mapping[str, Any]) -> Path:
        shapes = tuple(array.shape for array in check_inputs(self.inputs, inputs))
        if shapes not in self.folders:
            known = "; ".join(self._text(each) for each in self.folders)
            raise UserError(f"inputs {self._text(shapes)}: it was tuned for {known}")
        return self.folders[shapes]

    def _text(self, shapes: Sequence[Shape]) -> str:
        pairs = zip(self.inputs, shapes, strict=True)
        return " ".join(f"{spec.name}:{shape_text(shape)}" for spec, shape in pairs)


def shape_folders(path: Path, manifest: Manifest) -> list[Path]:
    """The folders of a folder's further shapes."""
    return [path / f"shape-{number}" for number in range(2, 2 + manifest.further_shapes)]


def merge_shapes(folder: Path, made: Sequence[Path]) -> None:
    """Put the folders of single shapes into one, in one step.

    Args:
        folder: the model's folder; one that is there is replaced.
        made: folders that `export` wrote, of one model; they are moved.

    Raises:
        UserError: `folder` is something else.
        SetupError: it cannot be written.
    """
    first, *further = made
    manifest = dataclasses.replace(read_manifest(first), further_shapes=len(further))
    with replacing(folder.absolute()) as fresh:
        for file in first.iterdir():
            shutil.move(file, fresh)
        write_manifest(fresh, manifest)
        for path, inside in zip(further, shape_folders(fresh, manifest), strict=True):
            move_inside(path, inside, fresh / manifest.weights.file)


def _common(sizes: Sequence[Sequence[TensorSpec]]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs with -1 where the sizes differ; ranks are the model's own."""
    return tuple(
        TensorSpec(
            specs[0].name,
            tuple(
                extents[0] if len(set(extents)) == 1 else -1
                for extents in zip(*(spec.shape for spec in specs), strict=True)
            ),
            specs[0].dtype,
        )
        for specs in zip(*sizes, strict=True)
    )
