"""Images in blocks of channels: which are, that the numbers stay right, what the schedules make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tiny_library import compared as compared_with_onnxruntime
from tiny_library import default_traces, target
from tvm.s_tir import Schedule

from gpu_aware_tune.codegen.compile import compile_model
from gpu_aware_tune.finalize.kernel_check import verify_kernel
from gpu_aware_tune.finalize.verify import VerifyReport
from gpu_aware_tune.kernels.schedules import baseline_schedules, channels
from gpu_aware_tune.kernels.schedules.blocks import block_names, block_of, is_reduction
from gpu_aware_tune.kernels.schedules.cpu import cpu_schedules, machine_of
from gpu_aware_tune.kernels.schedules.reductions import Reduction
from gpu_aware_tune.kernels.schedules.tile_cost import Machine
from gpu_aware_tune.kernels.traces import trace_to_json
from gpu_aware_tune.model.importer import Model, load_model
from gpu_aware_tune.model.tasks import Task, extract

AVX512 = tvm.target.Target({"kind": "llvm", "mcpu": "skylake-avx512", "num-cores": 2})
SSE = tvm.target.Target({"kind": "llvm", "mcpu": "nehalem", "num-cores": 2})
AVX2 = tvm.target.Target({"kind": "llvm", "mcpu": "haswell", "num-cores": 2})
MACHINE = Machine(lanes=16, registers=32, units=2)

Node = tuple[str, Sequence[str], str, dict[str, Any]]
CONV3 = {"pads": [1, 1, 1, 1]}
WIDE = {"dilations": [2, 2], "pads": [2, 2, 2, 2]}  # not in Winograd's form


def load(
    path: Path,
    nodes: Sequence[Node],
    filters: Mapping[str, tuple[int, ...]],
    shape: tuple[int, ...] = (1, 16, 12, 12),
    cpu: tvm.target.Target = AVX512,
    halves: Sequence[int] = (),
    **options: Any,
) -> Model:
    """Write a network of an input `x`, convolutions with seeded weights and a result; load it."""
    generator = np.random.default_rng(3)
    weights = [
        numpy_helper.from_array(generator.standard_normal(size).astype("float32"), name)
        for name, size in filters.items()
    ]
    if halves:
        weights.append(numpy_helper.from_array(np.array(halves, np.int64), "halves"))
    graph = helper.make_graph(
        [
            helper.make_node(kind, inputs, output.split(","), **attrs)
            for kind, inputs, output, attrs in nodes
        ],
        "layouts",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, None)],
        weights,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path
    )
    return load_model(path, cpu, **options)


def blocked(model: Model) -> list[str]:
    """The kernels whose names say that they are."""
    return sorted(v.name_hint for v in model.module.functions if "_nchw" in v.name_hint)


def compared(model: Model, traces: dict[str, str], folder: Path) -> VerifyReport:
    """What a library of this machine's computes, beside ONNX Runtime."""
    library = folder / "library.so"
    compile_model(model, target(), traces).export_library(str(library))
    return compared_with_onnxruntime(model, library, seed=2)


def shapes(model: Model, name: str) -> list[tuple[int, ...]]:
    """Of a kernel's arguments and result."""
    return [tuple(int(e) for e in each.shape) for each in model.module[name].params]


