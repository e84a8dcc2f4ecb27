"""Rules for the layer normalisations that ONNX Runtime writes.

Also under ONNX's own domain: SimplifiedLayerNormalization, and LayerNormalization before set 17.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.half import is_half
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule


def _normalised(
    to: Rewriter, x: str, axis: int, epsilon: float, is_centred: bool
) -> tuple[str, str, str] | None:
    """Emit x normalised over the axes from `axis` on, in float32 where x is half precision.

    Returns:
        The normalised value, the mean ("" unless it is centred), and the reciprocal of the
        deviation; None where the rank has to be known and is not.
    """
    shape = to.shape(x)
    if axis == -1:
        axes = [-1]
    elif shape is None:
        return None
    else:
        axes = list(range(axis % len(shape), len(shape)))
    dtype = np.float64 if to.dtype(x) == np.float64 else np.float32
    mean = to.reduce("ReduceMean", x, axes) if is_centred else ""
    centred = to.op("Sub", x, mean) if mean else x
    variance = to.reduce("ReduceMean", to.op("Mul", centred, centred), axes)
    deviation = to.op("Sqrt", to.op("Add", variance, to.constant(epsilon, dtype)))
    inverse = to.op("Reciprocal", deviation)
    return to.op("Mul", centred, inverse), mean, inverse


def _affine(to: Rewriter, value: str, x: str, scale: str, bias: str) -> str:
    """Scale and shift, in float32 where x is half precision, and return to the type of x."""
    half = is_half(to.dtype(x))
    if scale:
        value = to.op("Mul", value, to.cast(scale, np.float32) if half else scale)
    if bias:
        value = to.op("Add", value, to.cast(bias, np.float32) if half else bias)
    return to.cast(value, to.dtype(x)) if half else value


def _layer_norm(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: LayerNormalization where the standard does not define it yet."""
    if to.opset >= 17 and not node.domain:
        return None
    return _layer_norm_of(node, to, is_centred=True)


def _simplified_layer_norm(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: divide by the root of the mean square, without taking the mean away."""
    return _layer_norm_of(node, to, is_centred=False)


def _layer_norm_of(node: NodeProto, to: Rewriter, is_centred: bool) -> list[str] | None:
    x, values = node.input[0], attributes(node)
    wide = to.cast(x, np.float32) if is_half(to.dtype(x)) else x
    if to.shape(x) is not None and wide != x:
        to.facts.shapes[wide] = to.facts.shapes[x]
    axis = values.get("axis", -1)
    made = _normalised(to, wide, axis, values.get("epsilon", 1e-5), is_centred)
    if made is None:
        return None
    normal, mean, inverse = made
    result = _affine(to, normal, x, input_of(node, 1), input_of(node, 2) if is_centred else "")
    return [result, mean, inverse] if is_centred else [result, inverse]


def _skip_layer_norm(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: the norm of input + skip + bias; inputs input, skip, gamma, beta, bias."""
    return _skip_norm_of(node, to, input_of(node, 3), input_of(node, 4), is_centred=True)


def _skip_simplified(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: the same without mean and beta; inputs input, skip, gamma, bias."""
    return _skip_norm_of(node, to, "", input_of(node, 3), is_centred=False)


def _skip_norm_of(
    node: NodeProto, to: Rewriter, beta: str, bias: str, is_centred: bool
) -> list[str] | None:
    x, skip, gamma = node.input[:3]
    half = is_half(to.dtype(x))
    total, *addends = (
        to.cast(name, np.float32) if half else name for name in (x, skip, bias) if name
    )
    for addend in addends:
        total = to.op("Add", total, addend)
    epsilon = attributes(node).get("epsilon", 1e-12)
    made = _normalised(to, total, -1, epsilon, is_centred)
    if made is None:
        return None
    normal, mean, inverse = made
    result = _affine(to, normal, x, gamma, beta)
    return [result, mean, inverse, to.cast(total, to.dtype(x)) if half else total]


CONTRIB_NORMS: dict[str, Rule] = {
    "LayerNormalization": _layer_norm,
    "SimplifiedLayerNormalization": _simplified_layer_norm,
    "com.microsoft.LayerNormalization": _layer_norm,
    "com.microsoft.SimplifiedLayerNormalization": _simplified_layer_norm,
    "com.microsoft.SkipLayerNormalization": _skip_layer_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_simplified,
}
"""Rules by operator name, see `rewriter.operator_name`."""
