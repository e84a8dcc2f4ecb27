"""Files that are damaged or unfold to more than a machine has: one line at once, and little memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import FunctionProto, ModelProto, TensorProto, helper, numpy_helper
from onnx_graphs import F32, node_model

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.onnx_prepare import prepare, read_model
from gpu_aware_tune.onnx_prepare.fold import fold
from gpu_aware_tune.onnx_prepare.validity import fault_of

MEMORY_BYTES, SECONDS = 3 << 30, 60
X = np.ones((2, 3), np.float32)


def chain(op_type: str, count: int, start: list[int], second: str) -> ModelProto:
    """A model that grows a constant with one operator after the other."""
    attribute = {"axis": 0} if op_type == "Concat" else {}
    nodes = [
        helper.make_node(op_type, [f"k{n}", second or f"k{n}"], [f"k{n + 1}"], **attribute)
        for n in range(count)
    ]
    nodes += [
        helper.make_node("ReduceSum", [f"k{count}"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", F32, [2])],
        [helper.make_tensor_value_info("y", F32, [2])],
        [
            numpy_helper.from_array(np.ones(start, np.float32), "k0"),
            numpy_helper.from_array(np.array([1000] * len(start)), "s"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def nested(depth: int, closed: bool = False) -> ModelProto:
    """Local functions of which each calls the next one twice, the last one the first if closed."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    functions: list[FunctionProto] = []
    for level in range(depth):
        is_last = level == depth - 1
        inner, domain = (
            ("Relu", "") if is_last and not closed else (f"F{(level + 1) % depth}", "my")
        )
        nodes = [
            helper.make_node(inner, ["a"], ["t"], domain=domain),
            helper.make_node(inner, ["t"], ["o"], domain=domain),
        ]
        functions.append(helper.make_function("my", f"F{level}", ["a"], ["o"], nodes, opsets))
    graph = helper.make_graph(
        [helper.make_node("F0", ["x"], ["y"], domain="my")],
        "g",
        [helper.make_tensor_value_info("x", F32, [2])],
        [helper.make_tensor_value_info("y", F32, [2])],
    )
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=8)


def filled(elements: int) -> ModelProto:
    shape = numpy_helper.from_array(np.array([elements]), "s")
    model = chain("Concat", 0, [1], "")
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["s"], ["k"]))
    model.graph.node[1].input[0] = "k"
    del model.graph.initializer[:]
    model.graph.initializer.append(shape)
    return model


