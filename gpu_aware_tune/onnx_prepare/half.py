"""Computes in float32 what half precision cannot hold: sums, norms, and functions of large values.

ONNX Runtime and cuDNN do the same for float16 and bfloat16. The conversions around an operator cost
little, because TVM fuses them into it. Matrix products and convolutions, into which nothing can be
fused from above, get float32 accumulators where they are imported.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule

SUMS = """
AveragePool BatchNormalization CumProd CumSum Einsum GlobalAveragePool GlobalLpPool GridSample
GroupNormalization InstanceNormalization LayerNormalization LogSoftmax LpNormalization LpPool LRN
Mean MeanVarianceNormalization RMSNormalization ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
ReduceMean ReduceProd ReduceSum ReduceSumSquare RoiAlign Softmax Sum
"""
# TVM has no half-precision form of some, and loses most digits of others.
FUNCTIONS = """
Acos Acosh Asin Asinh Atan Atanh Cosh Elu Erf Gelu Hardmax Mish Mod Pow PRelu Selu Sigmoid Sinh
Softplus Swish Tan Tanh ThresholdedRelu
"""


IN_FLOAT32 = frozenset((SUMS + FUNCTIONS).split())
PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}  # see `model.operators`


def is_half(dtype: object) -> bool:
    """Tell whether a NumPy type is float16 or bfloat16, which NumPy itself does not know."""
    return getattr(dtype, "name", "") in ("float16", "bfloat16")


def in_float32(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: compute a half-precision operator in float32."""
    types = [to.dtype(name) if name else None for name in node.input]
    if not any(map(is_half, types)):
        return None
    inputs = [
        to.cast(name, np.float32) if is_half(dtype) else name
        for name, dtype in zip(node.input, types, strict=True)
    ]
    made = to.same(node, inputs, attributes(node))
    return [
        to.cast(name, dtype) if name and is_half(dtype := to.dtype(wanted)) else name
        for name, wanted in zip(made, node.output, strict=True)
    ]


def in_float32_or(rule: Rule) -> Rule:
    """Return a rule that does this one's work for a half-precision node in float32."""
    return lambda node, to: in_float32(node, to) or rule(node, to)
