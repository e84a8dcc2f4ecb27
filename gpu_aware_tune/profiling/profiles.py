"""How fast a model is on each share of its device: a `Curve`, of a library or before tuning."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.batches import batch_folders
from gpu_aware_tune.library.manifest import Manifest, read_manifest
from gpu_aware_tune.partition import (
    Device,
    Partition,
    Share,
    choose_backend,
    find_device,
    open_partitions,
    share_of,
)
from gpu_aware_tune.profiling.curves import Curve, Point, Spec, Subject, batch_of, measure
from gpu_aware_tune.workers import WorkerHost

if TYPE_CHECKING:
    from gpu_aware_tune.model.importer import Model

__all__ = [
    "ROUNDS",
    "SECONDS",
    "Curve",
    "Point",
    "grid",
    "group_by_model",
    "profile",
    "profile_untuned",
    "share_for",
]

SECONDS, ROUNDS = 0.3, 7
_GRID_PERCENT = tuple(range(10, 101, 10))


def profile(
    libraries: str | Path | Sequence[str | Path],
    units: Sequence[int] | None = None,
    *,
    tuned_at: int | None = None,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    partition: str = "auto",
    device: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Curve:
    """Measure tuned models on shares of the device.

    Each share runs the library that `load` would pick for it, so that the curve shows what a user
    of the folder gets.

    Args:
        libraries: the folder that `tune` wrote. A library's batch size is compiled in, so a model
            at several of them is several folders, one for each; they are measured side by side.
        units: the shares, in cores or SMs; by default every tenth of the device and every share
            that a folder has a library for.
        tuned_at: run the library tuned for these units at every share.
        seconds: length of one slice.
        rounds: slices of each point.
        partition: how the shares are made real, as in `tune --partition`.
        device: which GPU.
        progress: told the fraction that is done, after each slice.

    Raises:
        UserError: a folder or a share cannot be used, with what can.
        SetupError: the device or the partition is not there.
    """
    from gpu_aware_tune.codegen.cuda_toolchain import runtime_environment

    _check_effort(seconds, rounds)
    given = [libraries] if isinstance(libraries, str | Path) else list(libraries)
    folders = open_folders([Path(path) for path in given], tuned_at)
    found = _device(folders, device)
    backend, _ = choose_backend(found, partition, _GRID_PERCENT)
    known = {count for folder in folders for count in folder.manifest.units}
    shares = (
        [share_for(found, backend, count) for count in dict.fromkeys(units)]
        if units
        else _default_shares(found, backend, known)
    )
    with contextlib.ExitStack() as stack:
        partitions = open_partitions(shares, found, backend)
        for opened in partitions:
            stack.callback(opened.close)
        subjects = [folder.subject(opened) for folder in folders for opened in partitions]
        host = stack.enter_context(WorkerHost(runtime_environment()))
        points = measure(host, subjects, seconds, rounds, progress)
    return _curve(folders[0].manifest.model.name, partitions, points)


def profile_untuned(
    host: WorkerHost,
    partitions: Sequence[Partition],
    libraries: Mapping[int, Path],
    weights: Path,
    model: Model,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
) -> Curve:
    """Measure compiled libraries of a model that is not tuned yet, to find the share to tune for.

    Args:
        host: what the measuring workers are forked from.
        partitions: the shares, open; see `grid`.
        libraries: compiled libraries by units; each share runs the one nearest to its units, so
            one may serve them all.
        weights: the file that `save_weights` wrote.
        model: what the libraries were compiled from.
        seconds: length of one slice.
        rounds: slices of each share.
    """
    from gpu_aware_tune.library.checks import nearest

    specs = tuple((spec.name, tuple(spec.shape), spec.dtype) for spec in model.inputs)
    known = sorted(libraries)
    subjects = []
    for partition in partitions:
        count = nearest(known, partition.share.units)
        subjects.append(Subject(partition, libraries[count], weights, specs, count))
    return _curve(model.name, partitions, measure(host, subjects, seconds, rounds))


def grid(device: Device, backend: str, percents: Iterable[int] = _GRID_PERCENT) -> list[Share]:
    """The shares of a device that a curve is made of: every tenth, each number of units once."""
    wanted = [100] if backend == "full" else list(percents)
    shares = (share_of(device, percent, backend) for percent in wanted)
    smallest: dict[int, Share] = {}
    for share in shares:
        smallest.setdefault(share.units, share_for(device, backend, share.units))
    return [smallest[units] for units in sorted(smallest)]


def share_for(device: Device, backend: str, units: int) -> Share:
    """The share that comes to exactly so many units.

    Raises:
        UserError: the backend cannot give them, with what it can.
    """
    total = device.units_total
    percent = min(100, math.ceil(100 * max(1, units) / total))
    if backend in ("cores", "null"):
        if not 1 <= units <= total:
            raise UserError(
                f"--units {units}: {device.name} has {total} {device.unit}s; allowed: 1 to {total}"
            )
        return Share(percent, units, device)
    share = Share(100, total, device) if backend == "full" else share_of(device, percent, backend)
    if share.units != units:
        percents = [100] if backend == "full" else range(1, 101)
        allowed = sorted({share_of(device, each, backend).units for each in percents})
        raise UserError(
            f"--units {units}: partition {backend} cannot give that many SMs of {device.name};"
            f" allowed: {', '.join(map(str, allowed))}"
        )
    return share


@dataclass(frozen=True)
class TunedFolder:
    """A tuned model to profile, checked; `tuned_at` is the library to run on every share, if one."""

    path: Path
    manifest: Manifest
    tuned_at: int | None

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Its inputs."""
        return tuple((spec.name, spec.shape, spec.dtype) for spec in self.manifest.inputs)

    def subject(self, partition: Partition) -> Subject:
        """What runs on a share: the library that `load` would pick there, or the one pinned."""
        from gpu_aware_tune.library.checks import check_library, nearest

        units = self.tuned_at or nearest(self.manifest.units, partition.share.units)
        check_library(self.path, self.manifest, units)
        library, weights = self.manifest.library(units), self.path / self.manifest.weights.file
        file = self.path / library.file
        return Subject(partition, file, weights, self.specs, units, library.entry)


