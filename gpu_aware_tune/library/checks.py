"""Whether a tuned model's folder can be loaded on this machine, and which of its libraries."""

from __future__ import annotations

from pathlib import Path

import tvm
from tvm.target import codegen

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.files import has_content
from gpu_aware_tune.library.folder import versions
from gpu_aware_tune.library.manifest import FileEntry, LibraryEntry, Manifest
from gpu_aware_tune.partition.thread_pool import open_pools
from gpu_aware_tune.partition.topology import usable_cores

# Of LLVM's processor features those that code may depend on; the others are advice for tuning.
_INSTRUCTIONS = (
    "sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "popcnt", "lzcnt", "movbe", "gfni", "vaes",
    "vpclmulqdq", "neon", "sve", "dotprod", "fullfp16", "fp16fml", "bf16", "i8mm", "lse",
)  # fmt: skip


def check_units(path: Path, manifest: Manifest, units: int) -> None:
    """Refuse units that a folder has no library for.

    Raises:
        UserError: it has none, with those it has.
    """
    if units not in manifest.units:
        allowed = ", ".join(map(str, manifest.units))
        raise UserError(f"{path} has no library for {units} units: choose one of {allowed}")


def check_library(path: Path, manifest: Manifest, units: int) -> None:
    """Refuse a library that is damaged, or would crash on this processor.

    Raises:
        UserError: it is, with what to do.
    """
    _check_cpu(path, manifest, units)
    _check_file(path, manifest.library(units))


def check_weights(path: Path, manifest: Manifest) -> None:
    """Refuse damaged weights.

    Raises:
        UserError: they are missing, or have changed.
    """
    _check_file(path, manifest.weights)


def open_shared(path: Path, manifest: Manifest) -> None:
    """Check what all libraries of a folder share, and take its code of the threads for this process.

    Raises:
        UserError: a file is missing, or has changed.
    """
    check_weights(path, manifest)
    if manifest.threads is not None:
        _check_file(path, manifest.threads)
        open_pools(path / manifest.threads.file)


def check_versions(path: Path, manifest: Manifest) -> None:
    """Refuse a folder that another TVM made.

    Raises:
        UserError: it was, with both versions.
    """
    made, here = manifest.versions["tvm"], versions()["tvm"]
    if made != here:
        raise UserError(
            f"{path} was made with TVM {made}, this is {here}: tune again or"
            f" `pip install apache-tvm=={made}`"
        )


def nearest(known: list[int], visible: int) -> int:
    """Give the known number of units nearest to what is visible, the smaller of two."""
    return min(known, key=lambda units: (abs(units - visible), units))


def visible_units(manifest: Manifest) -> int:
    """How many units of the manifest's device this process sees."""
    if manifest.on_cpu:
        return len(usable_cores())
    device = tvm.cuda(0)
    return int(device.multi_processor_count) if device.exist else 0


def _check_cpu(path: Path, manifest: Manifest, units: int) -> None:
    """Refuse a library for another processor: an illegal instruction would end this process."""
    target = manifest.target(units)
    wanted, here = target.get("mcpu"), str(codegen.llvm_get_system_cpu())
    if target.get("kind") != "llvm" or not wanted or wanted == here:
        return
    if wanted not in map(str, codegen.llvm_get_cpu_archlist(tvm.target.Target("llvm"))):
        raise UserError(f"{path} is compiled for {wanted}, an unknown processor: tune again here")
    lacking = sorted(_features(str(wanted)) - _features(here))
    if lacking:
        raise UserError(
            f"{path} is compiled for {wanted}; this processor, {here}, lacks"
            f" {', '.join(lacking[:4])}: tune again here, or with --arch {here}"
        )


def _features(cpu: str) -> set[str]:
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})
    names = {str(feature) for feature in codegen.llvm_get_cpu_features(target)}
    return {name for name in names if name.startswith(_INSTRUCTIONS)}


def _check_file(path: Path, entry: FileEntry | LibraryEntry) -> None:
    """Refuse a damaged file before it is mapped and run."""
    file = path / entry.file
    try:
        same = has_content(file, entry.bytes, entry.sha256)
    except FileNotFoundError:
        raise UserError(f"{path} is incomplete ({entry.file} is missing): tune again") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): tune again") from error
    if not same:
        raise UserError(f"{file} is damaged (its content has changed): tune again")
