"""The mock GPU in the process of a test: what is wrong with it is set as the test goes.

The libraries are loaded by their path, after which cuda.bindings and pynvml find them by their
names. They stay loaded until the process ends, without a GPU wherever `MOCK_GPU` is not set.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import pytest

import mock_gpu
from gpu_aware_tune.partition import backends, device, gpu_query
from gpu_aware_tune.partition.driver import call, started_driver

_KINDS = ("primary context", "green context", "stream", "module", "memory", "event", "graph",
          "executable graph")  # fmt: skip
_LEFT = ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")


class MockGpu:
    """The GPU of one test: settings as device.h lists them, and what the driver has seen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._cuda, self._nvml = _loaded()
        self._cuda.mock_gpu_reset()
        for name in (n for n in os.environ if n.startswith("MOCK_GPU") or n in _LEFT):
            monkeypatch.delenv(name)
        monkeypatch.setenv("MOCK_GPU", "1")
        query = functools.cache(lambda: (tuple(gpu_query.read_gpus(started_driver())), ""))
        for module in (gpu_query, backends, device):
            monkeypatch.setattr(module, "query_gpus", query)

    def set(self, **settings: object) -> None:
        """Make something wrong: `set(lost=2)` sets MOCK_GPU_LOST; None takes it back."""
        for name, value in settings.items():
            variable = f"MOCK_GPU_{name.upper()}"
            if value is None:
                self._monkeypatch.delenv(variable)
            else:
                self._monkeypatch.setenv(variable, str(value))

    @property
    def driver(self) -> Any:
        """cuda.bindings.driver, started."""
        return started_driver()

    def calls(self, function: str) -> int:
        """How often a function of the driver was called."""
        return int(self._cuda.mock_gpu_calls(function.encode()))

    def alive(self) -> list[str]:
        """What was made and not given back: empty after a proper clean-up."""
        counts = (ctypes.c_int * len(_KINDS)).in_dll(self._cuda, "mock_gpu_alive")
        found = [f"{kind} x{n}" for kind, n in zip(_KINDS, counts, strict=True) if n]
        users = ctypes.c_int.in_dll(self._nvml, "mock_gpu_nvml_users").value
        return found + ([f"NVML x{users}"] if users else [])

    def free_bytes(self) -> int:
        """Of the device's memory."""
        return int(call(started_driver().cuMemGetInfo)[0])


@functools.cache
def _loaded() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    if reason := mock_gpu.lacks():
        pytest.skip(f"the mock GPU cannot be built: {reason}")
    folder = mock_gpu.libraries(mock_gpu.build())
    names = ("libcuda.so.1", "libnvidia-ml.so.1")
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    if any(Path(path).name.startswith(("libcuda.so", "libnvidia-ml.so")) for path in mapped):
        pytest.skip("this process has loaded the driver of a real GPU")
    cuda, nvml = (ctypes.CDLL(str(folder / name)) for name in names)
    return cuda, nvml
