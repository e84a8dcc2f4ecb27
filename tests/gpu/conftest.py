"""Everything here needs an NVIDIA GPU and is skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from gpu_aware_tune.cuda_toolchain import preload_runtime
from gpu_aware_tune.partition import Device, find_device
from gpu_aware_tune.partition.gpus import query_gpus

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
preload_runtime()  # before any test module imports TVM


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is collected from this folder, and skip it without a GPU."""
    gpus, reason = query_gpus()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not gpus:
                item.add_marker(pytest.mark.skip(reason=f"no NVIDIA GPU: {reason}"))


@pytest.fixture(scope="session")
def gpu() -> Device:
    """The first GPU."""
    device, _ = find_device("cuda", 0, None)
    return device


@pytest.fixture(scope="session")
def mps_program() -> str:
    """The MPS control program."""
    program = shutil.which("nvidia-cuda-mps-control")
    if program is None:
        pytest.skip("nvidia-cuda-mps-control is not on the PATH")
    return program
