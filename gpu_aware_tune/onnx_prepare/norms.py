"""Rules for normalisations that TVM lacks or computes inaccurately."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter


def training_batch_norm(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: normalise by the mean and variance of the batch, as training_mode asks for."""
    values = attributes(node)
    shape, dtype = to.shape(node.input[0]), to.dtype(node.input[0])
    if not values.get("training_mode", 0) or shape is None or dtype is None:
        return None
    x, scale, bias, old_mean, old_var = node.input[:5]
    axes = [axis for axis in range(len(shape)) if axis != 1]
    channels = to.constant([1, -1] + [1] * (len(shape) - 2))
    mean = to.reduce("ReduceMean", x, axes)
    centred = to.op("Sub", x, mean)
    var = to.reduce("ReduceMean", to.op("Mul", centred, centred), axes)
    epsilon = to.constant(values.get("epsilon", 1e-5), dtype)
    y = to.op("Div", centred, to.op("Sqrt", to.op("Add", var, epsilon)))
    y = to.op("Mul", y, to.op("CastLike", to.op("Reshape", scale, channels), x))
    y = to.op("Add", y, to.op("CastLike", to.op("Reshape", bias, channels), x))
    momentum = values.get("momentum", 0.9)
    outputs = [y]
    for old, new in ((old_mean, mean), (old_var, var)):
        new = to.op("CastLike", to.op("Reshape", new, to.constant([-1])), old)
        kept = to.op("Mul", old, to.op("CastLike", to.constant(momentum, np.float32), old))
        fresh = to.op("CastLike", to.constant(1.0 - momentum, np.float32), old)
        outputs.append(to.op("Add", kept, to.op("Mul", new, fresh)))
    return outputs


def lp_normalization(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: divide by the norm, where that is not zero."""
    values = attributes(node)
    dtype = to.dtype(node.input[0])
    if dtype is None:
        return None
    kind = "ReduceL1" if values.get("p", 2) == 1 else "ReduceL2"
    norm = to.reduce(kind, node.input[0], [values.get("axis", -1)])
    zero = to.constant(0, dtype)
    empty = to.op("Equal", norm, zero)
    safe = to.op("Where", empty, to.constant(1, dtype), norm)
    return [to.op("Div", node.input[0], safe)]


def group_normalization(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: normalise each group as one channel.

    TVM takes the variance as the difference of two means, which is NaN for large means.
    """
    values = attributes(node)
    x, scale, bias = node.input
    shape, dtype = to.shape(x), to.dtype(x)
    if shape is None or dtype is None:
        return None
    groups = values["num_groups"]
    unit = to.constant(np.ones(groups), dtype), to.constant(np.zeros(groups), dtype)
    grouped = to.op("Reshape", x, to.constant([shape[0], groups, -1]))
    normal = to.op("InstanceNormalization", grouped, *unit, epsilon=values.get("epsilon", 1e-5))
    per_group = to.shape(scale) == (groups,) and to.opset < 21
    if per_group:
        along = to.constant([1, groups, 1])
    else:
        normal = to.op("Reshape", normal, to.constant(shape))
        along = to.constant([1, shape[1]] + [1] * (len(shape) - 2))
    scale, bias = to.op("Reshape", scale, along), to.op("Reshape", bias, along)
    result = to.op("Add", to.op("Mul", normal, scale), bias)
    return [to.op("Reshape", result, to.constant(shape)) if per_group else result]
