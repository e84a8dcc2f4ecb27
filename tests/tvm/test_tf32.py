"""TF32: which kernels may use it, what their search space makes, and that its numbers are right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gpu_aware_tune.workers.warm import load_tvm

load_tvm()

import tvm  # noqa: E402
from tf32_kernels import (  # noqa: E402
    ARCH,
    CUDA,
    FUNCTIONS,
    matmul,
    module_of,
    on_tensor_cores,
)
from tiny_library import target as llvm  # noqa: E402
from tiny_library import write_onnx  # noqa: E402
from tvm import te, topi  # noqa: E402
from tvm.s_tir import meta_schedule as ms  # noqa: E402
from tvm.s_tir.schedule import Schedule  # noqa: E402

from gpu_aware_tune.codegen import cuda_toolchain  # noqa: E402
from gpu_aware_tune.codegen.compile import compile_model  # noqa: E402
from gpu_aware_tune.codegen.cuda_source import lean_source, with_tf32_tiles  # noqa: E402
from gpu_aware_tune.errors import SetupError, UserError  # noqa: E402
from gpu_aware_tune.finalize.kernel_check import _TF32  # noqa: E402
from gpu_aware_tune.finalize.verify import base_error, computed_in  # noqa: E402
from gpu_aware_tune.kernels.space import make_space  # noqa: E402
from gpu_aware_tune.kernels.tf32 import TF32_INTRINSICS, is_marked, mark_products  # noqa: E402
from gpu_aware_tune.kernels.traces import (  # noqa: E402
    apply_trace,
    module_to_json,
    task_hash,
    trace_to_json,
)
from gpu_aware_tune.model.importer import load_model  # noqa: E402
from gpu_aware_tune.model.tasks import extract  # noqa: E402

try:
    cuda_toolchain.find_toolchain()
except SetupError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _worker_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda_toolchain.environment().items():
            patch.setenv(name, value)
        yield


def source_of(schedule: Schedule) -> str:
    (source,) = cuda_toolchain.cuda_sources(tvm.tirx.build(schedule.mod, target=CUDA))
    return source


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_compute_in_tf32(name: str, mock_gpu: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("tf32_kernels.py"), name, "5"],
        env=mock_gpu,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert 1e-5 < found["rounding"] < _TF32 / 2
    assert all(kernel["difference"] < 2e-6 for kernel in found["kernels"]), found
    ahead = {kernel["ahead"] for kernel in found["kernels"]}
    assert ahead == {True, False}, "with and without fetching ahead"


def test_the_hardware_s_instructions_are_tf32_s() -> None:
    from cuda.bindings import nvrtc

    (_, schedule), *_ = on_tensor_cores(module_of(matmul(64, 64, 64)), 8)
    source = lean_source(with_tf32_tiles(source_of(schedule)))
    assert source is not None
    options = [b"--gpu-architecture=compute_80", *_includes()]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, None, None)
    assert int(nvrtc.nvrtcCompileProgram(program, len(options), options)[0]) == 0
    ptx = bytearray(nvrtc.nvrtcGetPTXSize(program)[1])
    nvrtc.nvrtcGetPTX(program, ptx)
    text = ptx.decode()
    assert re.search(r"wmma\.mma\.sync\.aligned\.row\.\w+\.m16n16k8\.f32\.tf32\.tf32\.f32", text)
    assert "cvt.rna.tf32.f32" in text, "the factors are to be rounded"
    assert ".f16" not in text, "a half somewhere"


def _includes() -> list[bytes]:
    return [f"-I{folder}".encode() for folder in cuda_toolchain.find_toolchain().include_dirs]


def test_rows_of_shared_memory_are_skewed_against_bank_conflicts() -> None:
    strides: dict[str, set[int]] = {}
    for _, schedule in on_tensor_cores(module_of(matmul(64, 64, 64)), 12):
        source = source_of(schedule)
        layouts = re.findall(r"half, nvcuda::wmma::(\w+)> (\w+?)_ptr", source)
        for layout, tile in layouts:
            loads = re.findall(rf"load_matrix_sync\({tile}_ptr\[.*, (\d+)\);", source)
            assert loads
            key = f"{tile.rpartition('_')[2]} {layout}"
            strides.setdefault(key, set()).update(int(stride) % 32 for stride in loads)
    assert strides == {"a row_major": {4}, "b row_major": {8}, "b col_major": {4}}


def test_every_kernel_may_stay_in_float32() -> None:
    module = module_of(matmul(64, 64, 64))
    context = ms.TuneContext(
        mod=module, target=CUDA, space_generator=make_space(module, CUDA, 40), num_threads=1
    ).clone()
    designs = [trace_to_json(schedule.trace) for schedule in context.generate_design_space()]
    tiled = [TF32_INTRINSICS in design for design in designs]
    assert sum(tiled) == 4, "rows or columns of b, with and without fetching ahead"
    assert not all(tiled)


def test_without_the_mark_there_is_no_tf32_and_another_task() -> None:
    function = matmul(64, 64, 64)
    module = module_of(function, marked=False)
    assert not on_tensor_cores(module, 8)
    assert task_hash(module) != task_hash(module_of(function))


def test_a_trace_can_be_replayed_where_nothing_is_registered() -> None:
    module = module_of(matmul(64, 64, 64))
    (trace, schedule), *_ = on_tensor_cores(module, 8)
    tvm.ir.assert_structural_equal(apply_trace(trace, module).mod, schedule.mod)
    script = (
        "import sys; from gpu_aware_tune.kernels.traces import apply_trace, module_from_json;"
        "apply_trace(sys.argv[1], module_from_json(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, trace, module_to_json(module)]
    subprocess.run(command, check=True, env=dict(os.environ), timeout=120)


def test_a_model_s_products_are_marked_and_nothing_else(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "tiny.onnx", channels=16)
    model = load_model(path, CUDA, dtype="tf32")
    marked = {t.name: is_marked(t.module["main"]) for t in extract(model, CUDA)}
    products = {name: "conv" in name or "matmul" in name for name in marked}
    assert marked == products and any(marked.values()) and not all(marked.values())
    assert base_error(model, computed_in(model)) == 1e-2
    without = load_model(path, CUDA)
    assert not any(is_marked(t.module["main"]) for t in extract(without, CUDA))
    assert base_error(without, computed_in(without)) == 1e-4
    assert model.hash == without.hash


def test_a_library_with_tf32_kernels_compiles(tmp_path: Path) -> None:
    model = load_model(write_onnx(tmp_path / "tiny.onnx", channels=16), CUDA, dtype="tf32")
    tasks = [t for t in extract(model, CUDA) if is_marked(t.module["main"])]
    traces = {task.hash: on_tensor_cores(task.module, 6)[0][0] for task in tasks}
    executable = compile_model(model, CUDA, traces)
    source = "".join(cuda_toolchain.cuda_sources(executable.mod))
    assert source.count("wmma::mma_sync") >= len(tasks)
    cuda_toolchain.export_module(executable.mod, tmp_path / "tiny.so", ARCH)
    assert (tmp_path / "tiny.so").stat().st_size > 0


@pytest.mark.parametrize("arch", ["sm_75", "llvm"])
def test_devices_without_tf32_are_refused(tmp_path: Path, arch: str) -> None:
    target = llvm() if arch == "llvm" else tvm.target.Target({"kind": "cuda", "arch": arch})
    wanted = rf"dtype tf32 needs an NVIDIA GPU of sm_80 or newer, not {arch}: leave it out"
    with pytest.raises(UserError, match=wanted):
        load_model(write_onnx(tmp_path / "tiny.onnx"), target, dtype="tf32")


def test_a_model_without_products_is_refused() -> None:
    x = te.placeholder((8, 8), name="x")
    for function in (te.create_prim_func([x, topi.nn.relu(x)]), matmul(8, 8, 8, "float16")):
        with pytest.raises(UserError, match="no float32 matrix product or convolution"):
            mark_products(module_of(function, marked=False), CUDA)


def test_squares_are_no_products() -> None:
    x = te.placeholder((8, 8), name="x")
    k = te.reduce_axis((0, 8), name="k")
    squares = te.compute((8,), lambda i: te.sum(x[i, k] * x[i, k], k), name="squares")
    with pytest.raises(UserError, match="no float32 matrix product"):
        mark_products(module_of(te.create_prim_func([x, squares]), marked=False), CUDA)
