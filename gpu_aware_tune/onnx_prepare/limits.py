"""Refuses files that are damaged, or that a few bytes unfold to more than any machine has.

Looked at before anything is inferred, folded or run: each of these is also what makes shape inference,
folding or ONNX Runtime take all memory or never end.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Iterator

import onnx
import onnx.shape_inference
from onnx import FunctionProto, ModelProto, NodeProto

from gpu_aware_tune.errors import UserError, one_line, quoted
from gpu_aware_tune.onnx_prepare.convert import skeleton_of
from gpu_aware_tune.onnx_prepare.facts import attributes, bodies, walk

VALUE_BYTES = 4 << 30  # of one value
CONSTANT_BYTES = 1 << 30  # of one value that no input changes
MOST_NODES = 200_000  # with the local functions put in their places
MOST_EXTENTS = 32  # of one value: NumPy takes 64, of which TVM's kernels need some as their own
MOST_LETTERS = 52 * 4  # of an Einsum's operands
EINSUM = re.compile(r"[A-Za-z. ]*(,[A-Za-z. ]*)*(->[A-Za-z. ]*)?")


def check_text(model: ModelProto) -> None:
    """Refuse names that are no text: protobuf passes bytes that are not UTF-8 through.

    Raises:
        UserError: there are some.
    """
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    named = [graph.name, *(value.name for value in values), *(e.domain for e in model.opset_import)]
    named += [name for f in model.functions for name in (f.name, f.domain, *f.input, *f.output)]
    for text in (*_names(_all_nodes(model)), *named):
        if not isinstance(text, str) or (not text.isascii() and not _is_encodable(text)):
            raise UserError(
                f"the file is damaged: its name {quoted(text)} is not text; get it again"
            )


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def _all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    yield from walk(model.graph)
    for function in model.functions:
        for node in function.node:
            yield node
            for body in bodies(node):
                yield from walk(body)


def _names(nodes: Iterable[NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def check_ends(model: ModelProto) -> None:
    """Refuse inputs or outputs of one name, which a call could not tell apart.

    Raises:
        UserError: there are some.
    """
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        counts = collections.Counter(value.name for value in values)
        for name, count in counts.items():
            if count > 1:
                raise UserError(
                    f"the model has {count} {kind}s {quoted(name)}: give each its own name"
                )


def check_functions(model: ModelProto) -> None:
    """Refuse local functions that call themselves, or that unfold to too many nodes.

    Raises:
        UserError: they do.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int | None] = {}
    count = sum(_unfolded(node, functions, sizes) for node in walk(model.graph))
    if count > MOST_NODES:
        raise UserError(
            f"the model's local functions unfold to {count} nodes; models of up to {MOST_NODES} are"
            " taken: export it without functions"
        )


def _unfolded(
    node: NodeProto,
    functions: dict[tuple[str, str], FunctionProto],
    sizes: dict[tuple[str, str], int | None],
) -> int:
    """Return the nodes that a node becomes; None in `sizes` is a function that is being counted."""
    key = (node.domain, node.op_type)
    if key not in functions:
        return 1
    if key not in sizes:
        sizes[key] = None
        sizes[key] = sum(_unfolded(inner, functions, sizes) for inner in functions[key].node)
    size = sizes[key]
    if size is None:
        raise UserError(f"the model is not valid: its function {quoted(node.op_type)} calls itself")
    return size


def check_equations(model: ModelProto) -> None:
    """Refuse equations of Einsum that ONNX's shape inference never comes to an end with.

    Raises:
        UserError: there is one.
    """
    for node in _all_nodes(model):
        if node.op_type != "Einsum" or node.domain not in ("", "ai.onnx"):
            continue
        equation = attributes(node).get("equation", b"")
        text = equation.decode(errors="replace") if isinstance(equation, bytes) else ""
        if len(text) > MOST_LETTERS or not EINSUM.fullmatch(text) or "." in text.replace("...", ""):
            raise UserError(
                f"the model is not valid: operator Einsum (node {_label(node)}) has the equation"
                f" {quoted(text)}"
            )


def check_nodes(model: ModelProto) -> None:
    """Refuse nodes with too few or too many inputs or outputs, which ONNX's inference may crash at.

    Those of local functions may be of another operator set, and are left alone.

    Raises:
        UserError: there is one.
    """
    versions = {"" if e.domain == "ai.onnx" else e.domain: e.version for e in model.opset_import}
    local = {(function.domain, function.name) for function in model.functions}
    for node in walk(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (node.domain, node.op_type) in local or domain not in versions:
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, versions[domain], domain)
        except (onnx.defs.SchemaError, TypeError):  # not ONNX's, or a version that is no number
            continue
        for kind, count, least, most in (
            ("inputs", len(node.input), schema.min_input, schema.max_input),
            ("outputs", len(node.output), schema.min_output, schema.max_output),
        ):
            if not least <= count <= most:
                raise UserError(
                    f"the model is not valid: operator {node.op_type} (node {_label(node)}) has"
                    f" {count} {kind}: it must have {least} to {most}"
                )
        said = attributes(node).get("num_outputs") if node.op_type == "Split" else None
        if said is not None and said != len(node.output):
            raise UserError(
                f"the model is not valid: operator Split (node {_label(node)}) has"
                f" {len(node.output)} outputs, and says {one_line(said, 40)}"
            )


def check_sizes(model: ModelProto) -> None:
    """Refuse values that no machine holds.

    Raises:
        UserError: there is one; it names the operator that makes it.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    model = skeleton_of(model)
    graph = model.graph
    try:  # no values are propagated: that has no limit itself
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=False).graph
    except Exception:  # an invalid graph is reported where it is imported
        return
    values = (*graph.input, *inferred.value_info, *inferred.output)
    for value in values:
        if (rank := len(value.type.tensor_type.shape.dim)) > MOST_EXTENTS:
            raise UserError(
                f"{quoted(value.name)} has {rank} dimensions; values of up to {MOST_EXTENTS} are taken"
            )
    sizes = {value.name: size for value in values if (size := _bytes(value)) is not None}
    changing = {value.name for value in graph.input} - constants
    for value in graph.input:
        if sizes.get(value.name, 0) > VALUE_BYTES:
            shown = quoted(value.name)
            raise UserError(f"input {shown} has {_gib(sizes[value.name])}; up to 4 GiB are taken")
    for node in graph.node:
        is_constant = changing.isdisjoint(node.input) and not any(True for _ in bodies(node))
        if not is_constant:
            changing.update(node.output)
        limit = CONSTANT_BYTES if is_constant else VALUE_BYTES
        size = max((sizes.get(name, 0) for name in node.output if name), default=0)
        if size > limit:
            raise UserError(
                f"operator {one_line(node.op_type, 40)} (node {_label(node)}) makes a value of"
                f" {_gib(size)}; up to {limit >> 30} GiB are taken: check the shapes of the model"
            )


def _label(node: NodeProto) -> str:
    return quoted(node.name or next(iter(node.output), ""))


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB" if size < 2**50 else "more than a million GiB"


def _bytes(value: onnx.ValueInfoProto) -> int | None:
    """Return the size of a tensor of static shape."""
    if value.type.WhichOneof("value") != "tensor_type":
        return None
    tensor = value.type.tensor_type
    extents = [dim.dim_value for dim in tensor.shape.dim if dim.HasField("dim_value")]
    if not tensor.HasField("shape") or len(extents) != len(tensor.shape.dim):
        return None
    try:
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    except KeyError:  # not stated, or not known
        width = 1
    return math.prod(max(extent, 0) for extent in extents) * width
