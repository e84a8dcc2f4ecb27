"""From a TVM kernel to a shared library with a cubin, on a machine without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import te

from benchmarks.cubin import machine_code
from gpu_aware_tune.codegen import cuda_toolchain
from gpu_aware_tune.codegen.cuda_source import lean_source
from gpu_aware_tune.errors import SetupError, last_line
from gpu_aware_tune.partition import find_device

try:
    cuda_toolchain.find_toolchain()
except SetupError as error:
    pytest.skip(str(error), allow_module_level=True)

ARCH = "sm_90a"


@pytest.fixture(autouse=True)
def _worker_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cuda_toolchain.environment().items():
        monkeypatch.setenv(name, value)


def build(dtype: str = "float32") -> Any:
    a = te.placeholder((1024,), name="a", dtype=dtype)
    b = te.compute((1024,), lambda i: te.max(a[i], te.const(0, dtype)), name="b")
    schedule = tvm.s_tir.Schedule(te.create_prim_func([a, b]))
    outer, inner = schedule.split(schedule.get_loops("b")[0], [8, 128])
    schedule.bind(outer, "blockIdx.x")
    schedule.bind(inner, "threadIdx.x")
    device, _ = find_device("cuda", 0, ARCH) if no_gpu() else find_device("cuda", 0, None)
    return tvm.tirx.build(schedule.mod, target=tvm.target.Target(device.target(132)))


@pytest.mark.parametrize("image", ["image", "gpu_0/image:0"])
def test_a_whole_model_compiles(tmp_path: Path, image: str) -> None:
    """Whatever its inputs are called: TVM writes their names into the source."""
    from tiny_library import write_onnx

    from gpu_aware_tune.codegen.compile import compile_model
    from gpu_aware_tune.model.importer import load_model

    device, _ = find_device("cuda", 0, ARCH if no_gpu() else None)
    target = tvm.target.Target(device.target(132))
    model = load_model(write_onnx(tmp_path / "tiny.onnx", image=image), target)
    assert [spec.name for spec in model.inputs] == [image, "bias"]
    executable = compile_model(model, target, {})
    assert "main_transform_params" in executable.stats()
    cuda_toolchain.export_module(executable.mod, tmp_path / "tiny.so", ARCH)
    assert b"\x7fELF" in (tmp_path / "tiny.so").read_bytes()[1:], "no cubin inside"


def no_gpu() -> bool:
    return not os.path.exists("/dev/nvidia0")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_machine_code_is_the_one_tvm_would_have_made(dtype: str) -> None:
    (source,) = cuda_toolchain.cuda_sources(build(dtype))
    assert lean_source(source) is not None, "TVM's head has changed"
    ours = cuda_toolchain.compile_cubin(source, ARCH)
    theirs = cuda_toolchain._compile_as_tvm(source, ARCH)
    assert machine_code(ours) == machine_code(theirs)
    assert len(ours) < len(theirs)


def test_tvms_own_flags_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that TVM adds, and we do not, would make our kernels slower or faster than its own."""
    from cuda.bindings import nvrtc

    seen: list[set[str]] = []
    compile_program = nvrtc.nvrtcCompileProgram

    def spy(program: Any, count: int, options: list[bytes]) -> Any:
        seen.append({o.decode() for o in options if not o.startswith(b"-I")})
        return compile_program(program, count, options)

    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", spy)
    (source,) = cuda_toolchain.cuda_sources(build())
    cuda_toolchain.compile_cubin(source, ARCH)
    cuda_toolchain._compile_as_tvm(source, ARCH)
    ours, theirs = seen
    # These two only print.
    assert theirs - ours == {
        "--ptxas-options=-v",
        "--ptxas-options=--warn-on-local-memory-usage",
    }
    assert ours <= theirs


def test_a_source_that_does_not_compile_gives_the_reason() -> None:
    (source,) = cuda_toolchain.cuda_sources(build())
    with pytest.raises(RuntimeError) as raised:
        cuda_toolchain.compile_cubin(source.replace("main_kernel(", "main kernel("), ARCH)
    assert re.fullmatch(r"tvm_kernels.*\(\d+\): error: .*", last_line(raised.value))


