"""Compile CUDA kernels to cubins with NVRTC from pip wheels: no CUDA toolkit, no GPU needed.

TVM generates CUDA C++; NVRTC turns it into a cubin. Most of TVM's own compile time is the C++ front
end reading `<cuda/std/type_traits>`, which TVM includes in every kernel and nearly no kernel uses. So
the lines that include it are replaced by the few typedefs a kernel needs. The machine code stays the
same to the byte (tests/tvm/test_cuda_build.py), the cubin loses 51 kB of symbols, and a typical kernel
compiles two to six times faster.
A source that does use the standard library is compiled as TVM would compile it.

Kernels are always built with TVM's "fallback" module, which carries source text, with a GPU present
or not: build workers then never touch CUDA, and there is one way to an artifact, `export_module`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_aware_tune.codegen.cuda_source import lean_source, with_tf32_tiles
from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.linking import run_linker

INSTALL = 'pip install "gpu-aware-tune[cuda]"'

# Which wheel brings which of the files that a compile cannot do without.
_NEEDED = {
    "include/cuda_runtime.h": "nvidia-cuda-runtime",
    "include/cccl/cuda/std/cstdint": "nvidia-cuda-cccl",
    "include/crt/mma.h": "nvidia-cuda-crt",
}

# What TVM's own compile passes, so that a kernel runs as fast as it would there.
_FLAGS = (
    "-default-device",
    "--device-int128",
    *(
        f"-D__NV_SILENCE_{side}DEPRECATION_{end}="
        for side in ("", "HOST_")
        for end in ("BEGIN", "END")
    ),
    *(
        f"-U__CUDA_NO_{kind}__"
        for kind in (
            "HALF_OPERATORS",
            "HALF_CONVERSIONS",
            "BFLOAT16_OPERATORS",
            "BFLOAT16_CONVERSIONS",
            "BFLOAT162_OPERATORS",
            "BFLOAT162_CONVERSIONS",
        )
    ),
    "--use_fast_math",
    "--ptxas-options=--register-usage-level=10",
)

_BLOB_SYMBOL = "__tvm_ffi__library_bin"


@dataclass(frozen=True)
class Toolchain:
    """NVRTC and the headers it reads."""

    root: Path
    version: tuple[int, int]

    @property
    def include_dirs(self) -> tuple[Path, ...]:
        """Where headers are looked for."""
        return self.root / "include", self.root / "include" / "cccl"


@functools.cache
def find_toolchain() -> Toolchain:
    """Find NVRTC and its headers among the installed wheels.

    Raises:
        SetupError: something is missing; the text says what and how to get it.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise SetupError(f"cuda-bindings is not installed ({error}): {INSTALL}") from error
    root = _wheel_root()
    for name, wheel in _NEEDED.items():
        if not (root / name).is_file():
            raise SetupError(f"{wheel} is not installed (no {root / name}): {INSTALL}")
    # The bindings look for it in the interpreter's own site-packages alone, not where PYTHONPATH says;
    # it asks for its own second library by name.
    for pattern in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):
        _load_global(root, pattern)
    try:
        code, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the bindings raise RuntimeError where the library cannot be loaded
        text = " ".join(str(error).split())[:200]
        raise SetupError(f"nvidia-cuda-nvrtc is not usable ({text}): {INSTALL}") from error
    if int(code) != 0:
        raise SetupError(f"NVRTC does not start ({code!r}): {INSTALL}")
    return Toolchain(root, (int(major), int(minor)))


def environment() -> dict[str, str]:
    """Variables a build worker needs before it imports TVM.

    CUDA_PATH and the include flag are for TVM's own NVRTC call, which compiles what `lean_source`
    cannot; the last one keeps TVM from compiling by itself and from touching the GPU.
    """
    toolchain = find_toolchain()
    return {
        "CUDA_PATH": str(toolchain.root),
        "TVM_CUDA_NVRTC_EXTRA_OPTS": f"-I{toolchain.include_dirs[1]}",
        "TVM_COMPILE_FORCE_FALLBACK": "1",
    }


def compile_cubin(source: str, arch: str) -> bytes:
    """Compile CUDA source as TVM generates it into a cubin for `arch` ("sm_90a").

    Raises:
        SetupError: the toolchain is not installed.
        RuntimeError: the source does not compile; the text is NVRTC's log, its last line the reason.
    """
    toolchain = find_toolchain()
    source = with_tf32_tiles(source)
    lean = lean_source(source)
    if lean is not None:
        try:
            return _nvrtc(lean, arch, toolchain)
        except RuntimeError as error:
            if "ptxas" in str(error):  # past the front end: too much shared memory, for instance
                raise
    return _compile_as_tvm(source, arch)


def export_module(module: Any, path: Path, arch: str) -> None:
    """Write a built TVM module as a shared library that holds host code and cubins.

    Args:
        module: what `tvm.tirx.build` or `tvm.compile` gave, with CUDA modules among its imports.
        path: the shared library to write; loading it needs TVM's CUDA runtime and no compiler.
        arch: the architecture to compile for.
    """
    module.export_library(str(path), fcompile=link, fpack_imports=packer(arch))


def packer(arch: str) -> Callable[..., str]:
    """The `fpack_imports` argument of TVM's `export_library`: packs cubins instead of source."""

    def pack(module: Any, is_system_lib: bool, prefix: str, folder: str) -> str:
        blob = Path(folder) / "devices.bin"
        blob.write_bytes(packed_imports(module, arch))
        start = "_binary_devices_bin_start"  # the name ld makes of the file's
        run_linker("-r", "-b", "binary", blob.name, "-o", "devices.o",
                   f"--defsym={prefix}{_BLOB_SYMBOL}={start}", folder=Path(folder), packs=True)  # fmt: skip
        return str(Path(folder) / "devices.o")

    return pack


