"""Rules that replace one ONNX operator by others, where ONNX itself defines no function body.

A rule gets a node and a `Rewriter`, emits nodes through it and returns the names of the values that
take the place of the node's outputs, or None to leave the node alone.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from gpu_aware_tune.onnx_prepare.attention import ATTENTION
from gpu_aware_tune.onnx_prepare.blocked_quant import BLOCKED
from gpu_aware_tune.onnx_prepare.columns import COLUMNS
from gpu_aware_tune.onnx_prepare.contrib import CONTRIB
from gpu_aware_tune.onnx_prepare.contrib_norms import CONTRIB_NORMS
from gpu_aware_tune.onnx_prepare.determinants import det
from gpu_aware_tune.onnx_prepare.dynamic_quant import DYNAMIC
from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.half import IN_FLOAT32, in_float32, in_float32_or
from gpu_aware_tune.onnx_prepare.integers import (
    axes_in_a_list,
    matmul_integer,
    modulo,
    power,
    reduce_booleans,
    reduce_in_float64,
    reduce_mean,
    sign,
)
from gpu_aware_tune.onnx_prepare.loops import LOOPS
from gpu_aware_tune.onnx_prepare.norms import (
    group_normalization,
    lp_normalization,
    training_batch_norm,
)
from gpu_aware_tune.onnx_prepare.padding import explicit_padding, lp_pool
from gpu_aware_tune.onnx_prepare.pools import max_pool, max_unpool, top_k
from gpu_aware_tune.onnx_prepare.quantized import QUANTIZED
from gpu_aware_tune.onnx_prepare.recurrent import RECURRENT
from gpu_aware_tune.onnx_prepare.refuse import dropout_trains
from gpu_aware_tune.onnx_prepare.resize import resize
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule
from gpu_aware_tune.onnx_prepare.sequences import SEQUENCES
from gpu_aware_tune.onnx_prepare.signal import SIGNAL
from gpu_aware_tune.onnx_prepare.transposed import conv_transpose

STRICT = "/strict"  # ends the name of a NonMaxSuppression whose threshold has been moved


def _concat(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Leave out what is empty: features that no rotation reaches, a past of no tokens."""
    kept = [name for name in node.input if 0 not in (to.shape(name) or ())]
    if not kept or len(kept) == len(node.input):
        return None
    return [to.op("Concat", *kept, **attributes(node)) if kept[1:] else kept[0]]


def _dropout(node: NodeProto, to: Rewriter) -> list[str] | None:
    if dropout_trains(node, to.facts):
        return None
    shape = to.shape(node.input[0])
    if len(node.output) > 1 and shape is None:
        return None
    kept = to.op("Identity", node.input[0])
    if len(node.output) == 1:
        return [kept]
    true = to.constant(True, np.bool_)
    return [kept, to.op("Expand", true, to.constant(list(shape or ())))]


