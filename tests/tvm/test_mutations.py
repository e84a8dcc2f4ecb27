"""Verification that can fail: faults of every kind are put in, and each is seen before any search.

The mutated graph is what a wrong preparation, importer, layout pass, schedule or export would leave;
it is compared with the original file in the way that a run does before its search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import NodeProto, TensorProto, helper, numpy_helper
from tiny_library import default_traces, target

from gpu_aware_tune.codegen.compile import compile_model
from gpu_aware_tune.finalize.oracle import Reference, make_reference
from gpu_aware_tune.finalize.verify import VerifyReport, base_error, compare, computed_in
from gpu_aware_tune.kernels.traces import trace_to_json
from gpu_aware_tune.library import Program
from gpu_aware_tune.model import layouts
from gpu_aware_tune.model.importer import Model, import_prepared, supported_operators
from gpu_aware_tune.model.tasks import extract
from gpu_aware_tune.onnx_prepare import prepare, read_model


def node(kind: str, inputs: list[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def write(path: Path) -> Path:
    rng = np.random.default_rng(5)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("float32")

    weights = {
        "w1": weight(16, 8, 3, 3), "b1": weight(16, 1)[:, 0], "w2": weight(32, 16, 1, 1),
        "scales": np.array([1, 1, 2, 2], "float32"), "low": np.float32(-0.7),
        "high": np.float32(0.9), "table": weight(11, 32), "dense": weight(32, 10),
        "starts": np.array([1]), "ends": np.array([8]), "axis3": np.array([3]),
        "mean_axes": np.array([2, 3]), "gain": 1 + weight(10, 1)[:, 0],
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w1", "b1"], "c1", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("LeakyRelu", ["c1"], "l1", alpha=0.2),
        node("AveragePool", ["l1"], "p1", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]),
        node("Conv", ["p1", "w2"], "c2"),
        node("Clip", ["c2", "low", "high"], "k1"),
        node("Resize", ["k1", "", "scales"], "r1", mode="linear",
             coordinate_transformation_mode="half_pixel"),
        node("Slice", ["r1", "starts", "ends", "axis3"], "s1"),
        node("ReduceMean", ["s1", "mean_axes"], "m1", keepdims=0),
        node("Gather", ["table", "i"], "g1", axis=0),
        node("Concat", ["m1", "g1"], "h1", axis=0),
        node("MatMul", ["h1", "dense"], "d1"),
        node("Transpose", ["d1"], "t1", perm=[1, 0]),
        node("Softmax", ["t1"], "f1", axis=1),
        node("Transpose", ["f1"], "u1", perm=[1, 0]),
        node("Mul", ["u1", "gain"], "y"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "mutated",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8, 13, 13]),
            helper.make_tensor_value_info("i", TensorProto.INT64, [3]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 10]),
            helper.make_tensor_value_info("d1", TensorProto.FLOAT, [5, 10]),
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mutations") / "net.onnx")


@pytest.fixture(scope="module")
def reference(original: Path) -> Reference:
    return make_reference(original, {}, 0, None, None)


Graph = Any


def find(graph: Graph, name: str) -> NodeProto:
    return next(each for each in graph.node if name in each.output)


def attribute(name: str, key: str, value: object) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        wanted = find(graph, name)
        kept = [each for each in wanted.attribute if each.name != key]
        del wanted.attribute[:]
        wanted.attribute.extend([*kept, helper.make_attribute(key, value)])

    return change


def weights(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Graph], None]:
    def mutate(graph: Graph) -> None:
        tensor = next(each for each in graph.initializer if each.name == name)
        array = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return mutate


def kind(name: str, other: str) -> Callable[[Graph], None]:
    def mutate(graph: Graph) -> None:
        find(graph, name).op_type = other

    return mutate


def lose_input(name: str, position: int) -> Callable[[Graph], None]:
    def mutate(graph: Graph) -> None:
        wanted = find(graph, name)
        kept = [each for at, each in enumerate(wanted.input) if at != position]
        wanted.input[:] = kept

    return mutate


def bypass(name: str) -> Callable[[Graph], None]:
    def mutate(graph: Graph) -> None:
        wanted = find(graph, name)
        for each in graph.node:
            each.input[:] = [wanted.input[0] if i == name else i for i in each.input]

    return mutate


def swap_inputs(name: str) -> Callable[[Graph], None]:
    def mutate(graph: Graph) -> None:
        wanted = find(graph, name)
        wanted.input[:] = list(reversed(wanted.input))

    return mutate


# What a wrong preparation would leave, by the name of the fault.
PREPARATION: dict[str, Callable[[Graph], None]] = {
    "a lost bias": lose_input("c1", 2),
    "padding on one side": attribute("c1", "pads", [0, 0, 2, 2]),
    "another slope": attribute("l1", "alpha", 0.21),
    "padding that counts": attribute("p1", "count_include_pad", 1),
    "an activation left out": bypass("l1"),
    "another limit": weights("high", lambda a: np.asarray(0.95, "float32")),
    "another resize mode": attribute("r1", "mode", "nearest"),
    "other resize coordinates": attribute("r1", "coordinate_transformation_mode", "asymmetric"),
    "aligned corners": attribute("r1", "coordinate_transformation_mode", "align_corners"),
    "a slice one off": weights("starts", lambda a: a - 1),
    "operands swapped": swap_inputs("h1"),
    "softmax over another axis": attribute("f1", "axis", 0),
    "weights in half precision": weights(
        "dense", lambda a: a.astype("float16").astype("float32") * np.float32(1.0005)
    ),
    "weights in 8 bits": weights("w1", lambda a: np.round(a * 127) / np.float32(127)),
    "a filter flipped": weights("w1", lambda a: np.ascontiguousarray(a[:, :, ::-1])),
    "a filter transposed": weights("w1", lambda a: np.ascontiguousarray(a.swapaxes(2, 3))),
    "channels shifted": weights("w2", lambda a: np.roll(a, 1, 0)),
    "a table shifted": weights("table", lambda a: np.roll(a, 1, 0)),
    "one weight lost": weights("dense", lambda a: np.where(a == a.max(), np.float32(0), a)),
    "max for average": kind("p1", "MaxPool"),
}


def checked(model: Model, traces: dict[str, str], reference: Reference) -> VerifyReport:
    executable = compile_model(model, target(), traces).jit()
    tensors = [tvm.runtime.tensor(weight) for weight in model.weights.values()]
    program = Program(executable, tensors, tvm.cpu())
    outputs = []
    for draw in reference.draws:
        arrays = reference.plan.arrays(draw.kind)
        outputs.append(program(program.place([arrays[spec.name] for spec in model.inputs])))
    return compare(reference, outputs, base_error(model, computed_in(model)))


def imported(original: Path, mutate: Callable[[Graph], None] | None = None) -> Model:
    proto = read_model(original)
    if mutate is not None:
        mutate(proto.graph)
    prepared = prepare(proto, {}, None, supported_operators())
    return import_prepared(prepared, Path("net.onnx"), target())


def test_without_a_fault_all_is_well(original: Path, reference: Reference) -> None:
    model = imported(original)
    assert any("_nchw" in str(v.name_hint) for v in model.module.functions), "layouts take part"
    report = checked(model, default_traces(model), reference)
    assert report.ok and report.max_error < 1e-5, report.text


@pytest.mark.parametrize("fault", PREPARATION)
def test_a_fault_of_preparation_is_seen(fault: str, original: Path, reference: Reference) -> None:
    report = checked(imported(original, PREPARATION[fault]), {}, reference)
    assert not report.ok, report.text


def test_a_fault_of_the_layout_is_seen(
    original: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layouts._in_blocks

    def wrong(array: np.ndarray, dims: tuple[int, ...], lanes: int) -> np.ndarray:
        stored = right(array, dims, lanes)
        return np.ascontiguousarray(stored[..., ::-1])

    monkeypatch.setattr(layouts, "_in_blocks", wrong)
    assert not checked(imported(original), {}, reference).ok


@pytest.mark.parametrize("fault", ["coarse numbers", "a result left out"])
def test_a_fault_of_a_schedule_is_seen(fault: str, original: Path, reference: Reference) -> None:
    model = imported(original)
    (task,) = (task for task in extract(model, target()) if "matmul" in task.name)
    schedule = tvm.s_tir.Schedule(task.module)
    names = [
        str(schedule.get(b).name_hint)
        for b in schedule.get_child_blocks(schedule.get_sblock("root"))
    ]
    block = schedule.get_sblock(names[0])
    copy = schedule.cache_read(block, 0, "global")
    schedule.unsafe_set_dtype(copy, 0, "int8" if fault == "coarse numbers" else "bool")
    traces = {**default_traces(model), task.hash: trace_to_json(schedule.trace)}
    assert not checked(model, traces, reference).ok


def test_a_fault_of_export_is_seen(original: Path, reference: Reference) -> None:
    """Weights in another order than `main` takes them."""
    model = imported(original)
    same: dict[tuple[int, ...], list[str]] = {}
    for name, array in model.weights.items():
        same.setdefault(array.shape, []).append(name)
    name = next(iter(model.weights))
    damaged = {**model.weights, name: np.roll(model.weights[name], 1)}
    assert not checked(dataclasses.replace(model, weights=damaged), {}, reference).ok
