"""Replaces a Resize that TVM gets wrong: resizing is linear, one small matrix per axis does it.

TVM takes its scale from the shapes alone, knows neither anti-aliasing nor `axes` nor the aspect
ratio policies, and resizes spatial axes only. A matrix with few entries per column is applied as
that many weighted Gathers, which fuse with their neighbours; only anti-aliasing needs more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import Facts, attributes, input_of
from gpu_aware_tune.onnx_prepare.interpolation import Axis, Mode, resize_matrix
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter

TVM_COORDINATES = {"half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"}
GATHERED_TAPS = 4  # as many as a cubic filter has
Plan = dict[int, Axis]


def resize(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: replace a Resize by Gathers or a MatMul per resized axis, where TVM needs that."""
    plan = resize_plan(node, to.facts)
    if plan is not None and all(piece.size == piece.extent for piece in plan.values()):
        return [node.input[0]]  # as in ONNX Runtime, whatever the scales say
    if not resize_is_wrong(node, to.facts):
        return _without_empty_inputs(node, to)
    dtype, shape = to.dtype(node.input[0]), to.shape(node.input[0])
    mode = Mode.of(attributes(node))
    if plan is None or dtype is None or shape is None:
        return None
    inner = dtype if mode.kind == "nearest" or dtype == np.float64 else np.float32
    result = node.input[0] if inner == dtype else to.cast(node.input[0], inner)
    for axis, piece in plan.items():
        found = resize_matrix(piece, mode)
        if found is None:
            return None
        matrix, offset = found
        if matrix.shape[0] != matrix.shape[1] or not np.array_equal(matrix, np.eye(len(matrix))):
            result = _apply(to, result, matrix, axis, len(shape), inner)
        if np.any(offset):
            along = [-1] + [1] * (len(shape) - 1 - axis)
            result = to.op("Add", result, to.constant(offset.reshape(along), inner))
    if np.issubdtype(dtype, np.integer) and inner != dtype:
        # Cut off, like ONNX Runtime, but not where only rounding errors keep it below a whole.
        result = to.op("Mul", result, to.constant(1 + 1e-6, inner))
    return [result if inner == dtype else to.cast(result, dtype)]


def resize_is_wrong(node: NodeProto, facts: Facts) -> str:
    """Say why TVM would get this Resize wrong; empty where it would not."""
    values = attributes(node)
    plan = resize_plan(node, facts)
    if plan is None:
        return "its scales or sizes are not constant; make them constant in the export"
    mode = Mode.of(values)
    if "axes" in values or mode.antialias:
        return "axes and antialias are not supported"
    if values.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        return "only the aspect ratio policy 'stretch' is supported"
    if mode.coordinates not in TVM_COORDINATES:
        return f"coordinates {mode.coordinates!r} are not supported"
    rank = len(facts.shapes[node.input[0]])
    if rank not in (3, 4, 5):
        return f"only 1 to 3 spatial axes are supported, not rank {rank}"
    for axis, piece in plan.items():
        if axis < 2 and piece.size != piece.extent:
            return "only spatial axes can be resized"
        if piece.scale * piece.extent != piece.size:
            return f"scale {piece.scale:.4g} of {piece.extent} does not give a whole number"
        if piece.size == 1 < piece.extent and mode.coordinates != "asymmetric":
            return "a single value is not supported"
    return ""


def _without_empty_inputs(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Leave out inputs without elements, which count as absent; TVM takes them for given."""
    kept = [name if to.shape(name) != (0,) else "" for name in node.input]
    while not kept[-1]:
        del kept[-1]
    if kept == list(node.input):
        return None
    return [to.op("Resize", *kept, **attributes(node))]


def resize_plan(node: NodeProto, facts: Facts) -> Plan | None:
    """Return what happens to each axis, None where that is not known."""
    values = attributes(node)
    shape = facts.shapes.get(node.input[0])
    region, scales, sizes = (_present(input_of(node, index), facts) for index in (1, 2, 3))
    counts = scales if scales is not None else sizes
    if shape is None or counts is None or (scales is not None and sizes is not None):
        return None
    axes = [int(axis) % len(shape) for axis in values.get("axes", range(len(shape)))]
    edges = [(0.0, 1.0)] * len(axes)
    if values.get("coordinate_transformation_mode", b"") == b"tf_crop_and_resize":
        if region is None or region.size != 2 * len(axes):
            return None
        edges = list(zip(*region.reshape(2, -1).tolist(), strict=True))
    if len(axes) != counts.size:
        return None
    extents = [np.float32(shape[axis]) for axis in axes]
    if scales is not None:
        factors = [np.float32(scale) for scale in scales]
        targets = [int(extent * f) for extent, f in zip(extents, factors, strict=True)]
    else:
        targets = [int(size) for size in counts]
        factors = [np.float32(t) / extent for t, extent in zip(targets, extents, strict=True)]
        policy = values.get("keep_aspect_ratio_policy", b"stretch")
        if policy != b"stretch":
            factors = [min(factors) if policy == b"not_larger" else max(factors)] * len(axes)
            halves = (extent * factors[0] + np.float32(0.5) for extent in extents)
            targets = [int(half) for half in halves]
    found = zip(axes, extents, factors, targets, edges, strict=True)
    return {a: Axis(int(e), float(f), t, edge) for a, e, f, t, edge in found}


def _present(name: str, facts: Facts) -> np.ndarray | None:
    """Return an input's value; one without a name or without elements counts as absent."""
    return None if not name or facts.shapes.get(name) == (0,) else facts.constant(name)


def _apply(to: Rewriter, value: str, matrix: np.ndarray, axis: int, rank: int, dtype: Any) -> str:
    """Emit `value` times a matrix (extent, size) along one axis."""
    taps = int((matrix != 0).sum(axis=0).max())
    if taps > GATHERED_TAPS:
        return _multiplied(to, value, matrix, axis, rank, dtype)
    order = np.argsort(matrix == 0, axis=0, kind="stable")[: max(taps, 1)]
    terms = []
    for indices in order:
        weights = matrix[indices, np.arange(matrix.shape[1])]
        term = to.op("Gather", value, to.constant(indices), axis=axis)
        if not np.all(weights == 1):
            along = [-1] + [1] * (rank - 1 - axis)
            term = to.op("Mul", term, to.constant(weights.reshape(along), dtype))
        terms.append(term)
    total = terms[0]
    for term in terms[1:]:
        total = to.op("Add", total, term)
    return total


def _multiplied(
    to: Rewriter, value: str, matrix: np.ndarray, axis: int, rank: int, dtype: Any
) -> str:
    if axis == rank - 1:
        return to.op("MatMul", value, to.constant(matrix, dtype))
    if axis == rank - 2:
        return to.op("MatMul", to.constant(matrix.T, dtype), value)
    order = [*(a for a in range(rank) if a != axis), axis]
    last = to.op("Transpose", value, perm=order)
    product = to.op("MatMul", last, to.constant(matrix, dtype))
    return to.op("Transpose", product, perm=[order.index(a) for a in range(rank)])
