"""The untuned schedules: right numbers, replayable, and much faster than plain loops."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tiny_library import target
from tvm import relax
from tvm.relax import op
from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

from gpu_aware_tune.finalize.kernel_check import kernel_inputs, verify_kernel
from gpu_aware_tune.kernels.packing import PACKING, mark_weights, without_packing
from gpu_aware_tune.kernels.schedules import baseline_schedules
from gpu_aware_tune.kernels.schedules.access import accesses_of, axes_of
from gpu_aware_tune.kernels.schedules.blocks import block_names, block_of, inline_elementwise
from gpu_aware_tune.kernels.schedules.planes import flatten_planes, interleave_rows
from gpu_aware_tune.kernels.schedules.tile_cost import AVX2, AVX512, STACK_BYTES, Machine
from gpu_aware_tune.kernels.schedules.tiles import best_tiles
from gpu_aware_tune.kernels.traces import apply_trace, trace_to_json

Spec = tuple[tuple[int, ...], str]
Make = Callable[..., Any]


def f32(*shape: int) -> Spec:
    return shape, "float32"


def kernels(make: Make, *specs: Spec, inputs: int | None = None) -> list[tvm.IRModule]:
    """The fused kernels of a small Relax function; `make` gets `emit` and the inputs.

    The parameters from number `inputs` on are weights.
    """
    builder = relax.BlockBuilder()
    variables = [relax.Var(f"p{n}", relax.TensorType(*spec)) for n, spec in enumerate(specs)]
    attrs = {"num_input": len(specs) if inputs is None else inputs}
    with builder.function("main", variables, attrs=attrs):
        with builder.dataflow():
            result = builder.emit_output(make(builder.emit, *variables))
        builder.emit_func_output(result)
    with target():
        module = mark_weights(relax.get_pipeline("zero")(builder.get()))
    return [task.dispatched[0] for task in extract_tasks(module, target())]


def conv(*, residual: bool = False, **options: Any) -> Make:
    def make(e: Any, x: Any, w: Any, bias: Any, *rest: Any) -> Any:
        y = e(op.add(e(op.nn.conv2d(x, w, **options)), bias))
        if residual:
            y = e(op.add(y, rest[0]))
        return op.nn.relu(y)

    return make


CASES: dict[str, tuple[Make, tuple[Spec, ...]]] = {
    "conv": (conv(padding=1), (f32(1, 16, 14, 14), f32(32, 16, 3, 3), f32(1, 32, 1, 1))),
    "conv of prime width, batch 2": (
        conv(padding=1),
        (f32(2, 8, 17, 17), f32(16, 8, 3, 3), f32(1, 16, 1, 1)),
    ),
    "strided conv": (
        conv(padding=3, strides=2),
        (f32(1, 3, 32, 32), f32(16, 3, 7, 7), f32(1, 16, 1, 1)),
    ),
    "1x1 conv, residual": (
        conv(residual=True),
        (f32(1, 32, 14, 14), f32(48, 32, 1, 1), f32(1, 48, 1, 1), f32(1, 48, 14, 14)),
    ),
    "1x1 conv of rows of 28, batch 2": (
        conv(),
        (f32(2, 16, 12, 28), f32(32, 16, 1, 1), f32(1, 32, 1, 1)),
    ),
    "1x1 conv, images transposed": (
        lambda e, x, w: op.nn.relu(e(op.permute_dims(e(op.nn.conv2d(x, w)), [0, 1, 3, 2]))),
        (f32(1, 16, 12, 12), f32(32, 16, 1, 1)),
    ),
    "conv of images that alias": (
        conv(padding=1),
        (f32(1, 32, 14, 14), f32(16, 32, 3, 3), f32(1, 16, 1, 1)),
    ),
    "conv of 1x1 images": (conv(), (f32(1, 64, 1, 1), f32(32, 64, 1, 1), f32(1, 32, 1, 1))),
    "depthwise conv": (
        conv(padding=1, groups=16),
        (f32(1, 16, 20, 24), f32(16, 1, 3, 3), f32(1, 16, 1, 1)),
    ),
    "strided depthwise conv": (
        conv(padding=1, groups=16, strides=2),
        (f32(1, 16, 20, 24), f32(16, 1, 3, 3), f32(1, 16, 1, 1)),
    ),
    "grouped conv": (
        conv(padding=1, groups=4),
        (f32(1, 16, 14, 14), f32(32, 4, 3, 3), f32(1, 32, 1, 1)),
    ),
    "dilated conv": (
        conv(padding=2, dilation=2),
        (f32(1, 8, 16, 16), f32(16, 8, 3, 3), f32(1, 16, 1, 1)),
    ),
    "transposed conv": (
        lambda e, x, w: op.nn.conv2d_transpose(x, w, strides=2, padding=1, output_padding=1),
        (f32(1, 8, 7, 7), f32(8, 8, 3, 3)),
    ),
    "conv with an exp in its consumer": (
        lambda e, x, w: op.nn.silu(e(op.nn.conv2d(x, w))),
        (f32(1, 8, 14, 14), f32(16, 8, 1, 1)),
    ),
    "float16 conv": (
        lambda e, x, w: op.nn.conv2d(x, w, padding=1),
        (((1, 8, 14, 14), "float16"), ((16, 8, 3, 3), "float16")),
    ),
    "matmul with bias": (
        lambda e, x, w, b: op.add(e(op.matmul(x, w)), b),
        (f32(24, 48), f32(48, 96), f32(96)),
    ),
    "batched matmul": (lambda e, x, w: op.matmul(x, w), (f32(4, 16, 32), f32(4, 32, 24))),
    "matmul of odd sizes": (lambda e, x, w: op.matmul(x, w), (f32(7, 33), f32(33, 129))),
    "matrix times vector": (lambda e, x, w: op.matmul(w, x), (f32(256, 1), f32(96, 256))),
    "int8 matmul": (
        lambda e, x, w: op.matmul(x, w, out_dtype="int32"),
        (((16, 32), "int8"), ((32, 24), "int8")),
    ),
    "softmax": (lambda e, x: op.nn.softmax(x, -1), (f32(6, 64, 64),)),
    "softmax along channels": (lambda e, x: op.nn.softmax(x, 1), (f32(1, 21, 16, 16),)),
    "layer norm": (
        lambda e, x, g, b: op.nn.layer_norm(x, g, b, axes=[-1]),
        (f32(1, 32, 96), f32(96), f32(96)),
    ),
    "max pooling": (lambda e, x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1)), (f32(1, 8, 30, 30),)),
    "average pooling": (lambda e, x: op.nn.avg_pool2d(x, (3, 3)), (f32(1, 8, 14, 14),)),
    "mean over an image": (lambda e, x: op.mean(x, [2, 3]), (f32(1, 64, 7, 7),)),
    "sum of everything": (lambda e, x: op.sum(x), (f32(64, 100),)),
    "largest index": (lambda e, x: op.argmax(x, -1), (f32(16, 100),)),
    "erf": (lambda e, x: op.nn.gelu(x), (f32(8, 100),)),
    "concatenation": (lambda e, x, y: op.concat([x, y], 1), (f32(1, 4, 9, 9), f32(1, 8, 9, 9))),
    "transposition": (lambda e, x: op.permute_dims(x, [0, 2, 1]), (f32(3, 50, 64),)),
    "resize": (
        lambda e, x: op.image.resize2d(x, (20, 20), method="linear", layout="NCHW"),
        (f32(1, 4, 10, 10),),
    ),
    "gather": (lambda e, x, i: op.take(x, i, axis=0), (f32(100, 32), ((1, 16), "int64"))),
    "broadcast": (lambda e, x, y: op.add(x, y), (f32(4, 16, 8), f32(16, 1))),
}


@pytest.mark.parametrize("name", CASES)
def test_every_schedule_replays_and_computes_the_same(name: str) -> None:
    make, specs = CASES[name]
    for module in kernels(make, *specs):
        schedules = baseline_schedules(module, target(), most=2)
        assert schedules
        for schedule in schedules:
            trace = trace_to_json(schedule.trace)
            assert tvm_ffi.structural_equal(apply_trace(trace, module).mod, schedule.mod)
            check = verify_kernel(module, trace, target(), seed=1)
            assert check.ok, check


@pytest.mark.parametrize("name", [name for name, (_, specs) in CASES.items() if len(specs) > 1])
def test_schedules_may_pack_weights(name: str) -> None:
    make, specs = CASES[name]
    for module in kernels(make, *specs, inputs=1):
        for schedule in baseline_schedules(module, target(), most=2):
            check = verify_kernel(module, trace_to_json(schedule.trace), target(), seed=1)
            assert check.ok, check
            tvm.tirx.build(without_packing(schedule.mod), target=target())


def test_a_weight_is_packed_when_the_library_is_loaded_an_input_at_every_call() -> None:
    shapes = f32(1, 32, 7, 7), f32(64, 32, 1, 1), f32(1, 64, 1, 1)
    texts = []
    for inputs in (1, 3):
        (module,) = kernels(conv(), *shapes, inputs=inputs)
        schedules = baseline_schedules(module, target(), most=24)
        texts.append("\n".join(trace_to_json(schedule.trace) for schedule in schedules))
    assert PACKING in texts[0]
    assert PACKING not in texts[1]
    assert "CacheRead" in texts[1]


def test_the_module_itself_is_left_alone() -> None:
    (module,) = kernels(*_case("conv"))
    before = tvm_ffi.structural_hash(module)
    baseline_schedules(module, target())
    assert tvm_ffi.structural_hash(module) == before


@pytest.mark.parametrize("name", ["conv", "matmul with bias", "strided conv"])
def test_results_stay_in_registers_and_threads_share_the_work(name: str) -> None:
    """Accumulators TVM would put on the heap, or a serial kernel, would be slow in silence."""
    make, specs = CASES[name]
    big = tuple((_grown(shape), dtype) for shape, dtype in specs)
    (module,) = kernels(make, *big)
    (schedule,) = baseline_schedules(module, target(), most=1)
    text = schedule.mod.script()
    assert "T.parallel" in text
    assert "T.vectorized" in text
    assert "T.unroll" in text
    assert "_init" in text  # the reduction was decomposed


def test_conv_is_far_faster_than_its_plain_loops() -> None:
    (module,) = kernels(conv(padding=1), f32(1, 64, 28, 28), f32(64, 64, 3, 3), f32(1, 64, 1, 1))
    (schedule,) = baseline_schedules(module, target(), most=1)
    plain, scheduled = _seconds(module, 1), _seconds(schedule.mod, 5)
    assert plain / scheduled > 6  # 40 on a quiet machine


def test_alternatives_differ() -> None:
    (module,) = kernels(*_case("conv"))
    traces = [trace_to_json(schedule.trace) for schedule in baseline_schedules(module, target())]
    assert len(traces) == 3
    assert len(set(traces)) == 3
    more = [trace_to_json(s.trace) for s in baseline_schedules(module, target(), most=12)]
    assert more[:3] == traces
    assert len(set(more)) == 12


@pytest.mark.parametrize("cpu", ["haswell", "skylake-avx512", "znver4"])
def test_tiles_fit_the_registers_of_the_processor(cpu: str) -> None:
    from gpu_aware_tune.kernels.schedules.cpu import machine_of

    machine = machine_of(tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": 4}))
    narrow = cpu == "haswell"
    sizes = (8, 16, 4, AVX2) if narrow else (16, 32, 4, AVX512)
    assert machine == Machine(*sizes, dots=machine.dots)
    instructions = {"haswell": "vpmaddwd_8x2", "skylake-avx512": "vpmaddwd_16x2"}
    assert machine.dots and machine.dots.name == instructions.get(cpu, "vpdpbusd_16x4")
    (module,) = kernels(*_case("conv"))
    block = block_of(tvm.s_tir.Schedule(module), "conv2d_nchw")
    axes, operands = axes_of(block), accesses_of(block, block.reads)
    result = accesses_of(block, block.writes)
    assert axes and operands and result
    tiles = best_tiles(axes, operands, result[0], machine)
    assert tiles
    for tile in tiles:
        registers = int(np.prod(tile.counts))
        assert tile.lanes <= machine.lanes
        assert registers < machine.registers
        assert registers * tile.lanes * 4 < STACK_BYTES


def test_access_strides_are_those_of_memory() -> None:
    (module,) = kernels(*_case("strided conv"))
    block = block_of(tvm.s_tir.Schedule(module), "conv2d_nchw")
    data, weights = accesses_of(block, block.reads) or []
    names = [str(iter_var.var.name) for iter_var in block.iter_vars]
    strides = dict(zip(names, data.strides, strict=True))
    assert (strides["v_ff"], strides["v_yy"], strides["v_xx"]) == (0, 2 * 38, 2)
    assert (strides["v_rc"], strides["v_ry"], strides["v_rx"]) == (38 * 38, 38, 1)
    assert dict(zip(names, weights.strides, strict=True))["v_ff"] == 3 * 7 * 7


def test_an_index_that_is_computed_has_no_stride() -> None:
    (module,) = kernels(*_case("resize"))
    block = block_of(tvm.s_tir.Schedule(module), "resize")
    (read,) = accesses_of(block, block.reads) or []
    assert read.strides[1:] == (100, None, None)
    for schedule in baseline_schedules(module, target(), most=1):
        assert "T.vectorized" not in schedule.mod.script()


def test_what_a_resize_reads_several_times_is_transposed_first() -> None:
    def make(e: Any, x: Any) -> Any:
        image = e(op.permute_dims(x, [0, 3, 1, 2]))
        return op.image.resize2d(image, (24, 24), method="linear", layout="NCHW")

    (module,) = kernels(make, f32(1, 12, 12, 16))
    schedule = tvm.s_tir.Schedule(module)
    inline_elementwise(schedule)
    assert block_names(schedule) == block_names(tvm.s_tir.Schedule(module))
    for found in baseline_schedules(module, target(), most=1):
        assert verify_kernel(module, trace_to_json(found.trace), target(), seed=1).ok


@pytest.mark.parametrize(
    ("before", "left"),
    [
        (op.negative, ["compute1", "resize1"]),
        (op.sigmoid, ["compute", "compute1", "resize1"]),
    ],
)
def test_what_a_resize_reads_several_times_is_computed_once(
    before: Callable[[Any], Any], left: list[str]
) -> None:
    def make(e: Any, x: Any) -> Any:
        for size in (24, 48):
            x = e(op.image.resize2d(e(before(x)), (size, size), method="linear"))
        return x

    (module,) = kernels(make, f32(1, 3, 12, 12))
    schedule = tvm.s_tir.Schedule(module)
    inline_elementwise(schedule)
    assert block_names(schedule) == left, "the first negation costs nothing"


def test_steps_that_choose_among_many_parts_are_not_multiplied() -> None:
    def make(e: Any, x: Any) -> Any:
        # If all were one expression, each value would come from 8 to the power of 5 elements.
        for axis in (1, 2, 1, 2, 1):
            parts = e(op.split(x, 8, axis=axis))
            x = e(op.concat([e(op.multiply(parts[at], parts[at])) for at in range(8)], axis=axis))
        return x

    (module,) = kernels(make, f32(1, 16, 16, 8))
    for schedule in baseline_schedules(module, target(), most=1):
        assert max(len(block_of(schedule, name).reads) for name in block_names(schedule)) <= 64
        assert len(schedule.mod.script()) < 500_000
        assert verify_kernel(module, trace_to_json(schedule.trace), target(), seed=1).ok


@pytest.mark.parametrize("strides", [1, 2])
def test_a_depthwise_convolution_pads_its_image_piece_by_piece(strides: int) -> None:
    make = conv(padding=1, groups=16, strides=strides)
    (module,) = kernels(make, f32(1, 16, 96, 96), f32(16, 1, 3, 3), f32(1, 16, 1, 1), inputs=1)
    nearby = 0
    for schedule in baseline_schedules(module, target(), most=6):
        assert verify_kernel(module, trace_to_json(schedule.trace), target(), seed=1).ok
        nearby += schedule.mod.script().count("T.parallel") == 1
    assert nearby


def test_a_dense_convolution_pads_its_image_once() -> None:
    (module,) = kernels(conv(padding=1), f32(1, 16, 96, 96), f32(16, 16, 3, 3), f32(1, 16, 1, 1))
    for schedule in baseline_schedules(module, target(), most=3):
        assert schedule.mod.script().count("T.parallel") == 2


def test_a_1x1_convolution_walks_its_images_along_one_axis() -> None:
    (module,) = kernels(*_case("1x1 conv of rows of 28, batch 2"))
    schedule = tvm.s_tir.Schedule(module)
    inline_elementwise(schedule)
    flatten_planes(schedule, "conv2d_nchw")
    axes = axes_of(block_of(schedule, "conv2d_nchw")) or []
    assert [axis.extent for axis in axes if axis.extent > 1] == [2, 32, 12 * 28, 16]
    shapes = [[int(e) for e in buffer.shape] for buffer in schedule.mod["main"].params]
    assert shapes == [[int(e) for e in buffer.shape] for buffer in module["main"].params]
    block = block_of(schedule, "conv2d_nchw")
    assert [int(extent) for extent in block.writes[0].source.shape] == [2, 32, 12 * 28]


def test_a_3x3_convolution_keeps_rows_and_columns() -> None:
    (module,) = kernels(*_case("conv"))
    schedule = tvm.s_tir.Schedule(module)
    inline_elementwise(schedule)
    with pytest.raises(ValueError, match="no plane"):
        flatten_planes(schedule, "conv2d_nchw")


def test_channels_whose_images_alias_are_stored_row_by_row() -> None:
    (module,) = kernels(*_case("conv of images that alias"))
    schedule = tvm.s_tir.Schedule(module)
    interleave_rows(schedule, "conv2d_nchw")
    padded = block_of(schedule, "pad_temp").writes[0].source
    assert [int(extent) for extent in padded.shape] == [1, 16, 32, 16]


def test_images_that_do_not_alias_stay_as_they_are() -> None:
    (module,) = kernels(*_case("conv of prime width, batch 2"))
    with pytest.raises(ValueError, match="aliases"):
        interleave_rows(tvm.s_tir.Schedule(module), "conv2d_nchw")


def test_results_across_channels_lie_side_by_side_in_registers() -> None:
    """Else LLVM would keep them in memory, at a tenth of the speed."""
    (module,) = kernels(*_case("conv"))
    shapes = []
    for schedule in baseline_schedules(module, target(), most=4):
        block = block_of(schedule, "conv2d_nchw_update")
        shapes.append([int(extent) for extent in block.writes[0].source.shape])
    assert [1, 14, 14, 32] in shapes  # vectorised over channels: they come last
    assert [1, 32, 14, 14] in shapes  # vectorised over the width


@pytest.mark.parametrize("name", ["conv", "matmul with bias", "softmax", "max pooling"])
def test_gpu_rules_give_kernels_that_compile_without_a_gpu(name: str) -> None:
    gpu = tvm.target.Target("nvidia/nvidia-h100")
    make, specs = CASES[name]
    for module in kernels(make, *specs):
        schedules = baseline_schedules(module, gpu)
        assert schedules
        for schedule in schedules:
            replayed = apply_trace(trace_to_json(schedule.trace), module)
            built = tvm.tirx.build(replayed.mod, target=gpu)
            assert "threadIdx.x" in built.imports[0].inspect_source()


def _case(name: str) -> tuple[Any, ...]:
    make, specs = CASES[name]
    return make, *specs


def _grown(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Larger, with the small extents (kernel sizes, broadcasts) kept."""
    return tuple(extent * 4 if extent >= 14 else extent for extent in shape)


def _seconds(module: tvm.IRModule, repeat: int) -> float:
    built = tvm.tirx.build(module, target=target())
    arrays = [tvm.runtime.tensor(array) for array in kernel_inputs(module, 0)]
    built["main"](*arrays)
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        built["main"](*arrays)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("shape", [(4, 4, 196, 196), (1, 12, 197, 197), (16, 8, 64)])
def test_parallel_loops_are_never_nested(shape: tuple[int, ...]) -> None:
    """The thread pool refuses them when the kernel runs."""
    (softmax,) = kernels(lambda _, x: op.nn.softmax(x), f32(*shape))
    found = baseline_schedules(softmax, target())
    assert found
    for schedule in found:
        deepest = 0

        def visit(node: Any) -> None:
            nonlocal deepest
            if int(node.kind) == 1:  # parallel
                inner: list[Any] = []
                tvm_ffi.structural_walk(node.body, (tvm.tirx.For, inner.append))
                deepest = max(deepest, 1 + any(int(loop.kind) == 1 for loop in inner))

        tvm_ffi.structural_walk(schedule.mod["main"].body, (tvm.tirx.For, visit))
        assert deepest <= 1
        assert verify_kernel(softmax, trace_to_json(schedule.trace), target(), 0).ok
