"""A model that is served: its folders, one for each batch size that was compiled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.arguments import check_inputs
from gpu_aware_tune.library.batches import batch_folders, batch_size, is_batched, open_ended
from gpu_aware_tune.library.checks import (
    check_library,
    check_versions,
    open_shared,
)
from gpu_aware_tune.library.manifest import Manifest, read_manifest
from gpu_aware_tune.library.program import Program, Weights, open_vm
from gpu_aware_tune.library.threads import run_apart
from gpu_aware_tune.model.importer import TensorSpec


@dataclass(frozen=True, eq=False)
class Variant:
    """A folder of the model: its code at one batch size."""

    batch: int
    path: Path
    manifest: Manifest
    weights: Weights

    def units_for(self, width: int) -> int:
        """Whose code a lane of this width runs: the widest that fits it, else the narrowest."""
        fitting = [units for units in self.manifest.units if units <= width]
        return max(fitting, default=min(self.manifest.units))

    def open(self, width: int) -> Program:
        """A program of its own for a lane of this width, the weights shared with the others."""
        units = self.units_for(width)
        entry = self.manifest.library(units)
        check_library(self.path, self.manifest, units)
        return run_apart(lambda: open_vm(self.path / entry.file, self.weights, entry=entry.entry))


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model, ready to be served; see `open_model`.

    Args:
        name: as clients call it.
        inputs: the leading extent is -1 where requests may have any number of rows.
        outputs: likewise.
        max_batch: the most rows of one run; 0 where the leading axis is no batch, and a request is
            one run.
        slo_s: within which a request is to be answered unless it says otherwise.
        variants: by batch size, ascending.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    slo_s: float
    variants: tuple[Variant, ...]
    version: str = "1"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where it was loaded from."""
        return tuple(variant.path for variant in self.variants)

    @property
    def row_shapes(self) -> list[tuple[int, ...]]:
        """The shape of one row of each input."""
        return [spec.shape[1:] if self.max_batch else spec.shape for spec in self.inputs]

    @property
    def dtypes(self) -> list[np.dtype]:
        """The type of each input."""
        return [np.dtype(_numpy_type(spec.dtype)) for spec in self.inputs]

    @property
    def largest_run(self) -> int:
        """The most rows of one run."""
        return self.max_batch or 1

    def zeros(self, variant: Variant) -> list[np.ndarray]:
        """A batch to run where the values do not matter."""
        specs = variant.manifest.inputs
        return [np.zeros(s.shape, dtype) for s, dtype in zip(specs, self.dtypes, strict=True)]

    def variant_for(self, rows: int) -> Variant:
        """The folder whose batch holds so many rows, the smallest that does."""
        if not self.max_batch:
            return self.variants[0]
        return next(variant for variant in self.variants if variant.batch >= rows)

    def check(self, inputs: Mapping[str, Any], most_rows: int) -> tuple[list[np.ndarray], int]:
        """A request's inputs in order, and its number of rows.

        Raises:
            UserError: an array is missing, unknown, of another shape or type, or they differ in
                their numbers of rows.
        """
        arrays = check_inputs(self.inputs, inputs)
        if not self.max_batch:
            return arrays, 1
        counts = {len(array) for array in arrays}
        rows = counts.pop()
        if counts:
            raise UserError(
                f"the inputs of {self.name} have different numbers of rows: the first extent counts"
                " the rows of all of them"
            )
        if not 1 <= rows <= most_rows:
            raise UserError(
                f"a request of {rows} rows: {self.name} takes from 1 to {most_rows}; divide it"
            )
        return arrays, rows


def open_model(folders: Sequence[str | Path], slo_s: float, name: str | None = None) -> ServedModel:
    """Open the folders of one model, one for each batch size.

    Args:
        folders: that `tune MODEL` wrote, each for one batch size or several.
        slo_s: its latency objective.
        name: what clients call it; by default the model's.

    Raises:
        UserError: a folder cannot be used here, two have the same batch size, or they are not of
            one model.
    """
    paths = [path for folder in folders for path in batch_folders(Path(folder)).values()]
    found = sorted((_open_variant(path) for path in paths), key=lambda v: v.batch)
    first = found[0].manifest
    batched = all(is_batched(variant.manifest) for variant in found) and found[-1].batch > 1
    for variant in found[1:]:
        _check_same(found[0], variant)
    if len(found) > 1 and not batched:
        named = ", ".join(str(variant.path) for variant in found)
        raise UserError(
            f"{named}: their inputs and outputs do not all begin with the batch size, so requests"
            " cannot be put together: serve one of them"
        )
    return ServedModel(
        name=name or first.model.name,
        inputs=open_ended(first.inputs) if batched else first.inputs,
        outputs=open_ended(first.outputs) if batched else first.outputs,
        max_batch=found[-1].batch if batched else 0,
        slo_s=slo_s,
        variants=tuple(found),
    )


def _open_variant(path: Path) -> Variant:
    manifest = read_manifest(path)
    check_versions(path, manifest)
    if not manifest.on_cpu:
        raise UserError(
            f"{path} is for {manifest.device}: serving runs on CPU cores so far; use load() on a GPU"
        )
    open_shared(path, manifest)
    if manifest.further_shapes:
        raise UserError(
            f"{path} has code for {1 + manifest.further_shapes} shapes of its inputs, and a server runs"
            " one: tune a folder for it with a single --input"
        )
    if any(-1 in spec.shape for spec in manifest.inputs):
        raise UserError(f"{path} has an input of unknown shape: tune it with --input NAME:SHAPE")
    return Variant(batch_size(manifest), path, manifest, Weights(path / manifest.weights.file))


def _check_same(one: Variant, other: Variant) -> None:
    """Refuse a second folder that is not the same model at another batch size."""
    if one.batch == other.batch:
        raise UserError(
            f"{one.path} and {other.path} both have batch size {one.batch}: leave one out"
        )
    for a, b in zip(_specs(one), _specs(other), strict=False):
        if (a.name, a.dtype, a.shape[1:]) != (b.name, b.dtype, b.shape[1:]):
            raise UserError(
                f"{one.path} and {other.path} differ in {a.name!r}: they are not one model at two"
                " batch sizes"
            )
    if len(_specs(one)) != len(_specs(other)):
        raise UserError(f"{one.path} and {other.path} have different inputs: serve one of them")


def _specs(variant: Variant) -> tuple[TensorSpec, ...]:
    return (*variant.manifest.inputs, *variant.manifest.outputs)


def _numpy_type(name: str) -> Any:
    return bfloat16 if name == "bfloat16" else name
