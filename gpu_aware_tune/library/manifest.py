"""What a tuned model's folder says of itself, and whether it can be loaded on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm.target import codegen

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.folder import FORMAT, part_of, versions
from gpu_aware_tune.partition.topology import usable_cores
from gpu_aware_tune.settings import MANIFEST

# Of LLVM's processor features those that code may depend on; the others are advice for tuning.
_INSTRUCTIONS = (
    "sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "popcnt", "lzcnt", "movbe", "gfni", "vaes",
    "vpclmulqdq", "neon", "sve", "dotprod", "fullfp16", "fp16fml", "bf16", "i8mm", "lse",
)  # fmt: skip


def known_units(manifest: Mapping[str, Any]) -> list[int]:
    """Give the units that a folder has libraries for, in ascending order."""
    return sorted(int(entry["units"]) for entry in manifest["libraries"])


def library_of(manifest: Mapping[str, Any], units: int) -> tuple[str, str]:
    """Give the file that is the library for some units, and its function (both may be shared)."""
    found = _entry(manifest, units)
    return str(found["file"]), str(found.get("entry", "main"))


def check_units(path: Path, manifest: Mapping[str, Any], units: int) -> None:
    """Refuse units that a folder has no library for.

    Raises:
        UserError: it has none, with those it has.
    """
    known = known_units(manifest)
    if units not in known:
        allowed = ", ".join(str(count) for count in known)
        raise UserError(f"{path} has no library for {units} units: choose one of {allowed}")


def check_library(path: Path, manifest: Mapping[str, Any], units: int) -> None:
    """Refuse a library that is damaged, or would crash on this processor.

    Raises:
        UserError: it is, with what to do.
    """
    _check_cpu(path, manifest, units)
    _check_part(path, _entry(manifest, units))


def check_weights(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse damaged weights.

    Raises:
        UserError: they are missing, or have changed.
    """
    _check_part(path, manifest["weights"])


def nearest(known: list[int], visible: int) -> int:
    """Give the known number of units nearest to what is visible, the smaller of two."""
    return min(known, key=lambda units: (abs(units - visible), units))


def visible_units(manifest: Mapping[str, Any]) -> int:
    """How many units of the manifest's device this process sees."""
    if on_cpu(manifest):
        return len(usable_cores())
    device = tvm.cuda(0)
    return int(device.multi_processor_count) if device.exist else 0


def on_cpu(manifest: Mapping[str, Any]) -> bool:
    """Whether the folder is for a CPU; otherwise it is for a CUDA GPU."""
    return not str(manifest.get("device", "llvm")).startswith("cuda")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a folder's manifest.

    Raises:
        UserError: there is none, it is damaged, or of a later format.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give the folder that `tune MODEL` wrote")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        made = int(manifest["format"])
    except FileNotFoundError:
        raise UserError(f"{path} is no tuned model: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / MANIFEST} is damaged ({error}): tune again") from error
    if made > FORMAT:
        raise UserError(f"{path} has format {made}, this version reads up to {FORMAT}: update it")
    missing = {"model", "inputs", "outputs", "libraries", "weights", "versions"} - set(manifest)
    if missing or not manifest["libraries"]:
        named = ", ".join(sorted(missing)) or "libraries"
        raise UserError(f"{path / MANIFEST} is damaged (no {named}): tune again")
    return dict(manifest)


def check_versions(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder that another TVM made.

    Raises:
        UserError: it was, with both versions.
    """
    made, here = manifest["versions"], versions()
    if made.get("tvm") != here["tvm"]:
        raise UserError(
            f"{path} was made with TVM {made.get('tvm')}, this is {here['tvm']}: tune again or"
            f" `pip install apache-tvm=={made.get('tvm')}`"
        )


def _entry(manifest: Mapping[str, Any], units: int) -> Mapping[str, Any]:
    return next(entry for entry in manifest["libraries"] if int(entry["units"]) == units)


def _check_cpu(path: Path, manifest: Mapping[str, Any], units: int) -> None:
    """Refuse a library for another processor: an illegal instruction would end this process."""
    shares = [share for share in manifest.get("shares", ()) if share.get("units") == units]
    target = dict(shares[0].get("target", {})) if shares else {}
    wanted, here = target.get("mcpu"), str(codegen.llvm_get_system_cpu())
    if target.get("kind") != "llvm" or not wanted or wanted == here:
        return
    lacking = sorted(_features(wanted) - _features(here))
    if lacking:
        raise UserError(
            f"{path} is compiled for {wanted}; this processor, {here}, lacks"
            f" {', '.join(lacking[:4])}: tune again here, or with --arch {here}"
        )


def _features(cpu: str) -> set[str]:
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})
    names = {str(feature) for feature in codegen.llvm_get_cpu_features(target)}
    return {name for name in names if name.startswith(_INSTRUCTIONS)}


def _check_part(path: Path, entry: Mapping[str, Any]) -> None:
    """Refuse a damaged file before it is mapped and run."""
    file = path / str(entry["file"])
    if not file.is_file():
        raise UserError(f"{path} is incomplete ({entry['file']} is missing): tune again")
    if part_of(file).sha256 != entry["sha256"]:
        raise UserError(f"{file} is damaged (its content has changed): tune again")
