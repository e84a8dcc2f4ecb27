"""The exported folder: writing it, loading it, running and timing what is in it.

Names are loaded on first use, so that reading a manifest imports no TVM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.codegen.cuda_toolchain import preload_runtime

if TYPE_CHECKING:
    from gpu_aware_tune.library.folder import export, link, save_weights
    from gpu_aware_tune.library.latency import LatencyStats
    from gpu_aware_tune.library.loaded import Library, load
    from gpu_aware_tune.library.manifest import Manifest, RunFacts, read_manifest
    from gpu_aware_tune.library.program import Program, open_vm

preload_runtime()  # before any module here imports TVM, which looks for it once

_HOME = {
    "LatencyStats": "latency",
    "Library": "loaded",
    "Manifest": "manifest",
    "Program": "program",
    "RunFacts": "manifest",
    "export": "folder",
    "link": "folder",
    "load": "loaded",
    "open_vm": "program",
    "read_manifest": "manifest",
    "save_weights": "folder",
}

__all__ = [
    "LatencyStats",
    "Library",
    "Manifest",
    "Program",
    "RunFacts",
    "export",
    "link",
    "load",
    "open_vm",
    "read_manifest",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
