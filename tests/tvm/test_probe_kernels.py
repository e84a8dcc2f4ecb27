"""The kernels' PTX is what NVRTC makes of their source."""

from __future__ import annotations

import re

import pytest

from gpu_aware_tune.codegen.cuda_toolchain import compile_cubin, find_toolchain
from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.kernels import PTX, SOURCE

try:
    find_toolchain()
except SetupError as error:
    pytest.skip(str(error), allow_module_level=True)


def statements(ptx: str) -> list[str]:
    """The lines that count, without comments and with single spaces."""
    lines = (re.sub(r"\s+", " ", line.partition("//")[0]).strip() for line in ptx.splitlines())
    return [line for line in lines if line and not line.startswith(".version")]


def compiled() -> str:
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"kernels.cu", 0, None, None)
    options = [b"--gpu-architecture=compute_75", b"-default-device"]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert int(code) == 0
    _, size = nvrtc.nvrtcGetPTXSize(program)
    ptx = bytearray(size)
    nvrtc.nvrtcGetPTX(program, ptx)
    return ptx.decode().rstrip("\0")


def test_the_ptx_is_made_from_the_source() -> None:
    assert statements(PTX) == statements(compiled())


def test_the_source_compiles_for_the_card() -> None:
    assert compile_cubin(SOURCE, "sm_90a").startswith(b"\x7fELF")
