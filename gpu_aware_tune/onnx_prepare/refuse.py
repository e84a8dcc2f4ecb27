"""Refuses what cannot be imported, and what TVM imports without complaint but computes wrongly."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from onnx import ModelProto, NodeProto

from gpu_aware_tune.errors import MESSAGE_LENGTH, UserError, one_line, quoted
from gpu_aware_tune.onnx_prepare.attention import attention_reason, group_query_reason
from gpu_aware_tune.onnx_prepare.facts import Facts, attributes, input_of, opset_of, walk
from gpu_aware_tune.onnx_prepare.loops import loop_reason
from gpu_aware_tune.onnx_prepare.recurrent import RECURRENT, recurrent_reason
from gpu_aware_tune.onnx_prepare.resize import resize_is_wrong
from gpu_aware_tune.onnx_prepare.rewriter import operator_name

MORE = "; and {} operators more"
Reason = Callable[[NodeProto, Facts], str]


def refuse_unsupported(model: ModelProto, supported: Collection[tuple[str, str]]) -> None:
    """Raise one error naming the operators that cannot be imported, or not correctly."""
    facts = Facts(model)
    opset = opset_of(model)
    problems: dict[str, list[str]] = {}  # an operator and what is wrong -> its nodes
    for node in walk(model.graph):
        name = one_line(operator_name(node), 60)
        where = quoted(node.name or node.output[0])
        if (node.domain, node.op_type) not in supported:
            reason_of = NOT_EXPANDED.get(operator_name(node))
            why = reason_of(node, facts) if reason_of else ""
            text = f"operator {name} ({{}}){': ' + why if why else ' is not supported'}"
            problems.setdefault(text, []).append(where)
        elif node.op_type in WRONG and (reason := WRONG[node.op_type](node, facts)):
            problems.setdefault(f"operator {name} ({{}}): {reason}", []).append(where)
    if not problems:
        return
    lines = [
        text.format(f"node {nodes[0]}{f' and {len(nodes) - 1} more' if nodes[1:] else ''}")
        for text, nodes in problems.items()
    ]
    ending = f" (opset {opset}); change the model or its export"
    text = "the model cannot be imported: "
    for number, line in enumerate(lines):
        if number and len(text) + len(line) + len(ending) > MESSAGE_LENGTH - len(MORE):
            ending = MORE.format(len(lines) - number) + ending
            break
        text += f"; {line}" if number else line
    raise UserError(one_line(text, MESSAGE_LENGTH - len(ending)) + ending)


def _batch_normalization(node: NodeProto, facts: Facts) -> str:
    # Up to operator set 13 it is the further outputs that mean training.
    if attributes(node).get("training_mode", 0) or len(node.output) > 1:
        return "training mode is not supported here; export the model for inference"
    return ""


def dropout_trains(node: NodeProto, facts: Facts) -> str:
    """Say why a Dropout cannot be left out; empty where it can."""
    training = facts.constant(input_of(node, 2))
    if not input_of(node, 2) or (training is not None and not training):
        return ""
    ratio = facts.constant(input_of(node, 1))
    if training is not None and ratio is not None and ratio == 0:
        return ""
    return "training mode drops values at random; export the model for inference"


def _constant_inputs(*positions: int) -> Reason:
    def reason(node: NodeProto, facts: Facts) -> str:
        for position in positions:
            name = input_of(node, position)
            if name and facts.constant(name) is None:
                return f"its input {name!r} must be constant"
        return ""

    return reason


def _conv_transpose(node: NodeProto, facts: Facts) -> str:
    return "output_shape is not supported here" if "output_shape" in attributes(node) else ""


def _one_output(node: NodeProto, facts: Facts) -> str:
    return "only its first output is supported" if len(node.output) > 1 else ""


def _is_inf(node: NodeProto, facts: Facts) -> str:
    values = attributes(node)
    both = values.get("detect_positive", 1) and values.get("detect_negative", 1)
    return "" if both else "it must detect both infinities"


def _reduce(node: NodeProto, facts: Facts) -> str:
    shape = facts.shapes.get(node.input[0])
    if shape is not None and np.prod(shape) == 0:
        return "it reduces an empty tensor"
    return ""


def _tile(node: NodeProto, facts: Facts) -> str:
    repeats = facts.constant(input_of(node, 1))
    return "its repeats must not be negative" if repeats is not None and (repeats < 0).any() else ""


def _space_to_depth(node: NodeProto, facts: Facts) -> str:
    return "mode 'CRD' is not supported" if attributes(node).get("mode") == b"CRD" else ""


# Why a rule left an operator alone that the importer lacks.
NOT_EXPANDED: dict[str, Reason] = {
    **dict.fromkeys(RECURRENT, recurrent_reason),
    **dict.fromkeys(("Loop", "Scan"), loop_reason),
    "com.microsoft.Attention": attention_reason,
    "com.microsoft.GroupQueryAttention": group_query_reason,
    "com.microsoft.MultiHeadAttention": attention_reason,
}
REDUCTIONS = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
WRONG: dict[str, Reason] = {
    **{f"Reduce{kind}": _reduce for kind in REDUCTIONS},
    "BatchNormalization": _batch_normalization,
    "ConvTranspose": _conv_transpose,
    "Dropout": dropout_trains,
    "Expand": _constant_inputs(1),
    "IsInf": _is_inf,
    "LayerNormalization": _one_output,
    "MaxPool": _one_output,
    "NonMaxSuppression": _constant_inputs(2, 3, 4),
    "Resize": resize_is_wrong,
    "SpaceToDepth": _space_to_depth,
    "Tile": _tile,
}