def open_folders(paths: Sequence[Path], tuned_at: int | None = None) -> list[TunedFolder]:
    """Check the folders that `tune` wrote; gives them by batch size.

    Args:
        paths: the folders, each of another batch size.
        tuned_at: the library of each that is to run at every share.

    Raises:
        UserError: a folder cannot be used, with why.
    """
    from gpu_aware_tune.library.checks import (
        check_units,
        check_versions,
        open_shared,
    )

    folders: list[TunedFolder] = []
    for path in paths:
        manifest = read_manifest(path)
        check_versions(path, manifest)
        if tuned_at is not None:
            check_units(path, manifest, tuned_at)
        open_shared(path, manifest)
        folders.append(TunedFolder(path, manifest, tuned_at))
    batches: dict[int, Path] = {}
    for folder in folders:
        batch = batch_of(folder.specs)
        if batch in batches:
            raise UserError(
                f"{batches[batch]} and {folder.path} both have batch size {batch}: give one folder"
                " for each batch size (`tune MODEL --input NAME:8x...`)"
            )
        batches[batch] = folder.path
    return sorted(folders, key=lambda folder: batch_of(folder.specs))


def group_by_model(paths: Sequence[Path], batches: Sequence[int] | None = None) -> list[list[Path]]:
    """Sort folders that `tune` wrote by their model, in the order in which models are first named.

    Args:
        paths: the folders.
        batches: keep those with these batch sizes only; all by default.

    Raises:
        UserError: a folder cannot be used, or a model has none with a batch size that is wanted.
    """
    models: dict[str, dict[Path, int]] = {}
    for folder in paths:
        found = models.setdefault(read_manifest(folder).model.name, {})
        found.update({path: batch for batch, path in batch_folders(folder).items()})
    for model, found in models.items():
        for batch in batches or ():
            if batch not in found.values():
                has = ", ".join(str(each) for each in sorted(found.values()))
                raise UserError(
                    f"--batch {batch}: there is no folder of {model} with that batch size (there is"
                    f" {has}): tune it with `tune MODEL --input NAME:{batch}x...`"
                )
    return [
        [path for path, batch in found.items() if batches is None or batch in batches]
        for found in models.values()
    ]


def _device(folders: Sequence[TunedFolder], index: int) -> Device:
    """The device of this machine that the folders are for."""
    keys = {folder.manifest.device for folder in folders}
    kinds = {key.partition("/")[0] for key in keys}
    if len(kinds) > 1:
        raise UserError(f"the folders are for different devices ({', '.join(sorted(keys))})")
    device, _ = find_device(kinds.pop(), index, None)
    if device.kind == "cuda":
        arch = {key.rpartition("/")[2] for key in keys} - {device.arch}
        if arch:
            raise UserError(
                f"{folders[0].path} is compiled for {', '.join(sorted(arch))}; {device.name} is"
                f" {device.arch}: tune again on this GPU"
            )
    return device


def _default_shares(device: Device, backend: str, known: Iterable[int]) -> list[Share]:
    """The grid, and every tuned share that this device can give."""
    shares = {share.units: share for share in grid(device, backend)}
    for units in known:
        if units not in shares:
            with contextlib.suppress(UserError):
                shares[units] = share_for(device, backend, units)
    return [shares[units] for units in sorted(shares)]


def _check_effort(seconds: float, rounds: int) -> None:
    if not seconds > 0:
        raise UserError(f"--seconds {seconds:g}: a slice must be longer than 0 s")
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: at least 1 round is needed")


def _curve(model: str, partitions: Sequence[Partition], points: Sequence[Point]) -> Curve:
    device = partitions[0].share.device
    ordered = sorted(points, key=lambda point: (point.batch, point.units))
    return Curve(
        model=model,
        device=device.key,
        backend=partitions[0].backend,
        unit=device.unit,
        units_total=device.units_total,
        points=tuple(ordered),
    )
