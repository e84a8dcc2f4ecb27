"""Rotary position embeddings: pairs of features are rotated by angles that grow with the place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.activations import like
from gpu_aware_tune.onnx_prepare.facts import attributes
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter


def rotated(
    to: Rewriter,
    value: str,
    caches: Sequence[str],
    places: str,
    size: int,
    width: int,
    interleaved: bool,
) -> str:
    """Emit the rotation of (B, N, S, D) values.

    Args:
        to: where to.
        value: what is rotated.
        caches: cosines and sines, each (longest sequence, width / 2).
        places: (1 or B, S) rows of the caches.
        size: D.
        width: of the features that are rotated; the others stay.
        interleaved: whether features 2i and 2i + 1 are a pair, rather than i and i + width / 2.
    """
    cos, sin = (
        to.op("Unsqueeze", to.op("Gather", cache, places), to.constant([1])) for cache in caches
    )
    half = width // 2
    if interleaved:
        first, second = (_strided(to, value, start, width, 2) for start in (0, 1))
    else:
        first, second = _strided(to, value, 0, half, 1), _strided(to, value, half, width, 1)
    rotated_first = to.op("Sub", to.op("Mul", first, cos), to.op("Mul", second, sin))
    rotated_second = to.op("Add", to.op("Mul", first, sin), to.op("Mul", second, cos))
    if interleaved:
        pair = [
            to.op("Unsqueeze", part, to.constant([-1])) for part in (rotated_first, rotated_second)
        ]
        result = to.op("Concat", *pair, axis=-1)
        result = to.op("Reshape", result, to.constant([0, 0, 0, width]))
    else:
        result = to.op("Concat", rotated_first, rotated_second, axis=-1)
    if width == size:
        return result
    return to.op("Concat", result, _strided(to, value, width, size, 1), axis=-1)


def _strided(to: Rewriter, value: str, start: int, end: int, step: int) -> str:
    bounds = (to.constant([number]) for number in (start, end, -1, step))
    return to.op("Slice", value, *bounds)


def rotary_embedding(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: RotaryEmbedding of com.microsoft: inputs x, places, cosines, sines.

    x is (B, S, N D) or (B, N, S, D); one place alone is that of the first of the sequence.
    """
    values = attributes(node)
    x, places, *caches = node.input[:4]
    shape, cache = to.shape(x), to.shape(caches[0])
    if shape is None or cache is None or to.shape(places) is None:
        return None
    width, heads = 2 * cache[1], values.get("num_heads", 0)
    if len(shape) == 3:
        batch, length = shape[:2]
        size = shape[2] // heads if heads else width
        split = to.op("Reshape", x, to.constant([batch, length, -1, size]))
        value = to.op("Transpose", split, perm=[0, 2, 1, 3])
    else:
        batch, _, length, size = shape
        value = x
    if to.shape(places) == (1,):
        places = to.op("Add", places, to.constant(np.arange(length).reshape(1, -1)))
    interleaved = bool(values.get("interleaved", 0))
    result = rotated(to, value, caches, places, size, width, interleaved)
    if values.get("scale", 1.0) != 1.0:
        result = to.op("Mul", result, like(to, values["scale"], x))
    if len(shape) == 3:
        result = to.op("Transpose", result, perm=[0, 2, 1, 3])
        result = to.op("Reshape", result, to.constant(shape))
    return [result]
