"""The exported folder: writing it, loading it, running and timing what is in it."""

from __future__ import annotations

from gpu_aware_tune.codegen.cuda_toolchain import preload_runtime

preload_runtime()  # before TVM is imported, which looks for it once

from gpu_aware_tune.library.folder import export, link, save_weights  # noqa: E402
from gpu_aware_tune.library.loaded import LatencyStats, Library, load  # noqa: E402
from gpu_aware_tune.library.program import Program, open_vm  # noqa: E402

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