def link(path: str, objects: Sequence[str], **_: Any) -> None:
    """The `fcompile` argument of TVM's `export_library`: one call of the linker, 4 ms."""
    run_linker(
        "-shared", "-o", os.path.abspath(path), *objects, folder=Path(path).absolute().parent
    )


def has_gpu_kernels(module: Any) -> bool:
    """Whether a loaded library has GPU kernels: they are imports of the host code that it imports."""
    return any(each.kind == "cuda" or has_gpu_kernels(each) for each in module.imports)


def packed_imports(module: Any, arch: str) -> bytes:
    """The modules that `module` imports as TVM serialises them, CUDA source replaced by cubins."""
    import tvm

    packed: bytes = (
        tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
    )
    sources = [source.encode() for source in cuda_sources(module)]
    out = bytearray()
    for key, payload in _entries(packed[8:], out):
        out += _string(key)
        if payload is None:
            continue
        if key == b"cuda":
            payload = _with_cubin(payload, sources, arch)
        out += _string(payload)
    return struct.pack("<Q", len(out)) + bytes(out)


def cuda_sources(module: Any) -> list[str]:
    """The CUDA source of every module in the import tree that still is source."""
    found, stack = [], [module]
    while stack:
        current = stack.pop()
        stack.extend(current.imports)
        if current.kind == "cuda" and (source := current.inspect_source("cuda")):
            found.append(str(source))
    return found


def preload_runtime() -> bool:
    """Load the CUDA runtime library of the wheel, for TVM to find; call before importing TVM.

    Returns whether it could be loaded. Without it TVM's CUDA runtime needs a system-wide CUDA.
    """
    try:
        return _load_global(_wheel_root(), "libcudart.so.*")
    except SetupError:
        return False


def runtime_environment() -> dict[str, str]:
    """`preload_runtime` for this process, and for those it is about to start what they need for it.

    Returns the variables to start them with; empty without the wheel.
    """
    preload_runtime()
    try:
        folder = str(_wheel_root() / "lib")
    except SetupError:
        return {}
    former = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, [folder, former]))}


def _wheel_root() -> Path:
    """The folder that NVIDIA's CUDA 13 wheels share: site-packages/nvidia/cu13.

    There may be several, such as torch's, which has no headers: the first that has them all counts.
    `sys.path` is looked through too, since a wheel that makes `nvidia` a regular package hides others.
    """
    spec = importlib.util.find_spec("nvidia")
    named = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    beside = [Path(entry or ".") / "nvidia" for entry in sys.path]
    roots = [folder / "cu13" for folder in (*named, *beside)]
    found = [root for root in roots if root.is_dir()]
    if not found:
        raise SetupError(f"nvidia-cuda-nvrtc is not installed (no nvidia/cu13 folder): {INSTALL}")
    return next((r for r in found if all((r / name).is_file() for name in _NEEDED)), found[0])


def _load_global(root: Path, pattern: str) -> bool:
    """Load a library of a wheel, so that whoever asks for it by name afterwards gets this one."""
    library = next((root / "lib").glob(pattern), None)
    if library is None:
        return False
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _nvrtc(source: str, arch: str, toolchain: Toolchain) -> bytes:
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={arch}", *_FLAGS]
    options += [f"-I{folder}" for folder in toolchain.include_dirs]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"tvm_kernels.cu", 0, None, None))
    try:
        (code,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        if int(code) != 0:
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(log.decode(errors="replace").rstrip("\0\n"))
        cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(result: tuple[Any, ...]) -> Any:
    if int(result[0]) != 0:
        raise RuntimeError(f"NVRTC call failed: {result[0]!r}")
    return result[1] if len(result) > 1 else None


def _compile_as_tvm(source: str, arch: str) -> bytes:
    from tvm.support import nvcc

    added = {k: v for k, v in environment().items() if k not in os.environ}
    os.environ.update(added)
    try:
        return bytes(nvcc.compile_cuda(source, "cubin", arch=arch, compiler="nvrtc"))
    except RuntimeError as error:
        raise RuntimeError(_with_reason(str(error))) from error
    finally:
        for name in added:
            del os.environ[name]


def _with_reason(log: str) -> str:
    """NVRTC's log with its first error as the last line, where a failure's reason is looked for."""
    lines = [line.strip("\0 ") for line in log.splitlines()]
    return "\n".join([*lines, next((line for line in lines if "error:" in line), "")]).rstrip()


def _with_cubin(payload: bytes, sources: Sequence[bytes], arch: str) -> bytes:
    """A serialised CUDA module (format, functions, code) with its source compiled."""
    kind, functions = _take_string(payload)
    if kind != b"cuda":
        return payload  # compiled already
    for source in sources:
        code = _string(source)
        if functions.endswith(code):
            cubin = compile_cubin(source.decode(), arch)
            return _string(b"cubin") + functions[: -len(code)] + _string(cubin)
    raise RuntimeError("a CUDA module's serialised form is not the one TVM 0.27 writes")


def _entries(data: bytes, out: bytearray) -> Iterator[tuple[bytes, bytes | None]]:
    """Each serialised module as (kind, bytes); the import tree in front is copied to `out`."""
    start = 0
    for _ in range(2):  # row pointers and child indices, each a count and its 64-bit numbers
        start += 8 * (1 + struct.unpack_from("<Q", data, start)[0])
    out += data[:start]
    rest = data[start:]
    while rest:
        key, rest = _take_string(rest)
        payload = None  # "_lib" marks the place of the host code, which is elsewhere
        if key != b"_lib":
            payload, rest = _take_string(rest)
        yield key, payload


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _take_string(data: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return data[8 : 8 + length], data[8 + length :]
