"""What the tests on a GPU share; without a GPU each of them is skipped, with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpu_aware_tune.codegen.cuda_toolchain import preload_runtime
from gpu_aware_tune.partition import Device, find_device
from gpu_aware_tune.partition.gpus import query_gpus

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for benchmarks.gpu.models
preload_runtime()  # before a test imports TVM

_GPUS, _REASON = query_gpus()
requires_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _GPUS, reason=f"no NVIDIA GPU: {_REASON}"),
]


def first_gpu() -> Device:
    """The GPU that is tested."""
    device, _ = find_device("cuda", 0, None)
    return device
