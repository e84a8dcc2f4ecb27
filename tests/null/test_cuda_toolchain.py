"""The CUDA toolchain without TVM: missing parts are named, sources made lean, cubins real."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from gpu_aware_tune.codegen import cuda_toolchain
from gpu_aware_tune.codegen.cuda_source import lean_source
from gpu_aware_tune.codegen.cuda_toolchain import (
    compile_cubin,
    environment,
    find_toolchain,
    packed_imports,
)
from gpu_aware_tune.errors import SetupError

INSTALL = r'pip install "gpu-aware-tune\[cuda\]"'

# The beginning of a source as TVM 0.27 generates it.
HEAD = """
#ifdef __CUDACC_RTC__
  #include <cuda/std/cstdint>
  using cuda::std::uint8_t;
  #include <cuda/std/type_traits>
  namespace std {
    using cuda::std::is_same;
  }
  #ifndef __asm__
  #define __asm__ asm
  #endif
#else
  #include <cstdint>
  #include <type_traits>
  #include <cuda.h>
#endif

#define uint unsigned int
"""
BODY = 'extern "C" __global__ void k(float* a, int64_t n) { if (n > 0) a[threadIdx.x] = 2.f; }\n'

try:
    find_toolchain()
    REASON = ""
except SetupError as error:
    REASON = str(error)
needs_wheels = pytest.mark.skipif(bool(REASON), reason=REASON or "installed")


@pytest.fixture(autouse=True)
def _forget() -> None:
    find_toolchain.cache_clear()


def sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file by name."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    text = headers[names][4]
    found = {}
    for name, kind, _flags, _address, offset, length in headers:
        end = elf.index(b"\0", text + name)
        found[elf[text + name : end].decode()] = b"" if kind == 8 else elf[offset : offset + length]
    return found


def is_cubin(elf: bytes) -> bool:
    return elf[:4] == b"\x7fELF" and struct.unpack_from("<H", elf, 18)[0] == 190  # EM_CUDA


# Finding it ---------------------------------------------------------------------------------------


def wheel_folder(tmp_path: Path, without: str = "") -> Path:
    root = tmp_path / "nvidia" / "cu13"
    for name in cuda_toolchain._NEEDED:
        if name != without:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    return root


def test_what_is_needed_beside_nvrtc() -> None:
    """Without crt the tensor core header mma.h ends in an error."""
    wheels = {"nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-cuda-crt"}
    assert set(cuda_toolchain._NEEDED.values()) == wheels


@pytest.mark.parametrize(("name", "wheel"), cuda_toolchain._NEEDED.items())
def test_a_missing_header_names_its_wheel_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wheel: str
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="the wheels are not installed")
    root = wheel_folder(tmp_path, without=name)
    monkeypatch.setattr(cuda_toolchain, "_wheel_root", lambda: root)
    with pytest.raises(SetupError, match=rf"^{wheel} is not installed .*{INSTALL}$"):
        find_toolchain()


def test_missing_bindings_name_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(SetupError, match=INSTALL):
        environment()


def test_no_wheel_at_all_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia").mkdir()
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SetupError, match=INSTALL):
        cuda_toolchain._wheel_root()
    assert not cuda_toolchain.preload_runtime()
    assert cuda_toolchain.runtime_environment() == {}


@needs_wheels
@pytest.mark.parametrize("other", ["a regular package", "without headers"])
def test_wheels_beside_others_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Older wheels make `nvidia` a package that hides ours; torch brings libraries and no headers."""
    ours = tmp_path / "ours" / "nvidia" / "cu13"
    theirs = tmp_path / "theirs" / "nvidia"
    (theirs / "cu13").mkdir(parents=True)
    if other == "a regular package":
        (theirs / "cu13").rmdir()
        (theirs / "__init__.py").touch()
    for name in cuda_toolchain._NEEDED:
        (ours / name).parent.mkdir(parents=True, exist_ok=True)
        (ours / name).touch()
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert cuda_toolchain._wheel_root() == ours


def test_a_build_workers_environment() -> None:
    env = environment()
    root = Path(env["CUDA_PATH"])
    assert (root / "include" / "cuda_runtime.h").is_file()
    assert env["TVM_CUDA_NVRTC_EXTRA_OPTS"] == f"-I{root}/include/cccl"
    assert env["TVM_COMPILE_FORCE_FALLBACK"] == "1"
    assert "/usr/local" not in str(root)
    assert list(root.glob("lib/libcudart.so.*"))
    assert cuda_toolchain.runtime_environment()["LD_LIBRARY_PATH"].startswith(f"{root}/lib")


# Lean sources -------------------------------------------------------------------------------------


