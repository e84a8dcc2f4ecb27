"""A library for several batch sizes: it takes any number of rows, and divides or pads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.arguments import check_inputs
from gpu_aware_tune.library.batches import batch_folders, check_batched, open_ended
from gpu_aware_tune.library.manifest import Manifest
from gpu_aware_tune.library.several_folders import SeveralFolders


class BatchedLibrary(SeveralFolders):
    """A tuned model with code for several batch sizes.

    Called with any number of rows (from 1 on) it runs batches of the sizes that it has: the largest as
    long as that many rows are left, then the smallest that holds the rest, whose missing rows repeat the
    last one. `use` and `preload` are for all batch sizes, `benchmark` for the smallest one.
    """

    def __init__(
        self, path: Path, manifest: Manifest, units: int | None, partition: str | None = None
    ) -> None:
        """Open the library for a share; the code of further batch sizes is opened when it is used."""
        self.batches = batch_folders(path)
        further = [folder for folder in self.batches.values() if folder != path]
        super().__init__(path, manifest, units, partition, further)
        check_batched(manifest, path)
        self.inputs, self.outputs = open_ended(self.inputs), open_ended(self.outputs)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the model on any number of rows, the first extent of every input and output.

        Args:
            inputs: as for `Library`.

        Raises:
            UserError: as for `Library`, or the inputs differ in their numbers of rows.
        """
        arrays = check_inputs(self.inputs, inputs)
        rows = {len(array) for array in arrays}
        if len(rows) > 1 or 0 in rows:
            counts = ", ".join(
                f"{spec.name!r} has {len(array)}"
                for spec, array in zip(self.inputs, arrays, strict=True)
            )
            raise UserError(f"every input has the same number of rows, at least 1: {counts}")
        parts = [self._part(arrays, *piece) for piece in self._pieces(rows.pop())]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @property
    def _own(self) -> int:
        return min(self.batches)

    def _pieces(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Where each run's rows begin, how many there are, and its batch size."""
        largest, first = max(self.batches), 0
        while first < rows:
            left = rows - first
            batch = min((size for size in self.batches if size >= left), default=largest)
            yield first, min(left, batch), batch
            first += batch

    def _part(
        self, arrays: list[np.ndarray], first: int, rows: int, batch: int
    ) -> dict[str, np.ndarray]:
        given = {}
        for spec, array in zip(self.inputs, arrays, strict=True):
            part = array[first : first + rows]
            if rows < batch:
                part = np.concatenate([part, np.repeat(part[-1:], batch - rows, axis=0)])
            given[spec.name] = part
        outputs = (
            super().__call__(given) if batch == self._own else self._at(self.batches[batch])(given)
        )
        return {name: output[:rows] for name, output in outputs.items()}
