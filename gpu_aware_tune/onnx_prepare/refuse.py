"""Refuses what cannot be imported, and what TVM imports without complaint but computes wrongly."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from onnx import ModelProto, NodeProto

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.onnx_prepare.facts import FLOATS, Facts, attributes, input_of, opset_of, walk
from gpu_aware_tune.onnx_prepare.resize import resize_is_wrong

Reason = Callable[[NodeProto, Facts], str]


def refuse_unsupported(model: ModelProto, supported: Collection[tuple[str, str]]) -> None:
    """Raise one error naming every operator that cannot be imported, or not correctly."""
    facts = Facts(model)
    opset = opset_of(model)
    problems: dict[str, None] = {}  # ordered and unique
    for node in walk(model.graph):
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        where = f"node {node.name or node.output[0]!r}, opset {opset}"
        if (node.domain, node.op_type) not in supported:
            problems[f"operator {name} ({where}) is not supported"] = None
        elif node.op_type in WRONG and (reason := WRONG[node.op_type](node, facts)):
            problems[f"operator {name} ({where}): {reason}"] = None
    if problems:
        text = "; ".join(problems)
        raise UserError(f"the model cannot be imported: {text}; change the model or its export")


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


def _mod(node: NodeProto, facts: Facts) -> str:
    if facts.types.get(node.input[0]) in FLOATS and not attributes(node).get("fmod", 0):
        return "fmod=0 on floating point differs at infinities"
    return ""


def _roi_align(node: NodeProto, facts: Facts) -> str:
    return "mode 'max' is not supported" if attributes(node).get("mode") == b"max" else ""


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


def _space_to_depth(node: NodeProto, facts: Facts) -> str:
    return "mode 'CRD' is not supported" if attributes(node).get("mode") == b"CRD" else ""


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
    "Mod": _mod,
    "NonMaxSuppression": _constant_inputs(2, 3, 4),
    "Resize": resize_is_wrong,
    "RoiAlign": _roi_align,
    "SpaceToDepth": _space_to_depth,
}
