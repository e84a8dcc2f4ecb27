"""The folder a tuned model lives in: what is in it, and how it is written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.library.files import sha256_of
from gpu_aware_tune.library.manifest import (
    FileEntry,
    LibraryEntry,
    Manifest,
    ModelId,
    RunFacts,
    read_manifest,
    write_manifest,
)
from gpu_aware_tune.library.recovery import OLD, PARTIAL, beside, remove_stale
from gpu_aware_tune.partition.linking import find_compiler
from gpu_aware_tune.partition.thread_pool import FILE, pools_code
from gpu_aware_tune.settings import check_replaceable

if TYPE_CHECKING:
    from gpu_aware_tune.model.importer import Model

WEIGHTS = "weights.bin"


def save_weights(weights: Mapping[str, np.ndarray], path: Path) -> None:
    """Write weights as TVM's `load_param_dict` reads them, which keeps their order.

    Raises:
        SetupError: the file cannot be written.
    """
    import tvm

    tensors = {name: tvm.runtime.tensor(array) for name, array in weights.items()}
    with _writing(path):
        path.write_bytes(tvm.runtime.save_param_dict(tensors))


def link(executable: Any, path: Path | str, objects: Sequence[Path] = ()) -> None:
    """Write a compiled model as a shared library, without symbols that only a debugger reads.

    Those are a third of the file, and every share has one.

    Args:
        executable: the `VMExecutable`.
        path: the `.so` to write.
        objects: of kernels that are not in it; see `codegen.side_by_side`.
    """
    executable.export_library(str(path), options=["-s", *map(str, objects)])


def export(
    folder: Path,
    model: Model,
    libraries: Mapping[int, Path],
    facts: RunFacts,
    entry: str = "main",
) -> Path:
    """Write a model's folder, whole or not at all; one that is there is replaced in one step.

    Args:
        folder: where, such as `model.tuned`.
        model: the model the libraries were compiled from.
        libraries: the compiled `.so` (or a `VMExecutable`, which is linked now) by units.
        facts: what the run knows: device, shares with their targets, tasks, verification.
        entry: the name of each library's function, "main_{units}" where one path holds them all.

    Returns:
        The folder.

    Raises:
        UserError: `folder` is something other than a tuned model.
        SetupError: it cannot be written, or no compiler is there to link with.
    """
    folder = Path(os.path.abspath(folder))
    with replacing(folder) as fresh:
        parts = _share_files(
            fresh, {units: _library(fresh, units, made) for units, made in libraries.items()}
        )
        save_weights(model.weights, fresh / WEIGHTS)
        manifest = _manifest(model, parts, fresh / WEIGHTS, facts, entry)
        if manifest.on_cpu:
            with contextlib.suppress(SetupError):  # then TVM's own threads serve
                (fresh / FILE).write_bytes(pools_code())
                manifest = dataclasses.replace(manifest, threads=_entry(fresh / FILE))
        write_manifest(fresh, manifest)
    return folder


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of a model's folder in one step at the end.

    Args:
        folder: an absolute path.

    Raises:
        UserError: `folder` is something other than a tuned model.
        SetupError: it cannot be written.
    """
    remove_stale(folder)
    check_replaceable(folder)
    fresh = beside(folder, PARTIAL)
    with _writing(folder):
        try:
            fresh.mkdir(parents=True)
            yield fresh
            for path in (*fresh.rglob("*"), fresh):
                _flush(path)
            _put(fresh, folder)
            _flush(folder.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions that decide whether a library can be loaded."""
    import tvm

    from gpu_aware_tune import __version__

    return {
        "tvm": tvm.__version__,
        "tvm_ffi": metadata.version("apache-tvm-ffi"),
        "gpu_aware_tune": __version__,
    }


def _manifest(
    model: Model, parts: Mapping[int, FileEntry], weights: Path, facts: RunFacts, entry: str
) -> Manifest:
    libraries = (
        LibraryEntry(units, part.file, part.bytes, part.sha256, entry.format(units=units))
        for units, part in sorted(parts.items())
    )
    return Manifest(
        **vars(facts),
        model=ModelId(model.name, model.hash),
        inputs=tuple(model.inputs),
        outputs=tuple(model.outputs),
        libraries=tuple(libraries),
        weights=_entry(weights),
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.name, *sha256_of(path))


def _library(folder: Path, units: int, made: Any) -> FileEntry:
    path = folder / f"lib-{units}.so"
    if isinstance(made, str | os.PathLike):
        shutil.copyfile(made, path)
    else:
        find_compiler()
        link(made, path)
    return _entry(path)


def _share_files(folder: Path, parts: Mapping[int, FileEntry]) -> dict[int, FileEntry]:
    """Keep libraries of the same content once, in a file that names all of their units."""
    alike: dict[str, list[int]] = {}
    for units in sorted(parts):
        alike.setdefault(parts[units].sha256, []).append(units)
    shared = dict(parts)
    for together in alike.values():
        name = f"lib-{'-'.join(str(units) for units in together)}.so"
        first = parts[together[0]]
        (folder / first.file).rename(folder / name)
        for units in together:
            shared[units] = FileEntry(name, first.bytes, first.sha256)
            if units != together[0]:
                (folder / parts[units].file).unlink()
    return shared


def _put(fresh: Path, folder: Path) -> None:
    """Move the finished folder to its place; what was there is in `fresh` afterwards."""
    if not folder.exists():
        fresh.rename(folder)
    elif not _exchange(fresh, folder):
        # No exchange on this file system: two renames, the old one back if the second fails.
        old = beside(folder, OLD)
        folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (Linux's renameat2); False where that cannot be done."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return int(swap(here, os.fsencode(one), here, os.fsencode(other), exchange)) == 0


def _flush(path: Path) -> None:
    """Bring a file to the disk, so that a full one is noticed before the folder is put in place."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a set-up error."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SetupError(
            f"cannot write {path} ({reason}): free space or choose another output folder"
        ) from error


def move_inside(folder: Path, inside: Path, weights: Path) -> None:
    """Make a folder one of a larger one, whose weights it shares where they are the same.

    Args:
        folder: what `export` wrote; it is moved.
        inside: where to.
        weights: the larger folder's, of which `inside` gets a hard link, or a copy where the file
            system has no links.
    """
    own = read_manifest(folder).weights
    shutil.move(folder, inside)
    file = inside / own.file
    if own.sha256 != read_manifest(weights.parent).weights.sha256:
        return
    file.unlink()
    try:
        os.link(weights, file)
    except OSError:
        shutil.copyfile(weights, file)
