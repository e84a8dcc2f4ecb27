"""Rules along one axis: reversed sequences, caches that are written to, cumulative products."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule


def reverse_sequence(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: gather along time; beyond a sequence's end elements stay where they are."""
    values, shape = attributes(node), to.shape(node.input[0])
    if shape is None:
        return None
    batch, time = (
        values.get(key, default) for key, default in (("batch_axis", 1), ("time_axis", 0))
    )
    along, across = [1] * len(shape), [1] * len(shape)
    along[time], across[batch] = shape[time], shape[batch]
    steps = to.constant(np.arange(shape[time]).reshape(along))
    given = to.op("Min", to.cast(node.input[1], np.int64), to.constant(shape[time]))
    lengths = to.op("Reshape", given, to.constant(across))
    backwards = to.op("Sub", to.op("Sub", lengths, to.constant(1)), steps)
    index = to.op("Where", to.op("Less", steps, lengths), backwards, steps)
    whole = to.op("Expand", index, to.constant(shape))
    return [to.op("GatherElements", node.input[0], whole, axis=time)]


def tensor_scatter(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: each place of the cache takes the update's element that is written there, or stays."""
    values = attributes(node)
    cache, update = to.shape(node.input[0]), to.shape(node.input[1])
    if cache is None or update is None:
        return None
    axis = values.get("axis", -2) % len(cache)
    along, across = [1] * len(cache), [1] * len(cache)
    along[axis], across[0] = cache[axis], cache[0]
    place = to.constant(np.arange(cache[axis]).reshape(along))
    if input_of(node, 2):
        start = to.op("Reshape", node.input[2], to.constant(across))
        place = to.op("Sub", place, start)
    if values.get("mode", b"linear") == b"circular":
        place = to.op("Mod", place, to.constant(cache[axis]))
    low = to.op("GreaterOrEqual", place, to.constant(0))
    written = to.op("And", low, to.op("Less", place, to.constant(update[axis])))
    index = to.op("Where", written, place, to.constant(0))
    new = to.op(
        "GatherElements", node.input[1], to.op("Expand", index, to.constant(cache)), axis=axis
    )
    return [to.op("Where", written, new, node.input[0])]


def cum_prod(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: products with what lies 1, 2, 4, ... places before."""
    values = attributes(node)
    shape, dtype = to.shape(node.input[0]), to.dtype(node.input[0])
    axis = to.facts.constant(node.input[1])
    if shape is None or dtype is None or axis is None:
        return None
    at = int(axis.reshape(())) % len(shape)
    where, extent = to.constant([at]), shape[at]

    def ones(count: int) -> str:
        return to.constant(np.ones([*shape[:at], count, *shape[at + 1 :]]), dtype)

    def reversed_(value: str) -> str:
        first, last, step = (to.constant([each]) for each in (-1, -(extent + 1), -1))
        return to.op("Slice", value, first, last, where, step)

    def shifted(value: str, by: int) -> str:
        kept = to.op("Slice", value, to.constant([0]), to.constant([extent - by]), where)
        return to.op("Concat", ones(by), kept, axis=at)

    product = node.input[0]
    if values.get("reverse", 0):
        product = reversed_(product)
    if values.get("exclusive", 0):
        product = shifted(product, 1) if extent > 1 else ones(extent)
    by = 1
    while by < extent:
        product = to.op("Mul", product, shifted(product, by))
        by *= 2
    return [reversed_(product) if values.get("reverse", 0) else to.op("Identity", product)]


SEQUENCES: dict[str, Rule] = {
    "CumProd": cum_prod,
    "ReverseSequence": reverse_sequence,
    "TensorScatter": tensor_scatter,
}
