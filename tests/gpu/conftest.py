"""What the tests on a GPU share; without a GPU each of them is skipped, with the reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.environment import NO_GPU, RESULTS
from gpu_aware_tune.codegen.cuda_toolchain import preload_runtime, runtime_environment
from gpu_aware_tune.partition import Device, find_device
from gpu_aware_tune.partition.gpu_query import query_gpus
from gpu_aware_tune.workers import WorkerHost

preload_runtime()  # before a test imports TVM


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make gpu-check` passes on."""
    group = parser.getgroup("gpu")
    group.addoption(
        "--gpu-results", type=Path, default=RESULTS, help="folder of the checks' results"
    )
    group.addoption("--check-seconds", type=float, default=math.inf, help="for all ten checks")
    group.addoption("--need-gpu", action="store_true", help="exit code 3 where there is no GPU")


def pytest_configure(config: pytest.Config) -> None:
    """End at once where a GPU is a must and none is here."""
    gpus, reason = query_gpus()
    if config.getoption("--need-gpu") and not gpus:
        pytest.exit(f"skipped: this needs an NVIDIA GPU ({reason})", returncode=NO_GPU)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    gpus, reason = query_gpus()
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.skipif(not gpus, reason=f"no NVIDIA GPU: {reason}"))


@pytest.fixture(scope="session")
def gpu() -> Device:
    """The GPU that is tested."""
    device, _ = find_device("cuda", 0, None)
    return device


@pytest.fixture(scope="session")
def host() -> Iterator[WorkerHost]:
    """What workers with TVM and its CUDA runtime are forked from."""
    with WorkerHost(runtime_environment()) as made:
        yield made


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory, gpu: Device) -> dict[str, str]:
    """Artifacts by what they do: "good", "illegal", "hang"."""
    from gpu.kernels import artifact

    folder = tmp_path_factory.mktemp("artifacts")
    return {kind: artifact(folder, gpu, kind) for kind in ("good", "illegal", "hang")}
