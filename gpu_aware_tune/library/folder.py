"""The folder a tuned model lives in: what is in it, and how it is written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_aware_tune.codegen.linking import find_compiler
from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.settings import MANIFEST, check_replaceable

if TYPE_CHECKING:
    from gpu_aware_tune.model.importer import Model

FORMAT = 1
WEIGHTS = "weights.bin"


@dataclass(frozen=True)
class Part:
    """A file of the folder, with what identifies its content."""

    file: str
    bytes: int
    sha256: str


def save_weights(weights: Mapping[str, np.ndarray], path: Path) -> None:
    """Write weights as TVM's `load_param_dict` reads them, which keeps their order.

    Raises:
        SetupError: the file cannot be written.
    """
    import tvm

    tensors = {name: tvm.runtime.tensor(array) for name, array in weights.items()}
    with _writing(path):
        path.write_bytes(tvm.runtime.save_param_dict(tensors))


def link(executable: Any, path: Path | str) -> None:
    """Write a compiled model as a shared library, without symbols that only a debugger reads.

    Those are a third of the file, and every share has one.
    """
    executable.export_library(str(path), options=["-s"])


def export(
    folder: Path,
    model: Model,
    libraries: Mapping[int, Path],
    manifest: Mapping[str, Any],
    entry: str = "main",
) -> Path:
    """Write a model's folder, whole or not at all; one that is there is replaced in one step.

    Args:
        folder: where, such as `model.tuned`.
        model: the model the libraries were compiled from.
        libraries: the compiled `.so` (or a `VMExecutable`, which is linked now) by units.
        manifest: what the caller knows: device, shares with their targets, tasks, verification.
        entry: the name of each library's function, "main_{units}" where one path holds them all.

    Returns:
        The folder.

    Raises:
        UserError: `folder` is something other than a tuned model.
        SetupError: it cannot be written, or no compiler is there to link with.
    """
    folder = Path(os.path.abspath(folder))
    check_replaceable(folder)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    _remove_stale(folder)
    with _writing(folder):
        try:
            fresh.mkdir(parents=True)
            parts = _share_files(
                fresh, {units: _library(fresh, units, made) for units, made in libraries.items()}
            )
            save_weights(model.weights, fresh / WEIGHTS)
            facts = _manifest(model, parts, part_of(fresh / WEIGHTS), manifest, entry)
            text = json.dumps(facts, indent=1)
            (fresh / MANIFEST).write_text(text + "\n")
            for path in fresh.iterdir():
                _flush(path)
            _put(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def part_of(path: Path) -> Part:
    """Describe a file of the folder."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return Part(path.name, path.stat().st_size, digest.hexdigest())


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
    model: Model,
    parts: Mapping[int, Part],
    weights: Part,
    given: Mapping[str, Any],
    entry: str,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": {"name": model.name, "hash": model.hash},
        "inputs": [asdict(spec) for spec in model.inputs],
        "outputs": [asdict(spec) for spec in model.outputs],
        "libraries": [
            {"units": units, **asdict(parts[units]), "entry": entry.format(units=units)}
            for units in sorted(parts)
        ],
        "weights": asdict(weights),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **given,
    }


def _library(folder: Path, units: int, made: Any) -> Part:
    path = folder / f"lib-{units}.so"
    if isinstance(made, str | os.PathLike):
        shutil.copyfile(made, path)
    else:
        find_compiler()
        link(made, path)
    return part_of(path)


def _share_files(folder: Path, parts: Mapping[int, Part]) -> dict[int, Part]:
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
            shared[units] = Part(name, first.bytes, first.sha256)
            if units != together[0]:
                (folder / parts[units].file).unlink()
    return shared


def _put(fresh: Path, folder: Path) -> None:
    """Move the finished folder to its place; what was there is in `fresh` afterwards."""
    if not folder.exists():
        fresh.rename(folder)
    elif not _exchange(fresh, folder):
        # No exchange on this file system: two renames, the old one back if the second fails.
        old = fresh.with_suffix(".old")
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


def _remove_stale(folder: Path) -> None:
    """Remove what runs that were killed while exporting have left beside the folder."""
    for path in folder.parent.glob(f".{folder.name}.*.partial"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


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