def test_the_standard_headers_go_and_the_kernel_stays() -> None:
    lean = lean_source(HEAD + BODY)
    assert lean is not None
    assert "#include" not in lean
    assert lean.endswith("#define uint unsigned int\n" + BODY)
    assert "typedef signed long long int64_t;" in lean


@pytest.mark.parametrize(
    "source",
    [
        BODY,  # not TVM's
        "// by hand\n" + HEAD + BODY,
        HEAD + "__device__ std::is_same<int, int> f();\n" + BODY,
        HEAD + "__device__ cuda::std::uint8_t f();\n" + BODY,
        HEAD + "__device__ ::cuda::std::uint8_t f();\n" + BODY,
        HEAD + "__global__ void g(const __grid_constant__ CUtensorMap map);\n" + BODY,
    ],
)
def test_sources_that_need_the_headers_are_left_alone(source: str) -> None:
    assert lean_source(source) is None


def test_tensor_core_sources_are_made_lean() -> None:
    kernel = HEAD + "#include <mma.h>\nnvcuda::wmma::fragment<int> f;\n" + BODY
    lean = lean_source(kernel)
    assert lean is not None
    assert "#include <mma.h>" in lean


# Compiling ----------------------------------------------------------------------------------------


@needs_wheels
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_cubin_without_a_gpu(arch: str) -> None:
    cubin = compile_cubin(HEAD + BODY, arch)
    assert is_cubin(cubin)
    assert ".text.k" in sections(cubin)


@needs_wheels
def test_tensor_cores_and_half_compile() -> None:
    kernel = """
#include <cuda_fp16.h>
#include <mma.h>
extern "C" __global__ void k(half* a) {
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, half> c;
  nvcuda::wmma::fill_fragment(c, 0.f);
  nvcuda::wmma::store_matrix_sync(a, c, 16, nvcuda::wmma::mem_row_major);
}
"""
    assert is_cubin(compile_cubin(HEAD + kernel, "sm_90a"))


@needs_wheels
def test_a_kernel_that_does_not_fit_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The assembler's refusal is final: the slow way would come to the same end."""
    monkeypatch.setattr(cuda_toolchain, "_compile_as_tvm", lambda *_: pytest.fail("tried again"))
    large = 'extern "C" __global__ void k(float* a) { __shared__ float s[99999]; s[threadIdx.x] = '
    with pytest.raises(RuntimeError, match=r"ptxas.*shared"):
        compile_cubin(HEAD + large + "1; __syncthreads(); a[0] = s[1]; }\n", "sm_90a")


@needs_wheels
def test_what_lean_cannot_do_is_compiled_as_tvm_would(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def as_tvm(source: str, arch: str) -> bytes:
        seen.append(source)
        return b"cubin"

    monkeypatch.setattr(cuda_toolchain, "_compile_as_tvm", as_tvm)
    broken = HEAD + 'extern "C" __global__ void k(float* a) { a[0] = is_missing(1); }\n'
    assert compile_cubin(broken, "sm_90a") == b"cubin"
    assert compile_cubin(HEAD + "std::is_same<int, int> x;\n", "sm_90a") == b"cubin"
    assert len(seen) == 2


# Packing ------------------------------------------------------------------------------------------


def test_packed_modules_keep_their_tree_and_get_cubins(monkeypatch: pytest.MonkeyPatch) -> None:
    string = cuda_toolchain._string
    tree = struct.pack("<4Q", 3, 0, 1, 1) + struct.pack("<2Q", 1, 1)
    functions = struct.pack("<Q", 1) + string(b"main_kernel") + b"facts"
    other = string(b"const_loader") + string(b"weights")

    def blob(kind: bytes, code: bytes) -> bytes:
        module = string(kind) + functions + string(code)
        body = tree + string(b"_lib") + other + string(b"cuda") + string(module)
        return struct.pack("<Q", len(body)) + body

    class Tensor:
        def numpy(self) -> Tensor:
            return self

        def tobytes(self) -> bytes:
            return blob(b"cuda", b"source")

    class Tvm:
        get_global_func = staticmethod(lambda name: lambda module: Tensor())

    monkeypatch.setitem(sys.modules, "tvm", Tvm)
    monkeypatch.setattr(cuda_toolchain, "cuda_sources", lambda module: ["another", "source"])
    monkeypatch.setattr(
        cuda_toolchain, "compile_cubin", lambda source, arch: f"<{source} {arch}>".encode()
    )
    assert packed_imports(object(), "sm_90a") == blob(b"cubin", b"<source sm_90a>")
    monkeypatch.setattr(cuda_toolchain, "cuda_sources", lambda module: ["another"])
    with pytest.raises(RuntimeError, match="serialised form"):
        packed_imports(object(), "sm_90a")
