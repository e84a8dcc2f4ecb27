"""Random operators: their values are drawn once, and are constants from then on.

The oracle runs the file with the same constants, so that all that follows from them is compared.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from gpu_aware_tune.onnx_prepare.facts import attributes, input_of, walk
from gpu_aware_tune.onnx_prepare.rewriter import Rewriter, Rule, apply_rules

DRAWN_ELEMENTS = 1 << 26
NOTE = "its random values are drawn once, on import: every call computes with the same ones"


def has_random(model: ModelProto) -> bool:
    """Tell whether a model has random operators; a Dropout is one if it can be told to train."""
    return any(
        node.op_type in RANDOM
        and not node.domain
        and (node.op_type != "Dropout" or bool(input_of(node, 2)))
        for node in walk(model.graph)
    )


def freeze_random(model: ModelProto) -> bool:
    """Replace random operators of known shape by constants, in place; tell whether there were any.

    Equal models get equal constants: the generator is seeded by a node's own seed and its outputs' names.
    """
    return has_random(model) and apply_rules(model, RANDOM)


def _generator(node: NodeProto) -> np.random.Generator:
    seed = np.float32(attributes(node).get("seed", 0.0)).view(np.uint32)
    return np.random.default_rng([int(seed), *node.output[0].encode()])


def _shape(node: NodeProto, to: Rewriter) -> tuple[int, ...] | None:
    given = attributes(node).get("shape")
    shape = tuple(given) if given is not None else to.shape(input_of(node, 0))
    return None if shape is None or math.prod(shape) > DRAWN_ELEMENTS else shape


def _constant(name: str, to: Rewriter) -> np.ndarray | None:
    """A constant's value; nothing is folded yet, so that it may come from a Constant node."""
    producer = to.producers.get(name)
    if producer is not None and producer.op_type == "Constant":
        tensor = attributes(producer).get("value")
        return None if tensor is None else numpy_helper.to_array(tensor)
    return to.facts.constant(name)


def _drawn(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: RandomNormal, RandomUniform and the two that take their shape from a value."""
    values, shape = attributes(node), _shape(node, to)
    if shape is None:
        return None
    kind = values.get("dtype", 0)
    if not kind and node.input:
        kind = to.facts.types.get(node.input[0], 0)
    generator = _generator(node)
    if "Normal" in node.op_type:
        drawn = generator.normal(values.get("mean", 0.0), values.get("scale", 1.0), shape)
    else:
        drawn = generator.uniform(values.get("low", 0.0), values.get("high", 1.0), shape)
    made = to.constant(drawn, np.float32)
    return [made if kind in (0, TensorProto.FLOAT) else to.op("Cast", made, to=kind)]


def _bernoulli(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: true where a uniform number is below the probability."""
    shape = _shape(node, to)
    kind = attributes(node).get("dtype", 0) or to.facts.types.get(node.input[0], 0)
    if shape is None or not kind:
        return None
    limits = to.constant(_generator(node).uniform(size=shape), np.float32)
    hit = to.op("Less", limits, to.cast(node.input[0], np.float32))
    return [to.op("Cast", hit, to=kind)]


def _training_dropout(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: a Dropout in training mode keeps what it would keep in one of its runs."""
    training = _constant(input_of(node, 2), to)
    ratio = _constant(input_of(node, 1), to) if input_of(node, 1) else np.float32(0.5)
    shape, dtype = _shape(node, to), to.dtype(node.input[0])
    if training is None or not training.all() or ratio is None or shape is None or dtype is None:
        return None
    dropped = float(np.asarray(ratio).reshape(()))
    if dropped == 0:
        return None
    kept = _generator(node).uniform(size=shape) >= dropped
    scale = to.constant(kept / (1 - dropped) if dropped < 1 else np.zeros(shape), dtype)
    return [to.op("Mul", node.input[0], scale), to.constant(kept, np.bool_)][: len(node.output)]


RANDOM: dict[str, Rule] = {
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"), _drawn
    ),
    "Bernoulli": _bernoulli,
    "Dropout": _training_dropout,
}
