"""Rules for Fourier transforms: products with constant matrices, since a length is static here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule

MATRIX_ELEMENTS = 1 << 24  # of a transform's matrix: 4096 terms; longer ones would need a real FFT


def dft(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: DFT along one axis of (batch, ..., 1 or 2), real or complex in the last dimension."""
    values = attributes(node)
    shape, dtype = to.shape(node.input[0]), to.dtype(node.input[0])
    length, axis = _length(node, to), _axis(node, to, values)
    if shape is None or dtype is None or length is None or axis is None or shape[-1] not in (1, 2):
        return None
    axis %= len(shape)
    inverse, onesided = bool(values.get("inverse", 0)), bool(values.get("onesided", 0))
    halved = inverse and onesided  # from the first half of the spectrum to real numbers
    terms = length or (2 * (shape[axis] - 1) if halved else shape[axis])
    if axis == len(shape) - 1 or terms * terms > MATRIX_ELEMENTS or (halved and shape[-1] != 2):
        return None
    taken = terms // 2 + 1 if halved else terms
    data = _resized(node.input[0], axis, shape[axis], taken, shape, dtype, to)
    last = len(shape) - 2  # without the dimension of real and imaginary parts
    order = [*(at for at in range(last + 1) if at != axis), axis]
    parts = []
    for part in range(shape[-1]):
        plane = to.op("Gather", data, to.constant(part), axis=-1)
        parts.append(to.op("Transpose", plane, perm=order) if axis != last else plane)
    if halved:
        made = [_real(parts, terms, dtype, to)]
    else:
        made = _transformed(parts, terms, inverse, onesided, dtype, to)
    if axis != last:
        back = [order.index(at) for at in range(last + 1)]
        made = [to.op("Transpose", plane, perm=back) for plane in made]
    return [to.stack(made, -1)]


def stft(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: STFT of (batch, samples, 1 or 2): frames are gathered, weighted and transformed."""
    values = attributes(node)
    shape, dtype = to.shape(node.input[0]), to.dtype(node.input[0])
    step = to.facts.constant(node.input[1])
    if shape is None or dtype is None or step is None or shape[-1] not in (1, 2):
        return None
    window, given = input_of(node, 2), input_of(node, 3)
    length = to.facts.constant(given) if given else None
    window_shape = to.shape(window) if window else None
    if length is not None:
        terms = int(length.reshape(()))
    elif window_shape is not None:
        terms = window_shape[0]
    else:
        return None
    hop = int(step.reshape(()))
    onesided = bool(values.get("onesided", 1))
    if terms * terms > MATRIX_ELEMENTS or hop < 1 or terms > shape[1]:
        return None
    count = 1 + (shape[1] - terms) // hop
    places = np.arange(count)[:, None] * hop + np.arange(terms)
    parts = []
    for part in range(shape[-1]):
        samples = to.op("Gather", node.input[0], to.constant(part), axis=-1)
        frames = to.op("Gather", samples, to.constant(places), axis=1)
        parts.append(to.op("Mul", frames, window) if window else frames)
    return [to.stack(_transformed(parts, terms, False, onesided, dtype, to), -1)]


def _length(node: NodeProto, to: Rewriter) -> int | None:
    """The transform's length, 0 for that of the data, None where it is not constant."""
    if not input_of(node, 1):
        return 0
    value = to.facts.constant(node.input[1])
    return None if value is None else int(value.reshape(()))


def _axis(node: NodeProto, to: Rewriter, values: dict[str, Any]) -> int | None:
    """An attribute before operator set 20, an input from then on."""
    if to.facts.opset < 20:
        return int(values.get("axis", 1))
    if not input_of(node, 2):
        return -2
    value = to.facts.constant(node.input[2])
    return None if value is None else int(value.reshape(()))


def _resized(
    data: str,
    axis: int,
    extent: int,
    terms: int,
    shape: Sequence[int],
    dtype: Any,
    to: Rewriter,
) -> str:
    """The data with as many terms along an axis as the transform has: cut, or zeros added."""
    if terms == extent:
        return data
    if terms < extent:
        return to.op("Slice", data, to.constant([0]), to.constant([terms]), to.constant([axis]))
    pads = np.zeros(2 * len(shape), np.int64)
    pads[len(shape) + axis] = terms - extent
    return to.op("Pad", data, to.constant(pads), to.constant(0, dtype))


def _transformed(
    parts: Sequence[str], terms: int, inverse: bool, onesided: bool, dtype: Any, to: Rewriter
) -> list[str]:
    """Real and imaginary part of the transform along the last axis."""
    bins = terms // 2 + 1 if onesided else terms
    turns = np.outer(np.arange(terms), np.arange(bins)) % terms  # exact before it is a fraction
    angles = 2 * np.pi * turns / terms * (1 if inverse else -1)
    scale = 1 / terms if inverse else 1.0
    cosine, sine = (to.constant(f(angles) * scale, dtype) for f in (np.cos, np.sin))
    real, imaginary = to.op("MatMul", parts[0], cosine), to.op("MatMul", parts[0], sine)
    if len(parts) > 1:
        real = to.op("Sub", real, to.op("MatMul", parts[1], sine))
        imaginary = to.op("Add", imaginary, to.op("MatMul", parts[1], cosine))
    return [real, imaginary]


def _real(parts: Sequence[str], terms: int, dtype: Any, to: Rewriter) -> str:
    """Real numbers from the first half of their spectrum, along the last axis."""
    bins = np.arange(terms // 2 + 1)
    angles = 2 * np.pi * (np.outer(bins, np.arange(terms)) % terms) / terms
    twice = np.where((bins == 0) | (2 * bins == terms), 1.0, 2.0)[:, None]  # for its mirror image
    cosine, sine = (to.constant(twice * f(angles) / terms, dtype) for f in (np.cos, np.sin))
    return to.op("Sub", to.op("MatMul", parts[0], cosine), to.op("MatMul", parts[1], sine))


SIGNAL: dict[str, Rule] = {"DFT": dft, "STFT": stft}