def _equal(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Ask "is the maximum -inf" as "are all -inf": TVM's maximum is at least the least number."""
    limit = to.facts.constant(node.input[1])
    producer = to.producers.get(node.input[0])
    if limit is None or producer is None or producer.op_type != "ReduceMax":
        return None
    if not np.issubdtype(limit.dtype, np.floating) or not np.all(np.isneginf(limit)):
        return None
    lowest = to.op("Cast", to.op("Equal", producer.input[0], node.input[1]), to=TensorProto.FLOAT)
    every = to.op("ReduceMin", lowest, *producer.input[1:], **attributes(producer))
    return [to.op("Cast", every, to=TensorProto.BOOL)]


def _is_inf(node: NodeProto, to: Rewriter) -> list[str] | None:
    values = attributes(node)
    positive, negative = values.get("detect_positive", 1), values.get("detect_negative", 1)
    dtype = to.dtype(node.input[0])
    if (positive and negative) or dtype is None:
        return None
    if not positive and not negative:
        return [to.op("Less", node.input[0], to.constant(-np.inf, dtype))]  # never
    return [to.op("Equal", node.input[0], to.constant(np.inf if positive else -np.inf, dtype))]


def _one_hot(node: NodeProto, to: Rewriter) -> list[str] | None:
    depth = to.facts.constant(node.input[1])
    shape, dtype = to.shape(node.input[0]), to.dtype(node.input[0])
    if depth is None or shape is None or dtype is None:
        return None
    count = int(np.asarray(depth).reshape(()))
    axis = int(attributes(node).get("axis", -1)) % (len(shape) + 1)
    indices = to.op("Cast", node.input[0], to=TensorProto.INT64)
    low = to.op("Less", indices, to.constant(0))
    indices = to.op("Where", low, to.op("Add", indices, to.constant(count)), indices)
    indices = to.op("Unsqueeze", indices, to.constant([axis]))
    classes = np.arange(count).reshape([-1] + [1] * (len(shape) - axis))
    hit = to.op("Equal", indices, to.constant(classes))
    off = to.op("Gather", node.input[2], to.constant(0))
    on = to.op("Gather", node.input[2], to.constant(1))
    return [to.op("Where", hit, on, off)]


def _roi_align(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Say of coordinates what older operator sets left unsaid: half pixels came with set 16."""
    values, name = attributes(node), "coordinate_transformation_mode"
    if name in values:
        return None
    mode = "half_pixel" if to.facts.opset >= 16 else "output_half_pixel"
    return to.same(node, list(node.input), {**values, name: mode})


def _split(node: NodeProto, to: Rewriter) -> list[str] | None:
    sizes = to.facts.constant(input_of(node, 1))
    if sizes is None or np.all(sizes > 0):
        return None
    axis = to.constant([attributes(node).get("axis", 0)])
    ends = np.cumsum(sizes)
    return [
        to.op("Slice", node.input[0], to.constant([end - size]), to.constant([end]), axis)
        for size, end in zip(sizes, ends, strict=True)
    ]


def _non_max_suppression(node: NodeProto, to: Rewriter) -> list[str] | None:
    """State the defaults, which TVM has otherwise, and the threshold as TVM compares with it."""
    if node.name.endswith(STRICT):
        return None
    overlap = to.facts.constant(input_of(node, 3)) if input_of(node, 3) else np.zeros(1)
    if overlap is None:
        return None
    # ONNX drops what overlaps more than the threshold, TVM what overlaps as much or more.
    above = np.nextafter(np.asarray(overlap, np.float32), np.float32(np.inf)).reshape(-1)
    lowest = float(np.finfo(np.float32).min)  # without a threshold every score counts
    limits = [
        input_of(node, 2) or to.constant([0]),
        to.constant(above, np.float32),
        input_of(node, 4) or to.constant([lowest], np.float32),
    ]
    name = (node.name or node.output[0]) + STRICT
    return [to.op(node.op_type, *node.input[:2], *limits, name=name, **attributes(node))]


def _qlinear_matmul(node: NodeProto, to: Rewriter) -> list[str] | None:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = node.input
    if any(to.shape(scale) not in ((), (1,)) for scale in (a_scale, b_scale, y_scale)):
        return None  # a scale per row or column needs an axis that depends on the ranks
    product = to.op(
        "MatMul", _dequantized(to, a, a_scale, a_zero), _dequantized(to, b, b_scale, b_zero)
    )
    return [to.op("QuantizeLinear", product, _scalar(to, y_scale), _scalar(to, y_zero))]


def _qlinear_conv(node: NodeProto, to: Rewriter) -> list[str] | None:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = node.input[:8]
    rank = len(to.shape(w) or ())
    per_channel = to.shape(w_scale) not in ((), (1,))
    if not rank:
        return None
    data = _dequantized(to, x, x_scale, x_zero)
    if per_channel:
        kernel = to.op("DequantizeLinear", w, w_scale, w_zero, axis=0)
    else:
        kernel = _dequantized(to, w, w_scale, w_zero)
    inputs = [data, kernel]
    if input_of(node, 8):
        scale = to.op("Mul", x_scale, w_scale)
        inputs.append(to.op("Mul", to.op("Cast", node.input[8], to=TensorProto.FLOAT), scale))
    result = to.op("Conv", *inputs, **attributes(node))
    return [to.op("QuantizeLinear", result, _scalar(to, y_scale), _scalar(to, y_zero))]


def _dequantized(to: Rewriter, value: str, scale: str, zero: str) -> str:
    return to.op("DequantizeLinear", value, _scalar(to, scale), _scalar(to, zero))


def _scalar(to: Rewriter, value: str) -> str:
    return to.op("Reshape", value, to.constant([], np.int64)) if to.shape(value) == (1,) else value


def _thresholded_relu(node: NodeProto, to: Rewriter) -> list[str] | None:
    """TVM multiplies by 0 what is below the threshold, which is NaN for infinities."""
    dtype = to.dtype(node.input[0])
    if dtype is None:
        return None
    threshold = to.constant(attributes(node).get("alpha", 1.0), dtype)
    above = to.op("Greater", node.input[0], threshold)
    return [to.op("Where", above, node.input[0], to.constant(0, dtype))]


SPECIAL: dict[str, Rule] = {
    **dict.fromkeys(("AveragePool", "Conv"), explicit_padding),
    **dict.fromkeys(("ReduceL2", "ReduceLogSum", "ReduceLogSumExp"), reduce_in_float64),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), reduce_booleans),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), axes_in_a_list),
    **ATTENTION,
    **BLOCKED,
    **COLUMNS,
    **CONTRIB,
    **CONTRIB_NORMS,
    **DYNAMIC,
    **LOOPS,
    **QUANTIZED,
    **RECURRENT,
    **SEQUENCES,
    **SIGNAL,
    "BatchNormalization": training_batch_norm,
    "Concat": _concat,
    "ConvTranspose": conv_transpose,
    "Det": det,
    "Dropout": _dropout,
    "Equal": _equal,
    "GroupNormalization": group_normalization,
    "IsInf": _is_inf,
    "LpNormalization": lp_normalization,
    "LpPool": lp_pool,
    "MaxPool": max_pool,
    "MatMulInteger": matmul_integer,
    "MaxUnpool": max_unpool,
    "Mod": modulo,
    "NonMaxSuppression": _non_max_suppression,
    "OneHot": _one_hot,
    "Pow": power,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "ReduceMean": reduce_mean,
    "Resize": resize,
    "RoiAlign": _roi_align,
    "Sign": sign,
    "Split": _split,
    "ThresholdedRelu": _thresholded_relu,
    "TopK": top_k,
}
RULES: dict[str, Rule] = {
    **dict.fromkeys(IN_FLOAT32, in_float32),
    **{name: in_float32_or(rule) if name in IN_FLOAT32 else rule for name, rule in SPECIAL.items()},
}
