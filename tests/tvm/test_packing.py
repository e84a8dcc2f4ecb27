"""Weights that are packed once: which may be, what the kernels then take, what a library does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tiny_library import compared, default_traces, target
from tvm import relax
from tvm.relax import op
from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

from gpu_aware_tune.codegen.compile import compile_model
from gpu_aware_tune.finalize.kernel_check import difference, kernel_inputs, verify_kernel
from gpu_aware_tune.kernels.packing import (
    LAYOUT_FREE,
    PACK,
    PACKING,
    mark_weights,
    pack_at_load,
    packed,
    weight_buffers,
    without_packing,
)
from gpu_aware_tune.kernels.schedules import baseline_schedules
from gpu_aware_tune.kernels.traces import trace_to_json
from gpu_aware_tune.library import open_vm, save_weights
from gpu_aware_tune.model.importer import Model, load_model, random_inputs
from gpu_aware_tune.model.tasks import Task, extract

Spec = tuple[tuple[int, ...], str]


def marked(make: Any, inputs: int, *shapes: tuple[int, ...]) -> tvm.IRModule:
    """A fused module of a small Relax function; parameters from number `inputs` on are weights."""
    builder = relax.BlockBuilder()
    variables = [relax.Var(f"p{n}", relax.TensorType(s, "float32")) for n, s in enumerate(shapes)]
    with builder.function("main", variables, attrs={"num_input": inputs}):
        with builder.dataflow():
            result = builder.emit_output(make(builder.emit, *variables))
        builder.emit_func_output(result)
    with target():
        return mark_weights(relax.get_pipeline("zero")(builder.get()))


def marks(module: tvm.IRModule) -> list[list[int]]:
    """What each kernel is marked with."""
    return [
        [int(number) for number in function.attrs.get(LAYOUT_FREE, [])]
        for function in module.functions.values()
        if isinstance(function, tvm.tirx.PrimFunc)
    ]


def write_convs(path: Path) -> Path:
    """Convs of few pixels (1x1; 3x3 with groups; 3x3 with strides), a matmul and a sort."""
    generator = np.random.default_rng(5)
    shapes = {"a": (32, 16, 1, 1), "b": (32, 8, 3, 3), "c": (64, 32, 3, 3), "m": (64, 48)}
    weights = [
        numpy_helper.from_array(generator.standard_normal(shape).astype("float32"), name)
        for name, shape in shapes.items()
    ]
    weights.append(numpy_helper.from_array(np.array([8], "int64"), "k"))
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["1"]),
        helper.make_node("Relu", ["1"], ["2"]),
        helper.make_node("Conv", ["2", "b"], ["3"], pads=[1, 1, 1, 1], group=4),
        helper.make_node("Relu", ["3"], ["4"]),
        helper.make_node("Conv", ["4", "c"], ["5"], strides=[4, 4], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["5"], ["6"]),
        helper.make_node("Flatten", ["6"], ["7"]),
        helper.make_node("MatMul", ["7", "m"], ["8"]),
        helper.make_node("TopK", ["8", "k"], ["largest", "places"]),
    ]
    graph = helper.make_graph(
        nodes,
        "convs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 7, 7])],
        [
            helper.make_tensor_value_info("largest", TensorProto.FLOAT, [1, 8]),
            helper.make_tensor_value_info("places", TensorProto.INT64, [1, 8]),
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def convs(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = write_convs(tmp_path_factory.mktemp("packing") / "convs.onnx")
    return load_model(path, target(), blocks=False)  # in blocks, nothing is left to pack


def packing_traces(model: Model, skip: int) -> dict[str, str]:
    """For each task a baseline schedule that packs a weight, the first or a later one."""
    traces = {}
    for task in extract(model, target()):
        found = [trace_to_json(s.trace) for s in baseline_schedules(task.module, target(), 8)]
        packing = [trace for trace in found if PACKING in trace]
        if packing:
            traces[task.hash] = packing[min(skip, len(packing) - 1)]
    return traces


# -- which arguments are marked --------------------------------------------------------------------


def test_a_convs_weight_is_marked_its_bias_and_its_input_are_not() -> None:
    def make(e: Any, x: Any, w: Any, b: Any) -> Any:
        return op.add(e(op.nn.conv2d(x, w)), b)

    assert marks(marked(make, 1, (1, 4, 9, 9), (8, 4, 3, 3), (1, 8, 1, 1))) == [[1]]
    assert marks(marked(make, 2, (1, 4, 9, 9), (8, 4, 3, 3), (1, 8, 1, 1))) == [[]]


def test_a_kernel_that_is_also_called_without_a_weight_is_not_marked() -> None:
    def make(e: Any, x: Any, y: Any, w: Any) -> Any:
        return e(op.matmul(e(op.matmul(x, w)), y))

    assert marks(marked(make, 2, (24, 24), (24, 24), (24, 24))) == [[]]


def test_a_weight_that_is_read_in_two_places_is_not_marked() -> None:
    def softmaxed(e: Any, x: Any, w: Any) -> Any:
        return op.add(x, e(op.nn.softmax(w, -1)))

    assert marks(marked(softmaxed, 1, (24, 24), (24, 24))) == [[]]


def test_the_mark_is_part_of_the_hash_and_the_hash_stays_the_same(tmp_path: Path) -> None:
    path = write_convs(tmp_path / "convs.onnx")
    first, second = (
        {task.name: task.hash for task in extract(load_model(path, target()), target())}
        for _ in range(2)
    )
    assert first == second
    module = load_model(path, target()).module
    for variable, function in module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc) and function.attrs.get(LAYOUT_FREE):
            module.update_func(variable, function.without_attr(LAYOUT_FREE))
    without = {task.task_name for task in extract_tasks(module, target())}
    assert without == set(first)


# -- kernels ---------------------------------------------------------------------------------------


def heaviest(model: Model) -> Task:
    return next(task for task in extract(model, target()) if weight_buffers(task.module["main"]))


def run(module: tvm.IRModule, arrays: list[Any]) -> list[np.ndarray]:
    placed = [tvm.runtime.tensor(array) for array in arrays]
    tvm.tirx.build(module, target=target())["main"](*placed)
    return [tensor.numpy() for tensor in placed]


def test_a_kernel_without_packing_takes_the_packed_weight_in_the_shape_of_the_plain_one(
    convs: Model,
) -> None:
    checked = 0
    for task in extract(convs, target()):
        for schedule in baseline_schedules(task.module, target(), 4):
            if PACKING not in trace_to_json(schedule.trace):
                continue
            arrays = kernel_inputs(task.module, seed=1)
            wanted = run(schedule.mod, arrays)[-1]
            bare = without_packing(schedule.mod)
            shapes = [tuple(buffer.shape) for buffer in bare["main"].params]
            assert shapes == [tuple(buffer.shape) for buffer in task.module["main"].params]
            assert not np.array_equal(run(bare, arrays)[-1], wanted), "it packs still"
            order = packed_by_hand(schedule.mod, task, arrays)
            np.testing.assert_array_equal(run(bare, order)[-1], wanted)
            checked += 1
    assert checked >= 4


def packed_by_hand(scheduled: tvm.IRModule, task: Task, arrays: list[Any]) -> list[Any]:
    """The kernel's arguments with its weight packed, by the function that a library would have."""
    builder = relax.BlockBuilder()
    kernel = scheduled["main"].with_attr("global_symbol", "kernel")
    variable = builder.add_func(kernel, "kernel")
    *ins, out = (relax.TensorType(array.shape, str(array.dtype)) for array in arrays)
    names = [relax.Var(f"p{number}", spec) for number, spec in enumerate(ins)]
    with builder.function("main", names, attrs={"num_input": 1}):
        with builder.dataflow():
            result = builder.emit_output(relax.call_tir(variable, names, out))
        builder.emit_func_output(result)
    library = relax.build(pack_at_load(builder.get()), target=target())
    machine = relax.VirtualMachine(library, tvm.cpu())
    weights = packed(machine, [tvm.runtime.tensor(array) for array in arrays[1:-1]])
    (number,) = (int(n) for n in task.module["main"].attrs[LAYOUT_FREE])
    (moved,) = (weight for weight in weights if len(weight.shape) != arrays[number].ndim)
    order = list(arrays)
    order[number] = moved.numpy().reshape(arrays[number].shape)
    return order


