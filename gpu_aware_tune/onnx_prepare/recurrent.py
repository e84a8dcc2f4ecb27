"""Rules for LSTM, GRU and RNN: unrolled over a sequence of static length.

The products with the inputs of all steps are one matrix product. A step is one product with the
hidden state (two for a GRU that resets before it) and elementwise operators. A step reads its part
of the inputs at a constant index, not at an offset, so that all steps are the same kernels.

T is the length of the sequence, B the batch, I and H the sizes of inputs and hidden state, G the
number of gates, D the number of directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.activations import ACTIVATIONS, activate
from gpu_aware_tune.onnx_prepare.dynamic_quant import dynamic_product
from gpu_aware_tune.onnx_prepare.facts import Facts, attributes, input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule

MOST_STEPS = 512  # a bidirectional layer of 256 takes 7 s of CPU to import, one of 1024 takes 59 s
QUANTISED = "DynamicQuantizeLSTM"
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FUNCTIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@dataclass
class Layer:
    """What the directions of a recurrent node have in common."""

    op_type: str
    values: dict[str, Any]
    steps: int
    batch: int
    size: int
    dtype: Any
    directions: int
    indices: list[str] = field(default_factory=list)  # a constant for each step
    valid: str = ""  # (T, B, 1): whether a step is within the sequence; "" where all are


@dataclass
class Cell:
    """One direction: its weights, by which a step computes the next state."""

    layer: Layer
    recurrence: str  # (H, G H)
    recurrence_bias: str  # (G H), "" without
    peephole: Sequence[str]  # (H) each, for the input, output and forget gates
    functions: Sequence[tuple[str, float | None, float | None]]

    def activated(self, to: Rewriter, which: int, value: str) -> str:
        """Emit one of the cell's activations; what goes into it is clipped where `clip` says."""
        if limit := self.layer.values.get("clip", 0.0):
            bounds = (to.constant(bound, self.layer.dtype) for bound in (-limit, limit))
            value = to.op("Clip", value, *bounds)
        name, alpha, beta = self.functions[which]
        return activate(to, name, value, alpha, beta) or value

    def gate(self, to: Rewriter, gates: str, first: int, count: int = 1) -> str:
        """Emit gates out of (B, G H) values, or (G H) of a bias."""
        bounds = [first * self.layer.size, (first + count) * self.layer.size]
        return to.op("Slice", gates, *(to.constant([bound]) for bound in (*bounds, -1)))


Step = Callable[[Cell, Rewriter, str, list[str]], list[str]]
"""Takes a cell, the projected inputs (B, G H) and the state; returns the next state, h first."""


def _lstm(cell: Cell, to: Rewriter, projected: str, state: list[str]) -> list[str]:
    """Gates in the order input, output, forget, cell."""
    h, c = state
    gates = to.op("Add", projected, to.op("MatMul", h, cell.recurrence))
    i, o, f, g = (cell.gate(to, gates, place) for place in range(4))
    if cell.peephole:
        i = to.op("Add", i, to.op("Mul", cell.peephole[0], c))
        f = to.op("Add", f, to.op("Mul", cell.peephole[2], c))
    i = cell.activated(to, 0, i)
    if cell.layer.values.get("input_forget", 0):
        f = to.op("Sub", to.constant(1.0, cell.layer.dtype), i)
    else:
        f = cell.activated(to, 0, f)
    c = to.op("Add", to.op("Mul", f, c), to.op("Mul", i, cell.activated(to, 1, g)))
    if cell.peephole:
        o = to.op("Add", o, to.op("Mul", cell.peephole[1], c))
    name, alpha, beta = cell.functions[2]
    hidden = activate(to, name, c, alpha, beta) or c
    return [to.op("Mul", cell.activated(to, 0, o), hidden), c]


def _gru(cell: Cell, to: Rewriter, projected: str, state: list[str]) -> list[str]:
    """Gates in the order update, reset, hidden."""
    (h,) = state
    if cell.layer.values.get("linear_before_reset", 0):
        product = to.op("MatMul", h, cell.recurrence)
        gates = to.op("Add", cell.gate(to, projected, 0, 2), cell.gate(to, product, 0, 2))
        z, r = (cell.activated(to, 0, cell.gate(to, gates, place)) for place in range(2))
        linear = cell.gate(to, product, 2)
        if cell.recurrence_bias:
            linear = to.op("Add", linear, cell.gate(to, cell.recurrence_bias, 2))
        reset = to.op("Mul", r, linear)
    else:
        product = to.op("MatMul", h, cell.gate(to, cell.recurrence, 0, 2))
        gates = to.op("Add", cell.gate(to, projected, 0, 2), product)
        z, r = (cell.activated(to, 0, cell.gate(to, gates, place)) for place in range(2))
        reset = to.op("MatMul", to.op("Mul", r, h), cell.gate(to, cell.recurrence, 2))
    fresh = cell.activated(to, 1, to.op("Add", cell.gate(to, projected, 2), reset))
    kept = to.op("Sub", to.constant(1.0, cell.layer.dtype), z)
    return [to.op("Add", to.op("Mul", kept, fresh), to.op("Mul", z, h))]


