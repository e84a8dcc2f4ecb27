"""The stages that make of an ONNX model a graph that TVM's importer can take."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
import onnx.inliner
from onnx import ModelProto, TensorProto

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.onnx_prepare.batch_norm import fold_batch_norms
from gpu_aware_tune.onnx_prepare.convert import (
    attach_weights,
    detach_weights,
    drop_unused_weights,
    optimised_by_onnxruntime,
    to_float16,
)
from gpu_aware_tune.onnx_prepare.expand import expand
from gpu_aware_tune.onnx_prepare.facts import HALF, opset_of, uses_types, walk
from gpu_aware_tune.onnx_prepare.fold import fold
from gpu_aware_tune.onnx_prepare.limits import check_sizes
from gpu_aware_tune.onnx_prepare.random_values import NOTE, freeze_random
from gpu_aware_tune.onnx_prepare.refuse import refuse_unsupported
from gpu_aware_tune.onnx_prepare.shapes import drop_weight_inputs, fix_inputs
from gpu_aware_tune.onnx_prepare.unsigned import to_unsigned
from gpu_aware_tune.onnx_prepare.upgrade import upgrade
from gpu_aware_tune.settings import DTYPES, TF32


def prepare(
    model: ModelProto,
    input_shapes: Mapping[str, tuple[int, ...]],
    dtype: str | None,
    supported: Collection[tuple[str, str]],
    notes: list[str] | None = None,
) -> ModelProto:
    """Return the model static, folded and expanded, in one piece; see `prepare_detached`."""
    return attach_weights(*prepare_detached(model, input_shapes, dtype, supported, notes))


def prepare_detached(
    model: ModelProto,
    input_shapes: Mapping[str, tuple[int, ...]],
    dtype: str | None,
    supported: Collection[tuple[str, str]],
    notes: list[str] | None = None,
) -> tuple[ModelProto, list[TensorProto]]:
    """Return the model static, folded and expanded, and its large weights; `model` itself is used up.

    Args:
        model: as `read_model` returns it.
        input_shapes: shapes of the inputs with dynamic dimensions.
        dtype: "float16" converts a float32 model; inputs and outputs stay float32, so that the
            result is called like the original. None, "float32" and "tf32" leave the types as they
            are; the last two are for float32 models.
        supported: (domain, operator) pairs that the importer can take.
        notes: gets a line for each thing that was assumed and that the user should know.

    Returns:
        A graph with typed inputs in place of its large weights, and those, as `detach_weights` does.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    assumed = fix_inputs(model, input_shapes)  # looks at the IR version, which is raised next
    if notes is not None:
        notes.extend(assumed)
    if freeze_random(model) and notes is not None:
        notes.append(NOTE)
    _tidy(model)
    check_sizes(model)  # again, as all inputs are static now
    model, weights = detach_weights(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    model = upgrade(model)
    model = expand(fold(model), supported)
    refuse_unsupported(model, supported)
    is_half = uses_types(model, HALF)
    if is_half and dtype in ("float32", TF32):
        raise UserError(f"dtype {dtype}: the model is float16 already; leave the option out")
    if not is_half:
        model, weights = optimised_by_onnxruntime(model, weights)
    _sums_of_two(model)
    converted = dtype == "float16" and not is_half
    if converted or any(node.op_type == "BatchNormalization" for node in model.graph.node):
        model = fold_batch_norms(attach_weights(model, weights))
        if converted:
            model = to_float16(model)
        model, weights = detach_weights(model)
    _tidy(model)
    model = expand(fold(model), supported)
    refuse_unsupported(model, supported)
    model = to_unsigned(model)
    drop_unused_weights(model, weights)
    _tidy(model)
    return model, weights


def _sums_of_two(model: ModelProto) -> None:
    """Turn Sum of two values into Add: TVM stacks a Sum's operands and cannot fuse what follows."""
    if opset_of(model) < 8:  # Add had other broadcasting rules before
        return
    for node in model.graph.node:
        if node.op_type == "Sum" and not node.domain and len(node.input) == 2:
            node.op_type = "Add"


def _tidy(model: ModelProto) -> None:
    """Drop what says nothing about the computation, so that equal graphs hash alike."""
    graph = model.graph
    drop_weight_inputs(model)
    # ONNX Runtime folds an initializer only where no graph input may override it: IR version 4 on.
    model.ir_version = max(model.ir_version, 8)
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    model.producer_name, model.producer_version, model.model_version = "", "", 0
    graph.name = "main"
    graph.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.ClearField("value_info")
    named: set[str] = set()
    for node in walk(graph):
        node.domain = "" if node.domain == "ai.onnx" else node.domain
        if not node.name or node.name in named:  # the version converter gives two nodes one name
            node.name = next((output for output in node.output if output), "")
            if node.name in named:
                node.name = f"{node.name}/{len(named)}"
        named.add(node.name)
        for attribute in [a for a in node.attribute if a.name == "axes" and not a.ints]:
            if attribute.type == onnx.AttributeProto.INTS:  # all axes, as if it were not there
                node.attribute.remove(attribute)
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    used = {node.domain for node in graph.node} | {""}
    imports = [entry for entry in model.opset_import if entry.domain in used | {"ai.onnx"}]
    if not model.functions:
        del model.opset_import[:]
        model.opset_import.extend(imports)