def test_an_artifact_holds_a_cubin_and_no_source(tmp_path: Path) -> None:
    module = build()
    (source,) = cuda_toolchain.cuda_sources(module)
    path = tmp_path / "kernel.so"
    cuda_toolchain.export_module(module, path, ARCH)
    data = path.read_bytes()
    assert cuda_toolchain.compile_cubin(source, ARCH) in data
    assert b"__global__" not in data
    assert list(tmp_path.iterdir()) == [path], "nothing else is left behind"


def write_whole_library(folder: Path) -> Path:
    """As the last stage of a run makes it, for a GPU that is not here."""
    from tvm.script import relax as R
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import relax as builder

    from gpu_aware_tune.finalize.library_build import compile_to_file
    from gpu_aware_tune.kernels.traces import module_to_json

    with IRBuilder() as made, builder.function():
        R.func_name("main")
        x = R.arg("x", R.Tensor((64, 64), "float32"))
        w = R.arg("w", R.Tensor((64, 64), "float32"))
        R.func_ret_value(R.emit(R.nn.relu(R.emit(R.matmul(x, w)))))
    device, _ = find_device("cuda", 0, ARCH if no_gpu() else None)
    target = device.target(32)
    module = tvm.IRModule({"main": made.get()})
    with tvm.target.Target(target):
        module = tvm.relax.transform.LegalizeOps()(module)
    path = folder / "lib.so"
    assert compile_to_file(module_to_json(module), target, {}, str(path), 2) is None
    return path


def test_a_whole_library_holds_cubins_and_no_source(tmp_path: Path) -> None:
    data = write_whole_library(tmp_path).read_bytes()
    assert b"\x7fELF" in data[1:], "no cubin inside"
    assert b"__global__" not in data


def test_the_graph_check_has_something_to_capture() -> None:
    """Check 6 compares with and without TVM's graphs, which hold only what the weights decide."""
    from gpu.check_children import products

    from gpu_aware_tune.codegen.compile import compile_module

    device, _ = find_device("cuda", 0, ARCH if no_gpu() else None)
    target = tvm.target.Target(device.target(132))
    for wanted in (False, True):
        with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": wanted}):
            text = compile_module(products(64), target, {}).as_text()
        assert ("cuda_graph.run_or_capture" in text) is wanted


RELOAD = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
from gpu_aware_tune.codegen import cuda_toolchain
from gpu_aware_tune.codegen.cuda_source import lean_source
assert cuda_toolchain.preload_runtime()
import tvm
assert "tvm_runtime_cuda" in tvm.base._LOADED_LIBS, "the mock's libcuda was not enough"
from gpu_aware_tune.codegen.cuda_toolchain import has_gpu_kernels
library = tvm.runtime.load_module(sys.argv[4])
assert library.kind == "relax.VMExecutable" and has_gpu_kernels(library), "verified on the CPU"
module = tvm.runtime.load_module(sys.argv[2])
(kernels,) = module.imports
assert kernels.kind == "cuda" and kernels.is_runnable()
packed = tvm.get_global_func("runtime.ModulePackImportsToTensor")(kernels).numpy().tobytes()
open(sys.argv[3], "wb").write(packed)
"""


@pytest.mark.skipif(not no_gpu(), reason="a real driver is here")
def test_tvms_cuda_runtime_reads_the_artifact(tmp_path: Path, mock_gpu: Mapping[str, str]) -> None:
    """As on a GPU up to the first launch: the runtime's own loader takes the cubin."""
    driver = Path(mock_gpu["LD_LIBRARY_PATH"]) / "libcuda.so.1"
    module = build()
    (source,) = cuda_toolchain.cuda_sources(module)
    artifact, packed = tmp_path / "kernel.so", tmp_path / "packed"
    cuda_toolchain.export_module(module, artifact, ARCH)
    library = write_whole_library(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, driver, artifact, packed, library],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert cuda_toolchain.compile_cubin(source, ARCH) in packed.read_bytes()
