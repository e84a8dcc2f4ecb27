"""Manifests of tuned models' folders, for tests that need no TVM and for tests that damage one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from gpu_aware_tune.library.manifest import (
    FileEntry,
    LibraryEntry,
    Manifest,
    ModelId,
    RunFacts,
    TaskFacts,
    write_manifest,
)
from gpu_aware_tune.model.importer import TensorSpec


def some_manifest(
    name: str = "net", model_hash: str = "abc", tasks: tuple[TaskFacts, ...] = ()
) -> Manifest:
    """A manifest of files that are not there."""
    return Manifest(
        **vars(RunFacts(device="llvm/test/cpu", tasks=tasks)),
        model=ModelId(name, model_hash),
        inputs=(TensorSpec("image", (1, 3), "float32"),),
        outputs=(TensorSpec("scores", (1, 2), "float32"),),
        libraries=(LibraryEntry(2, "lib-2.so", 1, 64 * "0"),),
        weights=FileEntry("weights.bin", 1, 64 * "1"),
        versions={"tvm": "0.27"},
    )


def write_some(folder: Path, **about: Any) -> None:
    """Write such a manifest into a folder, which is made."""
    folder.mkdir(parents=True)
    write_manifest(folder, some_manifest(**about))


def read_json(folder: Path) -> dict[str, Any]:
    """A folder's manifest as it is in the file."""
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return values


def write_json(folder: Path, values: dict[str, Any]) -> None:
    """Write values as a folder's manifest, whatever they are, with the checksum that they have."""
    text = json.dumps(values)
    if values.get("format") == 2:
        rest = {name: value for name, value in values.items() if name != "checksum"}
        canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        text = json.dumps({**rest, "checksum": hashlib.sha256(canonical.encode()).hexdigest()})
    (folder / "manifest.json").write_text(text)


def change(folder: Path, **changes: Any) -> None:
    """Change fields of a folder's manifest."""
    write_json(folder, {**read_json(folder), **changes})