def test_tvms_search_packs_marked_weights_and_the_numbers_stay_right(convs: Model) -> None:
    from gpu_aware_tune.kernels.traces import module_to_json
    from gpu_aware_tune.search.candidates import NewTask, SearchSettings, _Search

    task = heaviest(convs)
    search = _Search(target(), SearchSettings(population=8, generations=1, per_draft=4, seed=3), 0)
    search.add(NewTask(task.hash, module_to_json(task.module)))
    drawn = [candidate.trace for _ in range(2) for candidate in search.draft(task.hash)]
    sampled = [trace for trace in drawn if "SamplePerfectTile" in trace and PACKING in trace]
    assert sampled
    assert all(verify_kernel(task.module, trace, target(), seed=0).ok for trace in sampled)
    traces = {**default_traces(convs), task.hash: sampled[0]}
    assert compared(convs, _Loaded(convs, traces), seed=0).ok


class _Loaded:
    """A library in memory, called as a loaded one is."""

    def __init__(self, model: Model, traces: dict[str, str]) -> None:
        self._model = model
        self.machine = relax.VirtualMachine(compile_model(model, target(), traces), tvm.cpu())
        weights = [tvm.runtime.tensor(array) for array in model.weights.values()]
        self.weights = packed(self.machine, weights)

    def __call__(self, inputs: Any) -> dict[str, np.ndarray]:
        placed = [tvm.runtime.tensor(inputs[spec.name]) for spec in self._model.inputs]
        outputs = self.machine["main"](*placed, *self.weights)
        names = [spec.name for spec in self._model.outputs]
        return {name: tensor.numpy() for name, tensor in zip(names, outputs, strict=True)}


