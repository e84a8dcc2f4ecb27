"""Activation functions that are named by an attribute, in fused and in recurrent operators."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpu_aware_tune.onnx_prepare.rewriter import Rewriter

Activation = Callable[[Rewriter, str, float, float], str]
"""Emits f(value; alpha, beta) and returns its name."""


def _plain(op_type: str) -> Activation:
    return lambda to, value, alpha, beta: to.op(op_type, value)


def _with_alpha(op_type: str) -> Activation:
    return lambda to, value, alpha, beta: to.op(op_type, value, alpha=alpha)


def _hard_sigmoid(to: Rewriter, value: str, alpha: float, beta: float) -> str:
    return to.op("HardSigmoid", value, alpha=alpha, beta=beta)


def _affine(to: Rewriter, value: str, alpha: float, beta: float) -> str:
    return to.op("Add", to.op("Mul", value, like(to, alpha, value)), like(to, beta, value))


def _scaled_tanh(to: Rewriter, value: str, alpha: float, beta: float) -> str:
    inner = to.op("Tanh", to.op("Mul", value, like(to, beta, value)))
    return to.op("Mul", inner, like(to, alpha, value))


def _clip(to: Rewriter, value: str, alpha: float, beta: float) -> str:
    return to.op("Clip", value, like(to, alpha, value), like(to, beta, value))


def like(to: Rewriter, number: float, value: str) -> str:
    """Emit a constant of a value's type, or a conversion to it where the type is not known."""
    dtype = to.dtype(value)
    if dtype is not None:
        return to.constant(number, dtype)
    return to.op("CastLike", to.constant(number, np.float32), value)


# Name in lower case -> the function, and its defaults of alpha and beta; None where it has none.
ACTIVATIONS: dict[str, tuple[Activation, float | None, float | None]] = {
    "affine": (_affine, 1.0, 0.0),
    "clip": (_clip, 0.0, 6.0),
    "elu": (_with_alpha("Elu"), 1.0, None),
    "hardsigmoid": (_hard_sigmoid, 0.2, 0.5),
    "hardswish": (_plain("HardSwish"), None, None),
    "leakyrelu": (_with_alpha("LeakyRelu"), 0.01, None),
    "relu": (_plain("Relu"), None, None),
    "scaledtanh": (_scaled_tanh, 1.0, 1.0),
    "sigmoid": (_plain("Sigmoid"), None, None),
    "softplus": (_plain("Softplus"), None, None),
    "softsign": (_plain("Softsign"), None, None),
    "tanh": (_plain("Tanh"), None, None),
    "thresholdedrelu": (_with_alpha("ThresholdedRelu"), 1.0, None),
}


def activate(
    to: Rewriter, name: str, value: str, alpha: float | None = None, beta: float | None = None
) -> str | None:
    """Emit an activation by its name; None where there is none of that name."""
    found = ACTIVATIONS.get(name.lower())
    if found is None:
        return None
    function, default_alpha, default_beta = found
    alpha = (default_alpha or 0.0) if alpha is None else alpha
    beta = (default_beta or 0.0) if beta is None else beta
    return function(to, value, alpha, beta)
