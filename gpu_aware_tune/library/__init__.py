"""The exported folder: writing it, loading it, running and timing what is in it."""

from __future__ import annotations

from gpu_aware_tune.library.folder import export, link, save_weights
from gpu_aware_tune.library.loaded import LatencyStats, Library, load
from gpu_aware_tune.library.program import Program, open_vm

__all__ = [
    "LatencyStats",
    "Library",
    "Program",
    "export",
    "link",
    "load",
    "open_vm",
    "save_weights",
]
