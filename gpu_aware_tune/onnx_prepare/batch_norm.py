"""Turns the batch norms that no convolution could take in into one multiplication and one addition.

TVM would fold their parameters too, but compiles a kernel for every expression and shape in them.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from gpu_aware_tune.onnx_prepare.facts import Facts, attributes


def fold_batch_norms(model: ModelProto) -> ModelProto:
    """Replace batch norms with constant parameters; the weights must be in the graph."""
    graph = model.graph
    if not any(node.op_type == "BatchNormalization" for node in graph.node):
        return model
    facts = Facts(model)
    nodes: list[NodeProto] = []
    for node in graph.node:
        folded = _folded(node, facts) if node.op_type == "BatchNormalization" else None
        if folded is None:
            nodes.append(node)
            continue
        nodes.extend(folded[0])
        graph.initializer.extend(folded[1])
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _folded(node: NodeProto, facts: Facts) -> tuple[list[NodeProto], list[TensorProto]] | None:
    values = attributes(node)
    data, output = node.input[0], node.output[0]
    parameters = [facts.constant(name) for name in node.input[1:5]]
    if values.get("training_mode", 0) or len(node.output) > 1 or not facts.types.get(data):
        return None
    shape = facts.shapes.get(data)
    if shape is None or any(parameter is None for parameter in parameters):
        return None
    scale, bias, mean, var = (np.asarray(parameter, np.float64) for parameter in parameters)
    factor = scale / np.sqrt(var + values.get("epsilon", 1e-5))
    dtype = helper.tensor_dtype_to_np_dtype(facts.types[data])
    along = [-1] + [1] * (len(shape) - 2)
    tensors = [
        numpy_helper.from_array(factor.astype(dtype).reshape(along), f"{output}/factor"),
        numpy_helper.from_array(
            (bias - mean * factor).astype(dtype).reshape(along), f"{output}/offset"
        ),
    ]
    scaled = helper.make_node("Mul", [data, tensors[0].name], [f"{output}/scaled"])
    shifted = helper.make_node("Add", [f"{output}/scaled", tensors[1].name], [output])
    return [scaled, shifted], tensors
