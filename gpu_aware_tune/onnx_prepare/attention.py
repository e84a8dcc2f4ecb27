"""Rules for the attention operators of com.microsoft, as products around a softmax.

Inputs and attributes are those of ONNX Runtime's `docs/ContribOperators.md`. B is the batch, S the
length of the queries, T that of the keys, N the number of heads, D their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.activations import like
from gpu_aware_tune.onnx_prepare.facts import Facts, attributes, input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule
from gpu_aware_tune.onnx_prepare.rotary import rotary_embedding, rotated

MASK_FILTER_VALUE = -10000.0  # what ONNX Runtime adds to the scores of masked keys


@dataclass
class Heads:
    """Queries (B, N, S, D), keys (B, N, T, D) and values (B, N, T, Dv) of one attention."""

    query: str
    key: str
    value: str
    batch: int
    heads: int
    queries: int
    keys: int
    size: int
    value_size: int


def attend(
    to: Rewriter,
    of: Heads,
    values: dict[str, Any],
    bias: Sequence[str] = (),
    sink: str = "",
) -> str:
    """Emit softmax(scale Q K^T + bias) V.

    Args:
        to: where to.
        of: the operands.
        values: attributes: `scale` (0 is one over the root of the size), `softcap`.
        bias: what is added to the scores, each broadcast to (B, N, S, T).
        sink: scores (1 or N, 1, 1, 1 each) that take part in the softmax without a value.

    Returns:
        The result as (B, S, N Dv).
    """
    scale = values.get("scale", 0.0) or of.size**-0.5
    query = to.op("Mul", of.query, like(to, scale, of.query))
    scores = to.op("MatMul", query, to.op("Transpose", of.key, perm=[0, 1, 3, 2]))
    if softcap := values.get("softcap", 0.0):
        limit = like(to, softcap, of.query)
        scores = to.op("Mul", to.op("Tanh", to.op("Div", scores, limit)), limit)
    for addend in bias:
        scores = to.op("Add", scores, addend)
    if sink:
        column = to.op("Expand", sink, to.constant([of.batch, of.heads, of.queries, 1]))
        scores = to.op("Concat", scores, column, axis=-1)
    weights = to.op("Softmax", scores, axis=-1)
    if sink:
        weights = to.op(
            "Slice", weights, to.constant([0]), to.constant([of.keys]), to.constant([3])
        )
    result = to.op("Transpose", to.op("MatMul", weights, of.value), perm=[0, 2, 1, 3])
    return to.op("Reshape", result, to.constant([of.batch, of.queries, of.heads * of.value_size]))


def _split_heads(to: Rewriter, value: str, batch: int, length: int, heads: int) -> str:
    """Turn (B, S, N D) into (B, N, S, D)."""
    split = to.op("Reshape", value, to.constant([batch, length, heads, -1]))
    return to.op("Transpose", split, perm=[0, 2, 1, 3])


def _parts(to: Rewriter, value: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
    """Cut a value along an axis into parts of these sizes."""
    ends = np.cumsum(sizes)
    return [
        to.op("Slice", value, to.constant([end - n]), to.constant([end]), to.constant([axis]))
        for n, end in zip(sizes, ends, strict=True)
    ]


def _kept_keys(to: Rewriter, mask: str, of: Heads) -> str | None:
    """Turn a mask of any form into booleans that broadcast to (B, N, S, T).

    A mask of rank 1 has the number of keys of each sequence, or that and then the first key of each;
    of higher rank it is 0 for keys that are masked.
    """
    shape = to.shape(mask)
    places = to.constant(np.arange(of.keys).reshape(1, 1, 1, -1), to.dtype(mask) or np.int32)
    if shape is None:
        return None
    if len(shape) == 1 and shape[0] in (of.batch, 2 * of.batch):
        parts = _parts(to, mask, [of.batch] * (shape[0] // of.batch), 0)
        bounds = [to.op("Reshape", part, to.constant([of.batch, 1, 1, 1])) for part in parts]
        kept = to.op("Less", places, bounds[0])
        for first in bounds[1:]:
            kept = to.op("And", kept, to.op("Not", to.op("Less", places, first)))
        return kept
    if shape == (of.batch, of.keys):
        mask = to.op("Unsqueeze", mask, to.constant([1, 2]))
    elif shape == (of.batch, of.queries, of.keys):
        mask = to.op("Unsqueeze", mask, to.constant([1]))
    elif len(shape) == 4 and min(shape[2:]) >= of.keys:  # rows and columns of the longest sequence
        starts, ends = [of.keys - of.queries, 0], [of.keys, of.keys]
        bounds = [to.constant(starts), to.constant(ends), to.constant([2, 3])]
        mask = to.op("Slice", mask, *bounds)
    else:
        return None
    return to.op("Greater", mask, to.constant(0, to.dtype(mask) or np.int32))


def _mask_bias(to: Rewriter, mask: str, of: Heads, values: dict[str, Any]) -> list[str] | None:
    """What the mask and `unidirectional` add to the scores; None for a form that is not known."""
    bias = ""
    if mask:
        kept = _kept_keys(to, mask, of)
        if kept is None:
            return None
        filtered = values.get("mask_filter_value", MASK_FILTER_VALUE)
        bias = to.op("Where", kept, like(to, 0.0, of.query), like(to, filtered, of.query))
    if values.get("unidirectional", 0):
        bias = _causal(to, of, bias)
    return [bias] if bias else []


def _causal(to: Rewriter, of: Heads, bias: str = "", window: int = -1) -> str:
    """Add to a bias that no query sees a later key, nor one `window` or more places before."""
    rows = np.arange(of.keys - of.queries, of.keys)[:, None]
    columns = np.arange(of.keys)
    seen = columns <= rows
    if window > 0:
        seen &= columns > rows - window
    dtype = to.dtype(of.query) or np.dtype(np.float32)
    lowest = -65504.0 if dtype.itemsize == 2 else float(np.finfo(dtype).min)
    mask = to.constant(seen.reshape(1, 1, *seen.shape), np.bool_)
    return to.op("Where", mask, bias or like(to, 0.0, of.query), like(to, lowest, of.query))


def _attention(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: Attention, which projects its input to queries, keys and values itself."""
    values = attributes(node)
    x, weights = node.input[:2]
    shape, width = to.shape(x), to.shape(weights)
    if shape is None or width is None or values.get("do_rotary", 0) or input_of(node, 6):
        return None
    batch, length, heads = shape[0], shape[1], values["num_heads"]
    sizes = list(values.get("qkv_hidden_sizes") or [width[1] // 3] * 3)
    projected = to.op("MatMul", x, weights)
    if bias := input_of(node, 2):
        projected = to.op("Add", projected, bias)
    to.facts.types[projected] = to.facts.types.get(x, 0)
    q, k, v = (
        _split_heads(to, part, batch, length, heads) for part in _parts(to, projected, sizes)
    )
    past = input_of(node, 4)
    keys = length
    if past:
        past_shape = to.shape(past)
        if past_shape is None:
            return None
        keys += past_shape[3]
        before = [to.op("Gather", past, to.constant(index)) for index in (0, 1)]
        k, v = (to.op("Concat", *pair, axis=2) for pair in zip(before, (k, v), strict=True))
    to.facts.types[q] = to.facts.types.get(x, 0)
    of = Heads(q, k, v, batch, heads, length, keys, sizes[0] // heads, sizes[2] // heads)
    added = _mask_bias(to, input_of(node, 3), of, values)
    if added is None:
        return None
    if extra := input_of(node, 5):
        added.append(extra)
    outputs = [attend(to, of, values, added)]
    if len(node.output) > 1:
        stacked = [to.op("Unsqueeze", value, to.constant([0])) for value in (k, v)]
        outputs.append(to.op("Concat", *stacked, axis=0))
    return outputs


def _multi_head_attention(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: MultiHeadAttention: inputs query, key, value, bias, mask, attention bias, past."""
    values = attributes(node)
    heads = values["num_heads"]
    if len(node.output) > 3 or any(input_of(node, place) for place in (8, 9)):
        return None
    operands = _operands(node, to, heads)
    if operands is None:
        return None
    of, past = operands, [input_of(node, 6), input_of(node, 7)]
    if all(past):
        past_shape = to.shape(past[0])
        if past_shape is None:
            return None
        of.keys += past_shape[2]
        of.key = to.op("Concat", past[0], of.key, axis=2)
        of.value = to.op("Concat", past[1], of.value, axis=2)
    to.facts.types[of.query] = to.facts.types.get(node.input[0], 0)
    added = _mask_bias(to, input_of(node, 4), of, values)
    if added is None:
        return None
    if extra := input_of(node, 5):
        added.append(extra)
    return [attend(to, of, values, added), of.key, of.value][: len(node.output)]


def _operands(node: NodeProto, to: Rewriter, heads: int) -> Heads | None:
    """Bring the operands, which may be packed and may have a bias, into the form (B, N, S, D)."""
    shapes = [to.shape(input_of(node, place)) for place in range(3)]
    if shapes[0] is None:
        return None
    batch, length = shapes[0][:2]
    names = [input_of(node, place) for place in range(3)]
    if len(shapes[0]) == 5:
        names = [to.op("Gather", names[0], to.constant(i), axis=3) for i in range(3)]
        shapes = [(batch, length, heads * shapes[0][4])] * 3
    elif shapes[1] is not None and len(shapes[1]) == 5:
        names[1:] = [to.op("Gather", names[1], to.constant(i), axis=3) for i in range(2)]
        shapes[1:] = [(*shapes[1][:2], heads * shapes[1][4])] * 2
    if shapes[1] is None or shapes[2] is None:
        return None
    in_heads = [len(shape or ()) == 4 for shape in shapes]
    sizes = [
        (shape or ())[-1] * (heads if is_split else 1)
        for shape, is_split in zip(shapes, in_heads, strict=True)
    ]
    keys = shapes[1][2] if in_heads[1] else shapes[1][1]
    biases = _parts(to, input_of(node, 3), sizes, 0) if input_of(node, 3) else []
    made = []
    for place, (name, is_split) in enumerate(zip(names, in_heads, strict=True)):
        if is_split:
            made.append(name)
            continue
        extent = length if place == 0 else keys
        flat = to.op("Reshape", name, to.constant([batch, extent, sizes[place]]))
        if biases:
            flat = to.op("Add", flat, biases[place])
        made.append(_split_heads(to, flat, batch, extent, heads))
    size, value_size = sizes[0] // heads, sizes[2] // heads
    return Heads(made[0], made[1], made[2], batch, heads, length, keys, size, value_size)


def _group_query_attention(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: causal attention over a prompt, whose key heads are shared by groups of query heads."""
    values = attributes(node)
    heads, key_heads = values["num_heads"], values["kv_num_heads"]
    q, k, v = node.input[:3]
    shape = to.shape(q)
    if shape is None or group_query_reason(node, to.facts):
        return None
    batch, length = shape[:2]
    size = shape[2] // (heads if k else heads + 2 * key_heads)
    if not k:
        q, k, v = _parts(to, q, [heads * size, key_heads * size, key_heads * size])
    q = _split_heads(to, q, batch, length, heads)
    k, v = (_split_heads(to, value, batch, length, key_heads) for value in (k, v))
    to.facts.types[q] = to.facts.types.get(node.input[0], 0)
    if values.get("do_rotary", 0):
        places = input_of(node, 9) or to.constant(np.arange(length).reshape(1, -1))
        caches = (input_of(node, 7), input_of(node, 8))
        width = 2 * (to.shape(caches[0]) or (0, 0))[1]
        interleaved = bool(values.get("rotary_interleaved", 0))
        q, k = (rotated(to, value, caches, places, size, width, interleaved) for value in (q, k))
        to.facts.types[q] = to.facts.types.get(node.input[0], 0)
    present = [k, v]
    k, v = (_repeated(to, value, batch, key_heads, heads, length, size) for value in present)
    of = Heads(q, k, v, batch, heads, length, length, size, size)
    added = [_causal(to, of, window=values.get("local_window_size", -1))]
    if extra := input_of(node, 10):
        added.append(extra)
    sink = input_of(node, 11)
    if sink:
        sink = to.op("Reshape", sink, to.constant([1, heads, 1, 1]))
    elif values.get("smooth_softmax", 0) > 0:
        sink = to.op("Reshape", like(to, 0.0, q), to.constant([1, 1, 1, 1]))
    return [attend(to, of, values, added, sink), *present][: len(node.output)]


def _repeated(
    to: Rewriter, value: str, batch: int, groups: int, heads: int, length: int, size: int
) -> str:
    """Repeat each of the key heads for the query heads of its group."""
    if groups == heads:
        return value
    split = to.op("Unsqueeze", value, to.constant([2]))
    shape = [batch, groups, heads // groups, length, size]
    spread = to.op("Expand", split, to.constant(shape))
    return to.op("Reshape", spread, to.constant([batch, heads, length, size]))


def group_query_reason(node: NodeProto, facts: Facts) -> str:
    """Say why a GroupQueryAttention was not expanded; empty where it can be."""
    values = attributes(node)
    past = facts.shapes.get(input_of(node, 3))
    if facts.shapes.get(node.input[0]) is None:
        return "the shape of its query must be static; give --input"
    if input_of(node, 3) and (past is None or 0 not in past):
        return (
            f"it continues from past keys and values ({input_of(node, 3)!r}), of which only an empty"
            " past is supported; export the model for the prompt, without a cache"
        )
    if any(values.get(key, b"NONE") != b"NONE" for key in ("k_quant_type", "v_quant_type")):
        return "its keys and values are quantised; export the cache in floats"
    if len(node.output) > 3:
        return "of its outputs only the first three are supported"
    if values.get("do_rotary", 0) and not facts.shapes.get(input_of(node, 7)):
        return "do_rotary needs a table of cosines of static shape"
    return ""


def attention_reason(node: NodeProto, facts: Facts) -> str:
    """Say why an Attention or MultiHeadAttention was not expanded."""
    is_packed = node.op_type == "Attention"
    if facts.shapes.get(node.input[0]) is None:
        return "the shape of its input must be static; give --input"
    if is_packed and attributes(node).get("do_rotary", 0):
        return "do_rotary is not supported; export it with RotaryEmbedding before it"
    if (is_packed and input_of(node, 6)) or any(input_of(node, place) for place in (8, 9)):
        return "a cache shared with its output is not supported; export it without"
    return "its mask or its operands have a form that is not supported"


ATTENTION: dict[str, Rule] = {
    "com.microsoft.Attention": _attention,
    "com.microsoft.GroupQueryAttention": _group_query_attention,
    "com.microsoft.MultiHeadAttention": _multi_head_attention,
    "com.microsoft.RotaryEmbedding": rotary_embedding,
}
"""Rules by operator name, see `rewriter.operator_name`."""