# A convolution of 3 channels, pooling, both branches of a fire module, a residual connection, a
# depthwise and a grouped convolution, and a head.
NETWORK: list[Node] = [
    ("Conv", ["x", "first"], "a", {"strides": [2, 2], **CONV3}),
    ("Relu", ["a"], "b", {}),
    ("MaxPool", ["b"], "c", {"kernel_shape": [3, 3], "strides": [2, 2]}),
    ("Conv", ["c", "one"], "d", {}),
    ("Conv", ["c", "three"], "e", WIDE),
    ("Concat", ["d", "e"], "f", {"axis": 1}),
    ("Conv", ["f", "back"], "g", {}),
    ("Add", ["g", "c"], "h", {}),
    ("Relu", ["h"], "i", {}),
    ("Conv", ["i", "depthwise"], "j", {"group": 32, **CONV3}),
    ("Conv", ["j", "grouped"], "k", {"group": 2, **CONV3}),
    ("Conv", ["k", "odd"], "l", {}),
    ("GlobalAveragePool", ["l"], "m", {}),
    ("Flatten", ["m"], "n", {}),
]
FILTERS = {
    "first": (32, 3, 3, 3),
    "one": (16, 32, 1, 1),
    "three": (48, 32, 3, 3),
    "back": (32, 64, 1, 1),
    "depthwise": (32, 1, 3, 3),
    "grouped": (64, 16, 3, 3),
    "odd": (10, 64, 1, 1),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("layouts") / "network.onnx"
    return load(path, NETWORK, FILTERS, (1, 3, 40, 40))


def test_images_between_convolutions_are_in_blocks_inputs_and_results_are_not(
    network: Model,
) -> None:
    found = {shape for name in blocked(network) for shape in shapes(network, name)}
    assert {
        (1, 3, 40, 40),  # the input
        (2, 3, 3, 3, 16),  # its filter: blocks of results only
        (1, 2, 20, 20, 16),
        (1, 2, 9, 9, 16),  # what is pooled
        (3, 2, 3, 3, 16, 16),
        (1, 4, 9, 9, 16),  # what is joined
        (2, 1, 3, 3, 16),  # the depthwise filter
    } <= found
    assert [tuple(spec.shape) for spec in network.outputs] == [(1, 10)]
    kinds = ("max_pool2d", "concatenate")
    assert all(any(kind in name for name in blocked(network)) for kind in kinds)


def test_every_image_of_the_graph_has_one_shape_for_its_writer_and_its_readers(
    network: Model,
) -> None:
    tvm.relax.analysis.well_formed(network.module)  # raises
    names = {variable.name_hint for variable in network.module.functions}
    called = set()
    for block in network.module["main"].body.blocks:
        for binding in block.bindings:
            called.add(binding.value.args[0].name_hint)
            given = [tuple(int(e) for e in a.ty.shape) for a in binding.value.args[1]]
            given.append(tuple(int(e) for e in binding.var.ty.shape))
            assert given == shapes(network, binding.value.args[0].name_hint)
    assert names - {"main"} == called, "kernels that nothing calls were left"


def test_the_weights_are_stored_as_the_kernels_read_them(network: Model) -> None:
    main = network.module["main"]
    parameters = list(main.params)[1:]
    assert [tuple(int(e) for e in p.ty.shape) for p in parameters] == [
        array.shape for array in network.weights.values()
    ]
    assert all(array.flags.c_contiguous for array in network.weights.values())


@pytest.mark.parametrize("schedules", ["default", "plain loops"])
def test_the_numbers_are_those_of_onnx_runtime(schedules: str, tmp_path: Path) -> None:
    model = load(tmp_path / "n.onnx", NETWORK, FILTERS, (1, 3, 40, 40), cpu=target())
    assert blocked(model)
    assert compared(model, default_traces(model) if schedules == "default" else {}, tmp_path).ok


def test_a_narrower_processor_gets_narrower_blocks(tmp_path: Path) -> None:
    nodes: list[Node] = [("Conv", ["x", "w"], "a", {}), ("Conv", ["a", "v"], "y", {})]
    filters = {"w": (24, 16, 1, 1), "v": (16, 24, 1, 1)}
    narrow = load(tmp_path / "n.onnx", nodes, filters, cpu=AVX2)
    assert {shapes(narrow, name)[-1] for name in blocked(narrow)} == {
        (1, 3, 12, 12, 8),
        (1, 16, 12, 12),
    }
    assert all(name.endswith("_nchw8c") for name in blocked(narrow))
    assert blocked(load(tmp_path / "w.onnx", nodes, filters)) == [], "24 is no multiple of 16"


PLAIN: dict[str, tuple[list[Node], dict[str, tuple[int, ...]]]] = {
    "its result is the model's": ([("Conv", ["x", "w"], "y", {})], {"w": (32, 16, 1, 1)}),
    "the result is transposed": (
        [
            ("Conv", ["x", "w"], "a", {}),
            ("Transpose", ["a"], "b", {"perm": [0, 2, 3, 1]}),
            ("Softmax", ["b"], "y", {"axis": -1}),
        ],
        {"w": (32, 16, 1, 1)},
    ),
    "the result is reshaped": (
        [("Conv", ["x", "w"], "a", {}), ("Flatten", ["a"], "y", {})],
        {"w": (32, 16, 1, 1)},
    ),
    "a join not at a whole block": (
        [
            ("Conv", ["x", "w"], "a", {}),
            ("Conv", ["x", "v"], "b", {}),
            ("Concat", ["a", "b"], "c", {"axis": 1}),
            ("Relu", ["c"], "d", {}),
            ("Conv", ["d", "u"], "y", {}),
        ],
        {"w": (24, 16, 1, 1), "v": (8, 16, 1, 1), "u": (10, 32, 1, 1)},
    ),
    "no convolution": (
        [("Relu", ["x"], "a", {}), ("MaxPool", ["a"], "y", {"kernel_shape": [2, 2]})],
        {},
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_cannot_be_in_blocks_stays_as_it_is(name: str, tmp_path: Path) -> None:
    nodes, filters = PLAIN[name]
    model = load(tmp_path / "p.onnx", nodes, filters, (1, 16, 16, 16))
    assert blocked(model) == []


def test_a_filter_of_two_convolutions_is_stored_once(tmp_path: Path) -> None:
    """The second reads blocks and the first does not: no layout of the filter fits both."""
    nodes: list[Node] = [("Conv", ["x", "w"], "a", {}), ("Conv", ["a", "w"], "b", {}),
                         ("Relu", ["b"], "c", {}), ("Conv", ["c", "v"], "y", {})]  # fmt: skip
    filters = {"w": (32, 32, 1, 1), "v": (10, 32, 1, 1)}
    model = load(tmp_path / "t.onnx", nodes, filters, (1, 32, 12, 12), cpu=target())
    assert (32, 32, 1, 1) in {array.shape for array in model.weights.values()}
    assert compared(model, default_traces(model), tmp_path).ok


def test_without_blocks_every_tensor_keeps_its_layout(tmp_path: Path) -> None:
    model = load(tmp_path / "n.onnx", NETWORK, FILTERS, (1, 3, 40, 40), blocks=False)
    assert blocked(model) == []
    assert (48, 32, 3, 3) in {array.shape for array in model.weights.values()}


def test_only_a_kernel_that_tvm_refuses_to_change_keeps_its_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = channels.Kernel.blocked

    def refuse_pooling(self: channels.Kernel, *args: Any) -> Any:
        if not any(is_reduction(block) for block in self.blocks) or self.filter is not None:
            return original(self, *args)
        raise RuntimeError("not affine")

    everything = load(tmp_path / "n.onnx", NETWORK, FILTERS, (1, 3, 40, 40), target())
    monkeypatch.setattr(channels.Kernel, "blocked", refuse_pooling)
    model = load(tmp_path / "n.onnx", NETWORK, FILTERS, (1, 3, 40, 40), target())
    assert everything.notes == ()
    assert any("max_pool2d keeps its layout: not affine" in note for note in model.notes)
    assert 0 < len(blocked(model)) < len(blocked(everything))
    assert not any("pool" in name or "mean" in name for name in blocked(model))
    assert compared(model, default_traces(model), tmp_path).ok


SPLIT: list[Node] = [
    ("Conv", ["x", "w"], "a", {}),
    ("Relu", ["a"], "b", {}),
    ("Split", ["b", "halves"], "c,d", {"axis": 1}),
    ("Conv", ["d", "v"], "e", CONV3),
    ("Relu", ["e"], "f", {}),
    ("Concat", ["c", "d", "f"], "g", {"axis": 1}),
    ("Conv", ["g", "u"], "y", {}),
]


@pytest.mark.parametrize(("half", "is_blocked"), [(16, True), (12, False)])
def test_the_results_of_a_split_are_followed(half: int, is_blocked: bool, tmp_path: Path) -> None:
    """As in every C2f block of YOLOv8."""
    filters = {"w": (2 * half, 16, 1, 1), "v": (half, half, 3, 3), "u": (10, 3 * half, 1, 1)}
    cpu = target() if lanes_here() == 16 else AVX512
    model = load(tmp_path / "s.onnx", SPLIT, filters, cpu=cpu, halves=[half, half])
    assert any("split" in name for name in blocked(model)) == is_blocked
    here = load(tmp_path / "s.onnx", SPLIT, filters, cpu=target(), halves=[half, half])
    assert compared(here, default_traces(here), tmp_path).ok


def lanes_here() -> int:
    return machine_of(target()).lanes


@pytest.mark.parametrize(
    ("channels_", "lanes"), [(12, 4), (24, 8), (40, 8), (120, 8), (48, 16), (80, 16), (240, 16)]
)
def test_a_pooling_over_any_number_of_channel_blocks_reads_what_was_written(
    channels_: int, lanes: int, tmp_path: Path
) -> None:
    """An odd number of blocks made tiles that are no box of the result: it read other tiles'."""
    nodes: list[Node] = [("Conv", ["x", "w"], "a", {}), ("GlobalAveragePool", ["a"], "p", {}),
                         ("Conv", ["p", "s"], "q", {}), ("Sigmoid", ["q"], "t", {}),
                         ("Mul", ["a", "t"], "m", {}), ("Conv", ["m", "u"], "y", {})]  # fmt: skip
    filters = {
        "w": (channels_, 16, 1, 1),
        "s": (channels_, channels_, 1, 1),
        "u": (8, channels_, 1, 1),
    }
    cpu = {4: SSE, 8: AVX2, 16: AVX512}[lanes]
    model = load(tmp_path / "p.onnx", nodes, filters, (1, 16, 6, 6), cpu=cpu)
    (task,) = (task for task in extract(model, cpu) if "mean" in task.name)
    found = list(islice(cpu_schedules(task.module, Machine(lanes, 16, 2), 4), 4))
    assert len(found) == 4
    for schedule in found:
        check = verify_kernel(task.module, trace_to_json(schedule.trace), target(), seed=1)
        assert check.ok, (check, schedule.trace)


def test_a_cuda_target_keeps_the_layout(tmp_path: Path) -> None:
    cuda = tvm.target.Target("nvidia/nvidia-h100")
    nodes: list[Node] = [("Conv", ["x", "w"], "a", {}), ("Conv", ["a", "w"], "y", {})]
    assert blocked(load(tmp_path / "c.onnx", nodes, {"w": (16, 16, 1, 1)}, cpu=cuda)) == []


# -- what the schedules make of it -----------------------------------------------------------------


@pytest.mark.parametrize(("side", "padding"), [(2, 0), (3, 1), (4, 1)])
def test_a_transposed_convolution_stays_in_blocks(side: int, padding: int, tmp_path: Path) -> None:
    stride = {"strides": [2, 2], "pads": [padding] * 4}
    nodes: list[Node] = [("Conv", ["x", "w"], "a", {}), ("ConvTranspose", ["a", "t"], "b", stride),
                         ("Conv", ["b", "v"], "y", {})]  # fmt: skip
    filters = {"w": (32, 16, 1, 1), "t": (32, 16, side, side), "v": (32, 16, 1, 1)}
    model = load(tmp_path / "t.onnx", nodes, filters)
    kernels = [str(v.name_hint) for v in model.module.functions if v.name_hint != "main"]
    assert len(kernels) == 4, kernels  # the phases and three products: none makes filters
    (phases,) = (name for name in blocked(model) if "depth_to_space" in name)
    assert shapes(model, phases)[0][1:2] + shapes(model, phases)[0][4:] == (4, 16)
    assert compared(model, default_traces(model), tmp_path).ok


def write_deep(path: Path, cpu: tvm.target.Target) -> Model:
    """Convolutions over many channels: of single pixels, of 3x3, and of single pixels again."""
    nodes: list[Node] = [("Conv", ["x", "w"], "a", {}), ("Conv", ["a", "v"], "b", WIDE),
                         ("Relu", ["b"], "c", {}), ("Conv", ["c", "u"], "y", {})]  # fmt: skip
    filters = {"w": (128, 16, 1, 1), "v": (128, 128, 3, 3), "u": (10, 128, 1, 1)}
    return load(path, nodes, filters, (1, 16, 14, 14), cpu)


def convolution_of(task: Task) -> str:
    """The name of the heaviest reduction."""
    schedule = Schedule(task.module)
    names = [name for name in block_names(schedule) if is_reduction(block_of(schedule, name))]
    return max(names, key=lambda name: Reduction(schedule, name, MACHINE).steps)


def test_many_terms_are_summed_a_block_of_channels_at_a_time(tmp_path: Path) -> None:
    deep = write_deep(tmp_path / "d.onnx", AVX512)
    tiles = {}
    for task in extract(deep, AVX512):
        reduction = Reduction(Schedule(task.module), convolution_of(task), MACHINE)
        tiles[task.args[1][0]] = reduction.tiles()[0]
    assert tiles[8, 8, 3, 3, 16, 16].passes == 8
    assert tiles[8, 8, 3, 3, 16, 16].lanes == 16
    assert tiles[8, 16, 1, 1, 16].passes == 1


def test_a_convolution_in_blocks_computes_the_same_however_it_is_scheduled(tmp_path: Path) -> None:
    (task,) = (
        task
        for task in extract(write_deep(tmp_path / "d.onnx", target()), target())
        if len(task.args[1][0]) == 6
    )
    traces = [trace_to_json(s.trace) for s in baseline_schedules(task.module, target(), most=6)]
    assert len(set(traces)) == 6
    for trace in traces:
        check = verify_kernel(task.module, trace, target(), seed=1)
        assert check.ok, check


@pytest.mark.parametrize("channels", [(128, 64, 128), (120, 72, 128)])
def test_a_concatenation_decides_by_block_and_is_vectorised(
    channels: tuple[int, int, int], tmp_path: Path
) -> None:
    """Parts of whole blocks need one decision a vector; parts that divide a block keep theirs."""
    nodes: list[Node] = [
        *(("Conv", ["x", f"w{part}"], f"c{part}", {}) for part in range(3)),
        ("Concat", ["c0", "c1", "c2"], "cat", {"axis": 1}),
        ("Mul", ["cat", "gain"], "m", {}),
        ("Relu", ["m"], "r", {}),
        ("Conv", ["r", "out"], "y", {}),
    ]
    total = sum(channels)
    filters: dict[str, tuple[int, ...]] = {
        f"w{part}": (count, 16, 1, 1) for part, count in enumerate(channels)
    }
    filters |= {"gain": (total, 1, 1), "out": (32, total, 1, 1)}
    model = load(tmp_path / "net.onnx", nodes, filters, (1, 16, 40, 40))
    (task,) = [t for t in extract(model, AVX512) if "concatenate" in t.name]
    whole = all(count % 16 == 0 for count in channels)
    assert ("_nchw16c" in task.name) == whole
    (schedule,) = baseline_schedules(task.module, AVX512, 1)
    assert ("T.vectorized" in schedule.mod.script()) or not whole
    if whole:
        assert "T.int64(8) <= i" in task.module.script(), "channel 128 is the start of block 8"
    here = load(tmp_path / "here.onnx", nodes, filters, (1, 16, 40, 40), cpu=target())
    assert compared(here, default_traces(here), tmp_path).ok