def one(op_type: str, shape: list[int], **attributes: object) -> ModelProto:
    node = helper.make_node(op_type, ["x"], ["y"], **attributes)
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node], "g", [value("x", F32, shape)], [value("y", F32, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


HOSTILE: dict[str, tuple[ModelProto, str]] = {
    "concatenations": (chain("Concat", 42, [1], ""), r"Concat \(node 'k29'\).* 2 GiB.*up to 1 GiB"),
    "tiles": (chain("Tile", 3, [1000], "s"), r"Tile \(node 'k2'\)"),
    "a filled constant": (filled(1 << 31), r"ConstantOfShape \(node 'k'\).* 8 GiB"),
    "functions": (nested(25), "unfold to 33554432 nodes"),
    "endless functions": (nested(3, closed=True), "'F0' calls itself"),
    "an input": (one("EyeLike", [1 << 40, 1 << 40]), "input 'x' has more than a million GiB"),
    "an equation": (one("Einsum", [2, 3], equation="...;;->->"), "Einsum .*equation '...;;->->'"),
    "dimensions": (one("Relu", [1] * 40), "'x' has 40 dimensions; values of up to 32"),
    "a long equation": (one("Einsum", [2, 3], equation="i" * 9999), "Einsum .*equation 'iii"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_unfolds_is_refused_before_anything_else(case: str, tmp_path: Path) -> None:
    """In a process of its own, whose memory and time are limited."""
    model, message = HOSTILE[case]
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    code = (
        "import sys; from pathlib import Path; from gpu_aware_tune.onnx_prepare import read_model\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}read_model(Path(sys.argv[1]))", path],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES)),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert "UserError" in done.stderr.splitlines()[-1]
    with pytest.raises(UserError, match=message):
        read_model(path)


@pytest.mark.parametrize("word", [b"middle", b"Softmax", b"the graph", b"my.domain"])
def test_a_name_that_is_not_text_is_refused(word: bytes, tmp_path: Path) -> None:
    model = one("Softmax", [2, 3])
    model.graph.name = "the graph"
    model.opset_import.append(helper.make_opsetid("my.domain", 1))
    model.graph.node[0].output[0] = "middle"
    model.graph.node.append(helper.make_node("Relu", ["middle"], ["y"]))
    data = model.SerializeToString()
    assert word in data
    path = tmp_path / "m.onnx"
    path.write_bytes(data.replace(word, word[:3] + b"\xd9" + word[4:]))
    with pytest.raises(UserError, match=r"the file is damaged: its name .*\\xd9.* is not text"):
        read_model(path)


@pytest.mark.parametrize(
    "equation", ["ij,jk->ik", "...ij, ...jk -> ...ik", "ij,jk", "bhqd,bhkd->bhqk", "ii->i"]
)
def test_ordinary_equations_are_read(equation: str, tmp_path: Path) -> None:
    model = one("Einsum", [2, 3], equation=equation)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    read_model(tmp_path / "m.onnx")


def test_sizes_are_looked_at_again_with_the_shapes_that_are_given(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "t"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Transpose", ["x"], ["t"]), node],
        "g",
        [value("x", F32, ["n", 2])],
        [value("y", F32, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"MatMul \(node 'y'\) makes a value of 37 GiB"):
        prepare(read_model(tmp_path / "m.onnx"), {"x": (100_000, 2)}, None, {("", "MatMul")})


def test_text_is_not_folded() -> None:
    """The reference's regular expressions can take for ever."""
    nodes = [
        helper.make_node("RegexFullMatch", ["k"], ["a"], pattern="(a+)+$"),
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "b"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    text = helper.make_tensor("k", TensorProto.STRING, [1], [b"a" * 40 + b"!"])
    graph = helper.make_graph(nodes, "g", [value("x", F32, [1])], [value("y", F32, [1])], [text])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    assert [node.op_type for node in fold(model).graph.node] == ["RegexFullMatch", "Cast", "Add"]


def test_a_constant_whose_size_is_found_while_folding_is_not_made() -> None:
    """Nothing is known of its shape before the values of its input are."""
    nodes = [
        helper.make_node("Mul", ["a", "a"], ["square"]),
        helper.make_node("Reshape", ["square", "one"], ["s"]),
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
        helper.make_node("ReduceSum", ["c"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", F32, [2])],
        [value("y", F32, [2])],
        [
            numpy_helper.from_array(np.array([1 << 20]), "a"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    folded = fold(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    assert [node.op_type for node in folded.graph.node] == ["ConstantOfShape", "ReduceSum", "Add"]


def test_a_negative_number_of_tiles_is_refused() -> None:
    constants = {"s": np.array([-1, 1])}
    model = node_model("Tile", {"x": X}, constants, opset=17)
    with pytest.raises(UserError, match=r"Tile \(node 'y'\): its repeats must not be negative"):
        prepare(model, {}, None, {("", "Tile")})
    assert isinstance(model, onnx.ModelProto)


@pytest.mark.parametrize("kind", ["input", "output"])
def test_two_ends_of_one_name_are_refused(kind: str, tmp_path: Path) -> None:
    model = one("Relu", [2, 3])
    ends = getattr(model.graph, kind)
    ends.append(ends[0])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=f"the model has 2 {kind}s '[xy]': give each its own name"):
        read_model(tmp_path / "m.onnx")


def test_whose_fault_it_is_that_a_file_fails(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = one("Relu", [2, 3])
    path.write_bytes(model.SerializeToString())
    assert fault_of(path) == ""
    model.graph.node[0].input.append("x")
    path.write_bytes(model.SerializeToString())
    assert "Relu" in fault_of(path)
    short = node_model("Add", {"x": X}, {"k": X})
    short.graph.initializer[0].raw_data = short.graph.initializer[0].raw_data[:-1]
    path.write_bytes(short.SerializeToString())
    assert fault_of(path).isprintable() and len(fault_of(path)) > 10
