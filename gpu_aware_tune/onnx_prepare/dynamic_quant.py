"""Rules for products whose activations are quantised while the model runs, as integer products.

Inputs and attributes are those of ONNX Runtime's `docs/ContribOperators.md`.
"""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from gpu_aware_tune.onnx_prepare.facts import input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule


def dynamic_product(to: Rewriter, x: str, weight: str, scale: str, zero: str = "") -> str:
    """Emit x times an integer matrix, x quantised to 8 bits by its own range.

    Args:
        to: where to.
        x: floats (..., K).
        weight: 8-bit integers (K, N).
        scale, zero: of the weight, one or N each; "" for no zero point.
    """
    quantised = to.op("DynamicQuantizeLinear", x, outputs=3)
    operands = [quantised, weight, f"{quantised}.2", *([zero] if zero else [])]
    return _scaled(to, operands, f"{quantised}.1", scale)


def _scaled(to: Rewriter, operands: list[str], first_scale: str, second_scale: str) -> str:
    product = to.op("Cast", to.op("MatMulInteger", *operands), to=TensorProto.FLOAT)
    return to.op("Mul", product, to.op("Mul", first_scale, second_scale))


def _dynamic_quantize_matmul(node: NodeProto, to: Rewriter) -> list[str] | None:
    x, weight, scale = node.input[:3]
    result = dynamic_product(to, x, weight, scale, input_of(node, 3))
    bias = input_of(node, 4)
    return [to.op("Add", result, bias) if bias else result]


def _matmul_integer_to_float(node: NodeProto, to: Rewriter) -> list[str] | None:
    a, b, a_scale, b_scale = node.input[:4]
    zeros = [input_of(node, place) for place in (4, 5)]
    while zeros and not zeros[-1]:
        zeros.pop()
    result = _scaled(to, [a, b, *zeros], a_scale, b_scale)
    bias = input_of(node, 6)
    return [to.op("Add", result, bias) if bias else result]


DYNAMIC: dict[str, Rule] = {
    "com.microsoft.DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "com.microsoft.MatMulIntegerToFloat": _matmul_integer_to_float,
}
"""Rules by operator name, see `rewriter.operator_name`."""
