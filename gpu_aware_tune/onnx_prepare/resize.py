"""Replaces a Resize that TVM gets wrong: resizing is linear, so one small matrix per axis does it.

TVM takes its scale from the shapes alone, knows neither anti-aliasing nor `axes` nor the aspect
ratio policies, and resizes spatial axes only. The matrices come from ONNX's reference operator,
applied to the identity, so every mode it knows is right by construction.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto
from onnx.reference import ReferenceEvaluator

from gpu_aware_tune.onnx_prepare.facts import Facts
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter

TVM_COORDINATES = {"half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"}
FLOATS = (np.float16, np.float32, np.float64)


def resize(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: replace a Resize by one Gather or MatMul per resized axis, where TVM needs that."""
    if not resize_is_wrong(node, to.facts):
        return None
    dtype = to.dtype(node.input[0])
    plan = _plan(node, to.facts)
    if plan is None or dtype not in FLOATS:
        return None
    values = {
        a.name: onnx.helper.get_attribute_value(a)
        for a in node.attribute
        if a.name not in ("axes", "keep_aspect_ratio_policy")
    }
    result = node.input[0]
    rank = len(to.shape(result) or ())
    for axis, (extent, scale, size, region) in plan.items():
        matrix, offset = _axis_matrix(values, extent, scale, size, region)
        if matrix is None or offset is None:
            return None
        if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(extent)):
            continue
        result = _apply(to, result, matrix.astype(dtype), axis, rank)
        if np.any(offset):
            shape = [-1] + [1] * (rank - 1 - axis)
            result = to.op("Add", result, to.constant(offset.reshape(shape), dtype))
    return [to.op("Identity", result)]


def resize_is_wrong(node: NodeProto, facts: Facts) -> str:
    """Say why TVM would get this Resize wrong; empty where it would not."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    plan = _plan(node, facts)
    if plan is None:
        return "its scales or sizes are not constant"
    if "axes" in values or values.get("antialias", 0):
        return "axes and antialias are not supported"
    if values.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        return "only the aspect ratio policy 'stretch' is supported"
    coordinates = values.get("coordinate_transformation_mode", b"half_pixel").decode()
    if coordinates not in TVM_COORDINATES | {"tf_crop_and_resize"}:
        return f"coordinates {coordinates!r} are not supported"
    rank = len(facts.shapes[node.input[0]])
    if rank not in (3, 4, 5):
        return f"only 1 to 3 spatial axes are supported, not rank {rank}"
    for axis, (extent, scale, size, region) in plan.items():
        if axis < 2 and size != extent:
            return "only spatial axes can be resized"
        if axis < 2 and coordinates == "tf_crop_and_resize" and region != (0.0, 1.0):
            return "only spatial axes can be cropped"
        if not math.isclose(scale * extent, size, abs_tol=1e-6):
            return f"scale {scale:.4g} of {extent} does not give a whole number"
        if size == 1 < extent and coordinates in ("align_corners", "pytorch_half_pixel"):
            return "aligning the corners of a single value is not supported"
    return ""


Plan = dict[int, tuple[int, float, int, tuple[float, float]]]


def _plan(node: NodeProto, facts: Facts) -> Plan | None:
    """Return axis -> (extent, scale, size, region of interest), None where it is not known."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    shape = facts.shapes.get(node.input[0])
    inputs = [*node.input, "", "", ""]
    scales, sizes = facts.constant(inputs[2]), facts.constant(inputs[3])
    if shape is None or (inputs[2] and scales is None) or (inputs[3] and sizes is None):
        return None
    rank = len(shape)
    axes = [int(axis) % rank for axis in values.get("axes", range(rank))]
    crop = values.get("coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
    region = facts.constant(inputs[1]) if crop else None
    if crop and (region is None or region.size != 2 * len(axes)):
        return None
    regions = [
        (0.0, 1.0) if region is None else (float(region[i]), float(region[len(axes) + i]))
        for i in range(len(axes))
    ]
    extents = [shape[axis] for axis in axes]
    if scales is not None and scales.size:
        factors = [float(scale) for scale in scales]
        targets = [int(extent * scale) for extent, scale in zip(extents, scales, strict=True)]
    elif sizes is not None and sizes.size:
        targets = [int(size) for size in sizes]
        factors = [size / extent for size, extent in zip(targets, extents, strict=True)]
        policy = values.get("keep_aspect_ratio_policy", b"stretch")
        if policy != b"stretch":
            factor = min(factors) if policy == b"not_larger" else max(factors)
            factors = [factor] * len(axes)
            targets = [int(factor * extent + 0.5) for extent in extents]
    else:
        return None
    return dict(zip(axes, zip(extents, factors, targets, regions, strict=True), strict=True))


def _axis_matrix(
    values: dict[str, Any], extent: int, scale: float, size: int, region: tuple[float, float]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return what resizes one axis: `x @ matrix + offset`."""
    crop = values.get("coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
    roi = np.array([0, region[0], 1, region[1]] if crop else [], np.float32)
    by_scale = int(scale * extent) == size
    given = np.array([1.0, scale], np.float32) if by_scale else np.array([0, size], np.int64)
    rows = np.vstack([np.eye(extent), np.zeros((1, extent))]).astype(np.float64)
    if not by_scale:
        given[0] = len(rows)
    names = ["x", "roi", "scales" if by_scale else "", "" if by_scale else "sizes"]
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Resize", names, ["y"], **values)],
        "axis",
        [
            tensor("x", onnx.TensorProto.DOUBLE, None),
            tensor("roi", onnx.TensorProto.FLOAT, None),
            tensor("scales" if by_scale else "sizes", onnx.TensorProto.FLOAT, None),
        ],
        [tensor("y", onnx.TensorProto.DOUBLE, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)])
    try:
        feeds = {"x": rows, "roi": roi, names[2] or names[3]: given}
        result = np.asarray(ReferenceEvaluator(model).run(None, feeds)[0], np.float64)
    except Exception:  # a mode the reference does not know either
        return None, None
    if result.shape != (extent + 1, size):
        return None, None
    return result[:-1] - result[-1:], result[-1]


def _apply(to: Rewriter, value: str, matrix: np.ndarray, axis: int, rank: int) -> str:
    chosen = matrix.argmax(axis=0)
    if np.array_equal(matrix, np.eye(matrix.shape[0], dtype=matrix.dtype)[:, chosen]):
        return to.op("Gather", value, to.constant(chosen), axis=axis)
    if axis == rank - 1:
        return to.op("MatMul", value, to.constant(matrix, matrix.dtype))
    if axis == rank - 2:
        return to.op("MatMul", to.constant(matrix.T, matrix.dtype), value)
    order = [*(a for a in range(rank) if a != axis), axis]
    last = to.op("Transpose", value, perm=order)
    product = to.op("MatMul", last, to.constant(matrix, matrix.dtype))
    return to.op("Transpose", product, perm=[order.index(a) for a in range(rank)])
