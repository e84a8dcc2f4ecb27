"""Rules for the activations and fused products of com.microsoft, which ONNX Runtime writes.

Inputs and attributes are those of ONNX Runtime's `docs/ContribOperators.md`.
"""

from __future__ import annotations

import math
from typing import Any

from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.activations import activate, like
from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.half import in_float32_or
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule


def _gelu(to: Rewriter, x: str) -> str:
    """x / 2 (1 + erf(x / sqrt 2)): the operator Gelu exists from set 20 on."""
    erf = to.op("Erf", to.op("Mul", x, like(to, math.sqrt(0.5), x)))
    return to.op("Mul", to.op("Mul", x, like(to, 0.5, x)), to.op("Add", erf, like(to, 1.0, x)))


def _gelu_rule(node: NodeProto, to: Rewriter) -> list[str] | None:
    return [_gelu(to, node.input[0])]


def _bias_gelu(node: NodeProto, to: Rewriter) -> list[str] | None:
    return [_gelu(to, to.op("Add", *node.input))]


def _fast_gelu(node: NodeProto, to: Rewriter) -> list[str] | None:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of the sum with a bias if there is one."""
    x = to.op("Add", *node.input) if input_of(node, 1) else node.input[0]
    cubic = to.op("Mul", to.op("Mul", to.op("Mul", x, x), x), like(to, 0.044715, x))
    scaled = to.op("Mul", to.op("Add", x, cubic), like(to, math.sqrt(2 / math.pi), x))
    grown = to.op("Add", to.op("Tanh", scaled), like(to, 1.0, x))
    return [to.op("Mul", to.op("Mul", x, like(to, 0.5, x)), grown)]


def _quick_gelu(node: NodeProto, to: Rewriter) -> list[str] | None:
    x = node.input[0]
    alpha = attributes(node).get("alpha", 1.702)
    return [to.op("Mul", x, to.op("Sigmoid", to.op("Mul", x, like(to, alpha, x))))]


def _fused_conv(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Conv, then a sum with Z if there is one, then the activation."""
    values = attributes(node)
    name = values.pop("activation", b"").decode()
    parameters = list(values.pop("activation_params", []))
    result = to.op("Conv", *node.input[:3], **values)
    if addend := input_of(node, 3):
        result = to.op("Add", result, addend)
    activated = activate(to, name, result, *parameters[:2]) if name else result
    return None if activated is None else [activated]


def _fused_gemm(node: NodeProto, to: Rewriter) -> list[str] | None:
    values = attributes(node)
    name = values.pop("activation", b"").decode()
    alpha, beta = values.pop("activation_alpha", None), values.pop("activation_beta", None)
    values.pop("activation_gamma", None)
    result = to.op("Gemm", *node.input, **values)
    activated = activate(to, name, result, alpha, beta) if name else result
    return None if activated is None else [activated]


def _fused_matmul(node: NodeProto, to: Rewriter) -> list[str] | None:
    values = attributes(node)
    operands = []
    for name, key in zip(node.input[:2], "AB", strict=True):
        order = _order(to, name, values, key)
        if order is None:
            return None
        is_sorted = order == sorted(order)
        operands.append(name if is_sorted else to.op("Transpose", name, perm=order))
    result = to.op("MatMul", *operands)
    alpha = values.get("alpha", 1.0)
    return [result if alpha == 1.0 else to.op("Mul", result, like(to, alpha, node.input[0]))]


def _order(to: Rewriter, name: str, values: dict[str, Any], key: str) -> list[int] | None:
    """The order of an operand's axes: `transBatch` makes the first axis of rows the last but one."""
    transposed, batched = values.get(f"trans{key}", 0), values.get(f"transBatch{key}", 0)
    shape = to.shape(name)
    if shape is None:
        return None if transposed or batched else []
    order = list(range(len(shape)))
    if len(order) < 2:  # a vector has nothing to transpose
        return order
    if batched:
        order = [*order[1:-1], 0, order[-1]]
    if transposed:
        order[-1], order[-2] = order[-2], order[-1]
    return order


_IN_FLOAT32: dict[str, Rule] = {
    "BiasGelu": _bias_gelu,
    "FastGelu": _fast_gelu,
    "Gelu": _gelu_rule,
    "QuickGelu": _quick_gelu,
}
CONTRIB: dict[str, Rule] = {
    **{f"com.microsoft.{name}": in_float32_or(rule) for name, rule in _IN_FLOAT32.items()},
    "com.microsoft.FusedConv": _fused_conv,
    "com.microsoft.FusedGemm": _fused_gemm,
    "com.microsoft.FusedMatMul": _fused_matmul,
    "com.microsoft.TransposeMatMul": _fused_matmul,
}
"""Rules by operator name, see `rewriter.operator_name`."""
