"""LSTM, GRU and RNN against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper
from onnx_check import LLVM, assert_correct, imported
from onnx_graphs import F32, node_model, numbers, run_onnxruntime

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.model.tasks import extract

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
BATCH, INPUTS, SIZE = 2, 3, 5


def recurrent(
    op_type: str,
    steps: int = 4,
    lengths: list[int] | None = None,
    initial: bool = False,
    peephole: bool = False,
    **values: Any,
) -> tuple[ModelProto, dict[str, np.ndarray]]:
    gates = GATES[op_type] * SIZE
    directions = 2 if values.get("direction") == "bidirectional" else 1
    batch_first = values.get("layout", 0)
    weights = {
        "w": numbers(directions, gates, INPUTS, seed=1),
        "r": 0.5 * numbers(directions, gates, SIZE, seed=2),
        "b": numbers(directions, 2 * gates, seed=3),
    }
    feeds = {"x": numbers(*((BATCH, steps) if batch_first else (steps, BATCH)), INPUTS)}
    order = ["x", "w", "r", "b"]
    order.append("l" if lengths else "")
    if lengths:
        feeds["l"] = np.array(lengths, np.int32)
    states = ["h", "c"] if op_type == "LSTM" else ["h"]
    shape = (BATCH, directions, SIZE) if batch_first else (directions, BATCH, SIZE)
    for seed, name in enumerate(states):
        order.append(name if initial else "")
        if initial:
            feeds[name] = numbers(*shape, seed=4 + seed)
    if peephole:
        weights["p"] = numbers(directions, 3 * SIZE, seed=6)
        order.append("p")
    outputs = [(name, F32) for name in ("y", *(f"last_{name}" for name in states))]
    model = node_model(
        op_type, feeds, weights, outputs, 14, ",".join(order), hidden_size=SIZE, **values
    )
    return model, feeds


CASES: dict[str, dict[str, Any]] = {
    "forward": {},
    "initial states": {"initial": True},
    "reverse": {"direction": "reverse", "initial": True},
    "bidirectional": {"direction": "bidirectional", "initial": True},
    "lengths": {"lengths": [4, 2], "initial": True, "direction": "bidirectional"},
    "lengths reverse": {"lengths": [1, 3], "direction": "reverse"},
    "clip": {"clip": 0.4, "initial": True},
}


@pytest.mark.parametrize("op_type", GATES)
@pytest.mark.parametrize("case", CASES)
def test_recurrent_operators(op_type: str, case: str) -> None:
    assert_correct(*recurrent(op_type, **CASES[case]))


LSTM: dict[str, dict[str, Any]] = {
    "peepholes": {"peephole": True, "initial": True, "direction": "bidirectional"},
    "input_forget": {"input_forget": 1},
    "activations": {"activations": ["HardSigmoid", "Softsign", "Relu"], "activation_alpha": [0.3],
                    "activation_beta": [0.4]},
    "many activations": {
        "activations": ["Sigmoid", "LeakyRelu", "ScaledTanh", "Elu", "Tanh", "Affine"],
        "activation_alpha": [0.3, 0.8, 0.5, 0.7],
        "activation_beta": [1.1, 0.2],
        "direction": "bidirectional",
    },
    "everything": {
        "peephole": True, "initial": True, "direction": "bidirectional", "lengths": [2, 4],
        "clip": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", LSTM)
def test_variants_of_lstm(case: str) -> None:
    assert_correct(*recurrent("LSTM", **LSTM[case]))


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_a_gru_that_resets_after_the_product(direction: str) -> None:
    assert_correct(*recurrent("GRU", linear_before_reset=1, initial=True, direction=direction))


@pytest.mark.parametrize("op_type", GATES)
def test_the_batch_may_come_first(op_type: str) -> None:
    """Not against ONNX Runtime, which does not have it: against itself with other axes."""
    model, feeds = recurrent(op_type, initial=True, direction="bidirectional")
    y, *last = run_onnxruntime(model, feeds)
    want = [y.transpose(2, 0, 1, 3), *(state.swapaxes(0, 1) for state in last)]
    model, _ = recurrent(op_type, initial=True, direction="bidirectional", layout=1)
    swapped = {name: array.swapaxes(0, 1) for name, array in feeds.items()}
    assert_correct(model, swapped, [np.ascontiguousarray(array) for array in want])


def test_equal_steps_are_one_task() -> None:
    few, many = (extract(imported(recurrent("LSTM", steps)[0]), LLVM) for steps in (8, 24))
    assert len(many) <= len(few) + 2  # the outputs of more steps are stacked in a tree
    assert max(task.weight for task in many) >= 23


def test_long_sequences_are_refused_with_a_way_out() -> None:
    with pytest.raises(
        UserError, match=r"its 600 steps are more than .* carry the state"
    ) as caught:
        imported(recurrent("LSTM", 600)[0])
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_an_lstm_whose_products_are_quantised(direction: str, per_channel: bool) -> None:
    """ONNX Runtime's DynamicQuantizeLSTM; weights of 7 bits, as its sums saturate without VNNI."""
    steps, size, inputs = 4, 8, 6
    directions = 2 if direction == "bidirectional" else 1
    generator = np.random.default_rng(0)
    columns = (directions, 4 * size) if per_channel else (directions,)
    weights = {
        "w": generator.integers(-64, 64, (directions, inputs, 4 * size)).astype(np.int8),
        "r": generator.integers(-64, 64, (directions, size, 4 * size)).astype(np.int8),
        "b": numbers(directions, 8 * size, seed=3),
        "ws": generator.uniform(0.004, 0.006, columns).astype(np.float32),
        "wz": np.zeros(columns, np.int8),
        "rs": generator.uniform(0.004, 0.006, columns).astype(np.float32),
        "rz": np.zeros(columns, np.int8),
    }
    feeds = {"x": numbers(steps, 1, inputs)}
    model = node_model(
        "DynamicQuantizeLSTM", feeds, weights, [("y", F32), ("h", F32), ("c", F32)], 17,
        "x,w,r,b,,,,,ws,wz,rs,rz", domain="com.microsoft", hidden_size=size, direction=direction,
    )  # fmt: skip
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert_correct(model, feeds, tolerance=1e-2)  # it rounds the hidden state