# -- libraries -------------------------------------------------------------------------------------


def test_a_library_packs_once_and_main_takes_the_packed_weights(convs: Model) -> None:
    traces = packing_traces(convs, skip=0)
    assert len(traces) >= 2
    loaded = _Loaded(convs, traces)
    assert compared(convs, loaded, seed=0).ok
    changed = [tuple(weight.shape) for weight in loaded.weights]
    stored = [weight.shape for weight in convs.weights.values()]
    assert sum(shape not in stored for shape in changed) == len(traces)
    inputs = random_inputs(convs.inputs, 0)
    placed = [tvm.runtime.tensor(array) for array in inputs.values()]
    plain = [tvm.runtime.tensor(array) for array in convs.weights.values()]
    with pytest.raises(Exception, match=r"ndim|shape"):
        loaded.machine["main"](*placed, *plain)


def test_libraries_with_other_layouts_share_one_weights_file(convs: Model, tmp_path: Path) -> None:
    save_weights(convs.weights, tmp_path / "weights.bin")
    inputs = random_inputs(convs.inputs, 0)
    layouts, results = [], []
    choices: tuple[dict[str, str], ...] = (
        packing_traces(convs, 0),
        packing_traces(convs, 7),
        default_traces(convs),
        {},
    )
    for number, traces in enumerate(choices):
        path = tmp_path / f"lib-{number}.so"
        compile_model(convs, target(), traces).export_library(str(path))
        program = open_vm(path, tmp_path / "weights.bin")
        results.append(program(program.place(list(inputs.values()))))
        layouts.append([tuple(weight.shape) for weight in program._weights])
        assert compared(convs, path, seed=0).ok
    assert layouts[0] != layouts[1] != layouts[3]
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            assert difference(got, wanted) < 1e-5


def test_a_module_without_weights_packs_nothing() -> None:
    module = marked(lambda e, x, y: op.add(x, y), 2, (4, 4), (4, 4))
    machine = relax.VirtualMachine(relax.build(pack_at_load(module), target=target()), tvm.cpu())
    assert machine.module.implements_function(PACK)
    assert packed(machine, []) == []


def test_the_weights_of_branches_are_packed_at_load_too(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    weights = [
        numpy_helper.from_array(generator.standard_normal((64, 32, 1, 1)).astype("float32"), name)
        for name in ("a", "b")
    ]
    shape = [1, 64, 7, 7]

    def branch(name: str, operator: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Conv", ["x", name], [f"conv_{name}"]),
            helper.make_node(operator, [f"conv_{name}"], [f"out_{name}"]),
        ]
        output = helper.make_tensor_value_info(f"out_{name}", TensorProto.FLOAT, shape)
        return helper.make_graph(nodes, name, [], [output])

    branches = {"then_branch": branch("a", "Relu"), "else_branch": branch("b", "Sigmoid")}
    graph = helper.make_graph(
        [helper.make_node("If", ["condition"], ["y"], **branches)],
        "branches",
        [
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32, 7, 7]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    proto.ir_version = 8
    onnx.save(proto, tmp_path / "branches.onnx")
    model = load_model(tmp_path / "branches.onnx", target())
    compile_model(model, target(), packing_traces(model, 0)).export_library(
        str(tmp_path / "lib.so")
    )
    save_weights(model.weights, tmp_path / "weights.bin")
    program = open_vm(tmp_path / "lib.so", tmp_path / "weights.bin")
    assert [len(weight.shape) for weight in program._weights] == [5, 5]
    assert compared(model, tmp_path / "lib.so", seed=0).ok
