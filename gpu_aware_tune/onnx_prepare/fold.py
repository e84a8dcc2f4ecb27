"""Folds what is constant in an ONNX graph with static shapes, small values first of all.

Shape arithmetic must be gone before operators are expanded or imported. ONNX Runtime folds too, but
not every model (newest operator sets, float16); this needs nothing but the `onnx` package.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from gpu_aware_tune.onnx_prepare.branches import take_branches
from gpu_aware_tune.onnx_prepare.facts import Facts, infer_shapes, walk
from gpu_aware_tune.onnx_prepare.half import IN_FLOAT32, PRODUCTS

FOLDED_ELEMENTS = 1 << 20  # larger results are left to those who fold faster
LARGEST_VIEW = 1 << 40  # NumPy cannot count the bytes of larger ones
ROUNDS = 12
FOLDED_SHAPE = 64  # elements of what says how large a result is
# Their results have as many elements as values say.
GROWING = {"ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Tile"}
SHAPE_ONLY = {"Shape", "Size", "EyeLike"}  # they read their input's shape, not its values
# Random, or (the last two) wrong in the reference: it sums without taking absolute values, and
# resizes to a length that is not rounded.
NOT_FOLDED = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "LpNormalization",
    "Resize",
}


def fold(model: ModelProto) -> ModelProto:
    """Return the model with everything computed that small constants and shapes decide."""
    for _ in range(ROUNDS):
        folded = _fold_once(model)
        if not take_branches(model) and not folded:
            break
        drop_unused(model)
    return model


def _fold_once(model: ModelProto) -> bool:
    facts = Facts(model)
    graph = model.graph
    outputs = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    folded = False
    for node in graph.node:
        results = _results(node, facts, model)
        if results is None:
            kept.append(node)
            continue
        for name, array in results.items():
            facts.constants[name] = array
            facts.shapes[name] = array.shape
            if name in outputs:  # a graph output needs a node
                tensor = numpy_helper.from_array(array, name + "_value")
                kept.append(onnx.helper.make_node("Constant", [], [name], value=tensor))
            else:
                graph.initializer.append(numpy_helper.from_array(array, name))
        folded = folded or node.op_type != "Constant" or not set(node.output) & outputs
    del graph.node[:]
    graph.node.extend(kept)
    return folded


def _results(node: NodeProto, facts: Facts, model: ModelProto) -> Mapping[str, np.ndarray] | None:
    """Return the values of a node's outputs where they are constant and small."""
    if node.domain or node.op_type in NOT_FOLDED:
        return None
    if node.op_type in IN_FLOAT32 | PRODUCTS and any(facts.is_half(name) for name in node.input):
        return None  # NumPy sums in half precision
    names = [name for name in node.output if name]
    shapes = [facts.shapes.get(name) for name in names]
    if all(shape is not None and 0 in shape for shape in shapes):  # nothing in it to compute
        dtypes = [facts.types.get(name, 0) for name in names]
        if all(dtypes):
            return {
                name: np.zeros(shape or (), onnx.helper.tensor_dtype_to_np_dtype(dtype))
                for name, shape, dtype in zip(names, shapes, dtypes, strict=True)
            }
    if any(shape is not None and math.prod(shape) > FOLDED_ELEMENTS for shape in shapes):
        return None
    if any(facts.types.get(name) == TensorProto.STRING for name in node.input):
        return None  # what works on text is refused later; a regular expression may never end
    if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
        return None
    feeds: dict[str, np.ndarray] = {}
    for position, name in enumerate(node.input):
        value = _known(name, position, node, facts)
        if value is None and name:
            return None
        if value is not None:
            feeds[name] = value
    return _evaluate(node, feeds, facts, model)


def _known(name: str, position: int, node: NodeProto, facts: Facts) -> np.ndarray | None:
    """Return an input's value, or any value of its type and shape where no more is asked."""
    value = facts.constant(name)
    if value is not None:
        return value
    shape = facts.shapes.get(name)
    if node.op_type == "CastLike" and position == 1:
        shape = ()
    elif shape is None or (node.op_type not in SHAPE_ONLY and 0 not in shape):
        return None
    if not facts.types.get(name):
        return None
    if math.prod(shape) > LARGEST_VIEW:
        return None
    dtype = onnx.helper.tensor_dtype_to_np_dtype(facts.types[name])
    return np.broadcast_to(np.zeros((), dtype), shape)


def _evaluate(
    node: NodeProto, feeds: Mapping[str, np.ndarray], facts: Facts, model: ModelProto
) -> dict[str, np.ndarray] | None:
    names = [name for name in node.output if name]
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in feeds.items()
    ]
    graph = onnx.helper.make_graph(
        [node], "node", inputs, [onnx.ValueInfoProto(name=name) for name in names]
    )
    single = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    if node.op_type in GROWING and _elements(single, feeds) > FOLDED_ELEMENTS:
        return None
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            values = ReferenceEvaluator(single).run(None, dict(feeds))
    except Exception:  # the reference lacks or refuses it; others may not
        return None
    arrays = [np.asarray(value) for value in values]
    if any(array.dtype == object or array.size > FOLDED_ELEMENTS for array in arrays):
        return None
    return dict(zip(names, arrays, strict=True))


def _elements(single: ModelProto, feeds: Mapping[str, np.ndarray]) -> int:
    """Return how many elements the largest output of a node has, as far as its inputs tell."""
    known = ModelProto()
    known.CopyFrom(single)
    small = {name: value for name, value in feeds.items() if value.size <= FOLDED_SHAPE}
    known.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in small.items()
    )
    outputs = infer_shapes(known).graph.output
    extents = [[dim.dim_value for dim in o.type.tensor_type.shape.dim] for o in outputs]
    return max((math.prod(extent) for extent in extents), default=0)


def drop_unused(model: ModelProto) -> None:
    """Remove nodes and initializers that no graph output needs."""
    graph = model.graph
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        needed.update(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                needed.update(name for inner in walk(attribute.g) for name in inner.input)
                needed.update(value.name for value in attribute.g.output)
    kept.reverse()
    if len(kept) != len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    if len(initializers) != len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(initializers)