def _rnn(cell: Cell, to: Rewriter, projected: str, state: list[str]) -> list[str]:
    product = to.op("MatMul", state[0], cell.recurrence)
    return [cell.activated(to, 0, to.op("Add", projected, product))]


STEPS: dict[str, Step] = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


def recurrent(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: unroll an LSTM, GRU or RNN.

    Inputs are X (T, B, I), W (D, G H, I), R (D, G H, H), B (D, 2 G H), sequence_lens (B), initial_h
    and initial_c (D, B, H), P (D, 3 H); outputs Y (T, D, B, H), Y_h and Y_c (D, B, H). With
    `layout` 1 the batch comes first in X, the initial states and the outputs.

    ONNX Runtime's DynamicQuantizeLSTM has integers W (D, I, G H) and R (D, H, G H), and behind P their
    scales and zero points. It rounds the hidden state to 8 bits, too; here that stays in floats: it
    would be ten small kernels more in each step, 25 times the time.
    """
    layer = _layer(node, to)
    if layer is None:
        return None
    functions = _functions(layer.op_type, attributes(node), layer.directions)
    if functions is None:
        return None
    batch_first = layer.values.get("layout", 0) == 1
    x = node.input[0]
    x = to.op("Transpose", x, perm=[1, 0, 2]) if batch_first else x
    layer.indices = [to.constant(step) for step in range(layer.steps)]
    layer.valid = _valid_steps(input_of(node, 4), layer, to)
    direction = layer.values.get("direction", b"forward")
    outputs, finals = [], []
    for number in range(layer.directions):
        cell, projected = _cell(node, to, layer, number, functions[number], x)
        state = _initial(node, to, layer, number, batch_first)
        is_reverse = direction == b"reverse" or number == 1
        made, final = _unrolled(cell, to, projected, state, is_reverse)
        outputs.append(to.op("Unsqueeze", made, to.constant([1])))
        finals.append(final)
    y = to.op("Concat", *outputs, axis=1) if len(outputs) > 1 else outputs[0]
    if batch_first:
        y = to.op("Transpose", y, perm=[2, 0, 1, 3])
    axis = to.constant([1 if batch_first else 0])
    last = [
        to.op(
            "Concat", *(to.op("Unsqueeze", state, axis) for state in states), axis=int(batch_first)
        )
        for states in zip(*finals, strict=True)
    ]
    return [y, *last][: len(node.output)]


def _layer(node: NodeProto, to: Rewriter) -> Layer | None:
    values = attributes(node)
    shape, recurrence = to.shape(node.input[0]), to.shape(node.input[2])
    dtype = to.dtype(node.input[0])
    if shape is None or recurrence is None or dtype is None:
        return None
    steps, batch = reversed(shape[:2]) if values.get("layout", 0) else shape[:2]
    if not 0 < steps <= MOST_STEPS:
        return None
    is_quantised = node.op_type == QUANTISED
    size, op_type = recurrence[1 if is_quantised else 2], "LSTM" if is_quantised else node.op_type
    return Layer(op_type, values, steps, batch, size, dtype, recurrence[0])


def _functions(
    op_type: str, values: dict[str, Any], directions: int
) -> list[list[tuple[str, float | None, float | None]]] | None:
    """The activations of each direction; only those that have an alpha or beta consume one."""
    given = values.get("activations") or []
    names = [name.decode() for name in given] or FUNCTIONS[op_type] * directions
    alphas, betas = (
        list(values.get("activation_alpha", [])),
        list(values.get("activation_beta", [])),
    )
    found: list[tuple[str, float | None, float | None]] = []
    for name in names:
        if name.lower() not in ACTIVATIONS:
            return None
        _, alpha, beta = ACTIVATIONS[name.lower()]
        alpha = alphas.pop(0) if alpha is not None and alphas else alpha
        beta = betas.pop(0) if beta is not None and betas else beta
        found.append((name, alpha, beta))
    count = len(FUNCTIONS[op_type])
    return [found[number * count : (number + 1) * count] for number in range(directions)]


def _valid_steps(lengths: str, layer: Layer, to: Rewriter) -> str:
    if not lengths:
        return ""
    known = to.facts.constant(lengths)
    if known is not None and np.all(known >= layer.steps):
        return ""
    steps = to.constant(np.arange(layer.steps).reshape(-1, 1, 1), np.int32)
    return to.op("Less", steps, to.op("Reshape", lengths, to.constant([1, -1, 1])))


def _cell(
    node: NodeProto,
    to: Rewriter,
    layer: Layer,
    number: int,
    functions: Sequence[tuple[str, float | None, float | None]],
    x: str,
) -> tuple[Cell, str]:
    """Return a direction's cell, and its inputs as products (T, B, G H) with the biases added."""
    gates = GATES[layer.op_type]
    which = to.constant(number)
    w, r = (to.op("Gather", node.input[place], which, axis=0) for place in (1, 2))
    if node.op_type == QUANTISED:
        scales = [to.op("Gather", node.input[place], which, axis=0) for place in range(8, 12)]
        cell = Cell(layer, _dequantized(to, r, *scales[2:]), "", (), functions)
        projected = dynamic_product(to, x, w, *scales[:2])
    else:
        cell = Cell(layer, to.op("Transpose", r, perm=[1, 0]), "", (), functions)
        projected = to.op("MatMul", x, to.op("Transpose", w, perm=[1, 0]))
    if bias := input_of(node, 3):
        halves = to.op("Reshape", to.op("Gather", bias, which, axis=0), to.constant([2, -1]))
        first, cell.recurrence_bias = (to.op("Gather", halves, to.constant(i)) for i in (0, 1))
        second = cell.recurrence_bias
        if layer.op_type == "GRU" and layer.values.get("linear_before_reset", 0):
            added = np.repeat([1.0, 1.0, 0.0], layer.size)  # the hidden gate's comes in later
            second = to.op("Mul", second, to.constant(added, layer.dtype))
        projected = to.op("Add", projected, to.op("Add", first, second))
    if gates == 4 and (peephole := input_of(node, 7)):
        own = to.op("Gather", peephole, which, axis=0)
        cell.peephole = [cell.gate(to, own, place) for place in range(3)]
    return cell, projected


def _dequantized(to: Rewriter, matrix: str, scale: str, zero: str) -> str:
    """Emit a matrix in floats."""
    whole = to.op("Sub", to.cast(matrix, np.float32), to.cast(zero, np.float32))
    return to.op("Mul", whole, scale)


def _initial(
    node: NodeProto, to: Rewriter, layer: Layer, number: int, batch_first: bool
) -> list[str]:
    places = (5, 6) if layer.op_type == "LSTM" else (5,)
    zero = to.constant(np.zeros((layer.batch, layer.size)), layer.dtype)
    which, axis = to.constant(number), int(batch_first)
    names = [input_of(node, place) for place in places]
    return [to.op("Gather", name, which, axis=axis) if name else zero for name in names]


def _unrolled(
    cell: Cell, to: Rewriter, projected: str, state: list[str], is_reverse: bool
) -> tuple[str, list[str]]:
    """Emit all steps; return the hidden states (T, B, H) and the final state.

    Steps behind the end of a sequence leave its state as it is, and their outputs are zero.
    """
    layer = cell.layer
    order = range(layer.steps)
    hidden = [""] * layer.steps
    zero = to.constant(0.0, layer.dtype) if layer.valid else ""
    for step in reversed(order) if is_reverse else order:
        inputs = to.op("Gather", projected, layer.indices[step], axis=0)
        following = STEPS[layer.op_type](cell, to, inputs, state)
        hidden[step] = following[0]
        if layer.valid:
            valid = to.op("Gather", layer.valid, layer.indices[step], axis=0)
            hidden[step] = to.op("Where", valid, following[0], zero)
            following = [
                to.op("Where", valid, new, old) for new, old in zip(following, state, strict=True)
            ]
        state = following
    return to.stack(hidden), state


def recurrent_reason(node: NodeProto, facts: Facts) -> str:
    """Say why a recurrent operator was not unrolled."""
    shape = facts.shapes.get(node.input[0])
    if shape is None:
        return "its sequence length must be static"
    steps = shape[1 if attributes(node).get("layout", 0) else 0]
    if steps > MOST_STEPS:
        return (
            f"its {steps} steps are more than the {MOST_STEPS} that are unrolled: "
            "export it for shorter sequences and carry the state from one to the next"
        )
    return "one of its activations is not known"


RECURRENT: dict[str, Rule] = dict.fromkeys((*GATES, f"com.microsoft.{QUANTISED}"), recurrent)
"""Rules by operator name, see `rewriter.operator_name`."""
