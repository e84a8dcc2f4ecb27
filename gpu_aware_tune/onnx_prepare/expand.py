"""Replaces operators that TVM's importer lacks or gets wrong.

Two ways: ONNX's own function bodies (`onnx.inliner`), and the rules of `rules` for operators that
ONNX does not define as functions. What is left and would come out wrong, `refuse` refuses.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from copy import deepcopy

import onnx.defs
import onnx.helper
import onnx.inliner
from onnx import FunctionProto, ModelProto, NodeProto

from gpu_aware_tune.onnx_prepare.facts import Facts, attributes, infer_shapes, opset_of, walk
from gpu_aware_tune.onnx_prepare.fold import drop_unused, fold
from gpu_aware_tune.onnx_prepare.rewriter import apply_rules
from gpu_aware_tune.onnx_prepare.rules import RULES

log = logging.getLogger(__name__)

ROUNDS = 6
FUNCTION_DOMAIN = "expanded"
DOUBTFUL = {"Attention", "LayerNormalization", "RMSNormalization", "SpaceToDepth"}
BY_PRODUCTS = {"Dropout", "LayerNormalization", "MaxPool"}


def expand(model: ModelProto, supported: Collection[tuple[str, str]]) -> ModelProto:
    """Return the model with unsupported and wrongly imported operators replaced where possible."""
    for _ in range(ROUNDS):
        _trim_outputs(model)
        rewritten = apply_rules(model, RULES)
        model, inlined = _inline_functions(model, supported)
        if not rewritten and not inlined:
            break
        model = fold(model)
    return model


def _trim_outputs(model: ModelProto) -> None:
    """Drop trailing outputs that nobody reads, so that they do not force an expansion.

    Only where they are by-products: the number of outputs of a Split says how it splits.
    """
    used = {name for node in walk(model.graph) for name in node.input if name}
    used |= {value.name for value in model.graph.output}
    for node in model.graph.node:
        while node.op_type in BY_PRODUCTS and len(node.output) > 1 and node.output[-1] not in used:
            del node.output[-1]
    drop_unused(model)


def _inline_functions(
    model: ModelProto, supported: Collection[tuple[str, str]]
) -> tuple[ModelProto, bool]:
    """Expand nodes by the function bodies that ONNX defines for their operators.

    Each node gets a function of its own. `onnx.inliner` could take the bodies from the schemas, but
    fails where an optional input is left out, and drops the defaults of attributes.
    """
    if not any(_may_want_function(node, supported) for node in walk(model.graph)):
        return model, False
    original, model = model, deepcopy(model)
    types, facts = _types(model), Facts(model)
    for node in walk(model.graph):
        wanted = _may_want_function(node, supported)
        if not wanted or (("", node.op_type) in supported and not _imported_wrong(node, facts)):
            continue
        function = _function(node, types, opset_of(model))
        if function is None:
            continue
        _state_defaults(node, opset_of(model))
        function.domain = node.domain = FUNCTION_DOMAIN
        function.name = node.op_type = f"{node.op_type}_{len(model.functions)}"
        model.functions.append(function)
    if not model.functions:
        return original, False
    model.opset_import.append(onnx.helper.make_opsetid(FUNCTION_DOMAIN, 1))
    try:
        model = onnx.inliner.inline_local_functions(model, convert_version=True)
    except Exception as error:  # raised in C++, for bodies that it cannot convert
        log.debug("inliner: %s", error)
        return original, False
    kept = [entry for entry in model.opset_import if entry.domain != FUNCTION_DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model, True


def _state_defaults(node: NodeProto, opset: int) -> None:
    given = {attribute.name for attribute in node.attribute}
    for name, declared in onnx.defs.get_schema(node.op_type, opset).attributes.items():
        if name not in given and declared.default_value.name:
            node.attribute.append(declared.default_value)


def _may_want_function(node: NodeProto, supported: Collection[tuple[str, str]]) -> bool:
    return not node.domain and (("", node.op_type) not in supported or node.op_type in DOUBTFUL)


def _types(model: ModelProto) -> dict[str, bytes]:
    graph = infer_shapes(model).graph
    types = {value.name: value.type for value in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
    return {name: value.SerializeToString() for name, value in types.items()}


def _function(node: NodeProto, types: dict[str, bytes], opset: int) -> FunctionProto | None:
    """Return the body that ONNX defines for a node, None where it defines none."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
        if schema.has_function:
            version = max(v for v in schema.function_opset_versions if v <= opset)
            body = schema.get_function_with_opset_version(version)
        elif schema.has_context_dependent_function:
            versions = schema.context_dependent_function_opset_versions
            body = schema.get_context_dependent_function_with_opset_version(
                max(v for v in versions if v <= opset),
                node.SerializeToString(),
                [types.get(name, b"") for name in node.input],
            )
        else:
            return None
    except (onnx.defs.SchemaError, ValueError, RuntimeError) as error:
        log.debug("no function body for %s: %s", node.op_type, error)
        return None
    function = FunctionProto()
    function.ParseFromString(body)
    if not function.node:
        return None
    _adopt_opset(function, opset)
    return function


def _adopt_opset(function: FunctionProto, opset: int) -> None:
    """Move a body to the model's operator set where its operators have the same form there.

    Other bodies the inliner converts, for which there must be a converter.
    """
    for entry in function.opset_import:
        changed = False
        for op_type in {node.op_type for node in function.node if not node.domain}:
            old = onnx.defs.get_schema(op_type, entry.version)
            new = onnx.defs.get_schema(op_type, opset)
            changed |= len(old.inputs) != len(new.inputs)
            changed |= bool(set(old.attributes) - set(new.attributes))
        if not entry.domain and not changed:
            entry.version = opset


def _imported_wrong(node: NodeProto, facts: Facts) -> bool:
    """Tell whether TVM imports this use of a doubtful operator wrongly."""
    values = attributes(node)
    match node.op_type:
        case "LayerNormalization":  # mean and deviation come out as zero
            return len(node.output) > 1
        case "SpaceToDepth":
            return values.get("mode", b"DCR") == b"CRD"
        case "RMSNormalization":  # does not compile over all axes
            shape = facts.shapes.get(node.input[0])
            return shape is None or values.get("axis", -1) in (0, -len(shape))
    return True  # ONNX's Attention, which TVM takes for the one of com.microsoft
