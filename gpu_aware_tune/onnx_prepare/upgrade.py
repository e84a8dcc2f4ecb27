"""Rewrites the operators of the operator sets 7 to 12 in the form that they have in set 13.

`onnx.version_converter` is not used for these: it leaves half-pixel coordinates where an older
Resize or Upsample was asymmetric, and gives the whole model up for one operator that it lacks.
An operator that is not in `UPGRADES` has the same meaning in set 13 as in set 7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.version_converter
from onnx import ModelProto, NodeProto

from gpu_aware_tune.errors import UserError, one_line
from gpu_aware_tune.onnx_prepare.facts import attributes, input_of, opset_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule, apply_rules

OLDEST_OPSET = 13  # older operators (Slice, Pad, Clip, ...) are unknown to TVM's importer
OLDEST_UPGRADED = 7  # broadcasting was by attributes before


def upgrade(model: ModelProto) -> ModelProto:
    """Return the model in operator set 13, or as it is where its set is newer.

    Raises:
        UserError: the model is older than set 7, and ONNX cannot convert it.
    """
    opset = opset_of(model)
    if opset >= OLDEST_OPSET:
        return model
    if opset < OLDEST_UPGRADED:
        try:
            model = onnx.version_converter.convert_version(model, OLDEST_UPGRADED)
        except Exception as error:  # the converter raises RuntimeError and worse for what it lacks
            raise UserError(
                f"the model's operator set {opset} cannot be converted ({one_line(error, 160)}): "
                "export it again with operator set 13 or newer"
            ) from error
    apply_rules(model, UPGRADES, OLDEST_OPSET)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = OLDEST_OPSET
    return model


def _same(node: NodeProto, to: Rewriter, *more: str, **changed: Any) -> list[str]:
    """Emit the node with further inputs and with other attributes; None takes one away."""
    values = {key: v for key, v in (attributes(node) | changed).items() if v is not None}
    op_type = values.pop("op_type", "")
    return to.same(node, [*node.input, *more], values, op_type)


def _batch_normalization(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Set 7 could normalise each element by its own mean (`spatial` 0)."""
    values = attributes(node)
    if to.facts.opset >= 9 or values.get("spatial", 1) or len(node.output) > 1:
        return None if "spatial" not in values else _same(node, to, spatial=None)
    x, scale, bias, mean, var = node.input
    dtype = to.dtype(x) or np.float32
    epsilon = to.constant(values.get("epsilon", 1e-5), dtype)
    deviation = to.op("Sqrt", to.op("Add", var, epsilon))
    normal = to.op("Div", to.op("Sub", x, mean), deviation)
    return [to.op("Add", to.op("Mul", normal, scale), bias)]


def _axes_to_input(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Squeeze, Unsqueeze, ReduceSum and Split: an attribute became the second input."""
    name = "split" if node.op_type == "Split" else "axes"
    values = attributes(node)
    if name not in values:
        return None
    return _same(node, to, to.constant(values[name]), **{name: None})


def _clip(node: NodeProto, to: Rewriter) -> list[str] | None:
    values = attributes(node)
    if to.facts.opset >= 11:
        return None
    dtype = to.dtype(node.input[0]) or np.float32
    bounds = [to.constant(values[key], dtype) if key in values else "" for key in ("min", "max")]
    return _same(node, to, *bounds, min=None, max=None)


def _dropout(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Before set 12 no input could switch the training on, so it passes its input through."""
    if to.facts.opset >= 12:
        return None
    outputs = _same(node, to, ratio=None)
    if len(outputs) > 1 and to.facts.opset < 10 and (dtype := to.dtype(node.input[0])):
        outputs[1] = to.cast(outputs[1], dtype)
    return outputs


def _pad(node: NodeProto, to: Rewriter) -> list[str] | None:
    values = attributes(node)
    if "pads" not in values:
        return None
    fill = to.constant(values.get("value", 0.0), to.dtype(node.input[0]) or np.float32)
    return _same(node, to, to.constant(values["pads"]), fill, pads=None, value=None)


def _resize(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Upsample and Resize before set 11 are asymmetric.

    For "nearest" ONNX Runtime takes the element below where an axis grows and the one above where
    it shrinks; the standard of that time says nothing.
    """
    values = attributes(node)
    if to.facts.opset >= 11:
        return None
    scales = np.asarray(values["scales"]) if "scales" in values else None
    given = input_of(node, 1) or to.constant(scales, np.float32)
    scales = to.facts.constant(given) if scales is None else scales
    mode = values.get("mode", b"nearest").replace(b"bilinear", b"linear")
    common = {"coordinate_transformation_mode": "asymmetric", "mode": mode}
    if mode != b"nearest":
        return [to.op("Resize", node.input[0], "", given, **common)]
    if scales is None or np.all(scales >= 1) or np.all(scales <= 1):
        rounding = "floor" if scales is None or np.any(scales > 1) else "ceil"
        return [to.op("Resize", node.input[0], "", given, nearest_mode=rounding, **common)]
    up, down = (to.constant(part, np.float32) for part in (scales.clip(1), scales.clip(max=1)))
    grown = to.op("Resize", node.input[0], "", up, nearest_mode="floor", **common)
    return [to.op("Resize", grown, "", down, nearest_mode="ceil", **common)]


def _scatter(node: NodeProto, to: Rewriter) -> list[str] | None:
    return _same(node, to, op_type="ScatterElements")


def _slice(node: NodeProto, to: Rewriter) -> list[str] | None:
    values = attributes(node)
    if "starts" not in values:
        return None
    axes = values.get("axes", list(range(len(values["starts"]))))
    bounds = [to.constant(part) for part in (values["starts"], values["ends"], axes)]
    return _same(node, to, *bounds, starts=None, ends=None, axes=None)


def _softmax(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Softmax, LogSoftmax and Hardmax were over all axes from `axis` on, as one."""
    x = node.input[0]
    axis = attributes(node).get("axis", 1)
    shape = to.shape(x)
    if shape is not None:
        first = axis % len(shape) if shape else 0
        long = [index for index in range(first, len(shape)) if shape[index] != 1]
        if len(long) <= 1:  # the others add nothing: no reshaping, so that it can be fused
            only = long[0] if long else len(shape) - 1
            return [to.op(node.op_type, x, axis=only)]
    flat = to.op(node.op_type, to.op("Flatten", x, axis=axis), axis=-1)
    return [to.op("Reshape", flat, to.op("Shape", x))]


def _top_k(node: NodeProto, to: Rewriter) -> list[str] | None:
    values = attributes(node)
    return _same(node, to, to.constant([values["k"]]), k=None) if "k" in values else None


UPGRADES: dict[str, Rule] = {
    "BatchNormalization": _batch_normalization,
    "Clip": _clip,
    "Dropout": _dropout,
    "Hardmax": _softmax,
    "LogSoftmax": _softmax,
    "Pad": _pad,
    "ReduceSum": _axes_to_input,
    "Resize": _resize,
    "Scatter": _scatter,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _axes_to_input,
    "Squeeze": _axes_to_input,
    "TopK": _top_k,
    "Unsqueeze": _axes_to_input,
    "Upsample": _resize,
}
