"""Loop and Scan of known length against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, helper, numpy_helper
from onnx_check import assert_correct, imported
from onnx_graphs import BOOL, F32, I64, make_model, numbers, value

from gpu_aware_tune.errors import UserError

X = numbers(3, 4)
CONDITIONS: dict[str, Sequence[NodeProto]] = {
    "passed on": [helper.make_node("Identity", ["cond"], ["go"])],
    "cast": [helper.make_node("Cast", ["cond"], ["go"], to=BOOL)],
    "constant": [
        helper.make_node("Constant", [], ["go"], value=numpy_helper.from_array(np.array(True)))
    ],
    "initial value": [],
}


def loop(condition: Sequence[NodeProto], trips: int, **constants: Any) -> Any:
    """x = x w + i for each iteration i, with a condition; the sums of all x are stacked."""
    nodes = [
        helper.make_node("Cast", ["i"], ["number"], to=F32),
        helper.make_node("Mul", ["x0", "w"], ["scaled"]),
        helper.make_node("Add", ["scaled", "number"], ["x1"]),
        helper.make_node("ReduceSum", ["x1"], ["total"], keepdims=0),
        *condition,
    ]
    inputs = [value("i", I64, []), value("cond", BOOL, []), value("x0", F32, None)]
    outputs = [value("go" if condition else "cond", BOOL, []), value("x1", F32, None)]
    outputs.append(value("total", F32, None))
    half = numpy_helper.from_array(np.array(0.5, np.float32), "w")
    body = helper.make_graph(nodes, "body", inputs, outputs, [half])
    node = helper.make_node("Loop", ["n", "c", "x"], ["y", "sums"], body=body)
    given = {"n": np.array(trips), "c": np.array(True), **constants}
    return make_model([node], [value("x", F32, [3, 4])], [("y", F32), ("sums", F32)], given, 13)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("trips", [1, 5, 40])
def test_loops_of_known_length(trips: int, condition: str) -> None:
    assert_correct(loop(CONDITIONS[condition], trips), {"x": X})


def test_a_loop_that_never_runs() -> None:
    model = loop(CONDITIONS["cast"], 0)
    del model.graph.output[1], model.graph.node[0].output[1]
    body = model.graph.node[0].attribute[0].g
    del body.output[2]
    assert_correct(model, {"x": X})


def test_a_loop_in_a_loop_that_reads_from_outside() -> None:
    inner_body = helper.make_graph(
        [
            helper.make_node("Add", ["a", "outer"], ["b"]),
            helper.make_node("Identity", ["c2"], ["d2"]),
        ],
        "inner",
        [value("j", I64, []), value("c2", BOOL, []), value("a", F32, None)],
        [value("d2", BOOL, []), value("b", F32, None)],
    )
    outer_body = helper.make_graph(
        [
            helper.make_node("Mul", ["s", "x"], ["outer"]),
            helper.make_node("Loop", ["m", "t", "s"], ["r"], body=inner_body),
            helper.make_node("Identity", ["c1"], ["d1"]),
        ],
        "outer",
        [value("i", I64, []), value("c1", BOOL, []), value("s", F32, None)],
        [value("d1", BOOL, []), value("r", F32, None)],
    )
    node = helper.make_node("Loop", ["n", "t", "x"], ["y"], body=outer_body)
    constants = {"n": np.array(3), "m": np.array(2), "t": np.array(True)}
    model = make_model([node], [value("x", F32, [3, 4])], [("y", F32)], constants, 13)
    assert_correct(model, {"x": X})


def test_a_loop_that_values_end_is_refused() -> None:
    compare = [helper.make_node("Less", ["total", "w"], ["go"])]
    with pytest.raises(UserError, match=r"Loop \(node 'y'\): it is not known how often it runs"):
        imported(loop(compare, 5))


def scan(**values: Any) -> NodeProto:
    """s = s + a b for the elements a, b; s and s - a are the outputs."""
    nodes = [
        helper.make_node("Mul", ["a", "b"], ["product"]),
        helper.make_node("Add", ["s0", "product"], ["s1"]),
        helper.make_node("Identity", ["s1"], ["kept"]),
        helper.make_node("Sub", ["s1", "a"], ["less"]),
    ]
    inputs = [value(name, F32, [4]) for name in ("s0", "a", "b")]
    outputs = [value(name, F32, [4]) for name in ("s1", "kept", "less")]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    names = ["s", "x", "z"], ["last", "sums", "less"]
    return helper.make_node("Scan", *names, body=body, num_scan_inputs=2, **values)


@pytest.mark.parametrize("opset", [9, 13])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"scan_input_directions": [1, 0]},
        {"scan_output_directions": [0, 1]},
        {"scan_input_axes": [1, 0]},
        {"scan_output_axes": [1, 0], "scan_input_axes": [1, -2], "scan_input_directions": [0, 1]},
    ],
)
def test_scans(values: dict[str, Any], opset: int) -> None:
    if opset < 11 and "scan_input_axes" in values:
        values = {**values, "scan_input_axes": [1, 0]}  # negative axes came with set 11
    first = X.T if "scan_input_axes" in values else X
    feeds = {"s": numbers(4, seed=1), "x": np.ascontiguousarray(first), "z": numbers(3, 4, seed=2)}
    inputs = [value(name, F32, array.shape) for name, array in feeds.items()]
    outputs = [("last", F32), ("sums", F32), ("less", F32)]
    assert_correct(make_model([scan(**values)], inputs, outputs, {}, opset), feeds)
