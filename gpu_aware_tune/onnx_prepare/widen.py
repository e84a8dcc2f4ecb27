"""A copy of an ONNX model in float32, for those who cannot compute in half precision."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, numpy_helper

from gpu_aware_tune.onnx_prepare.facts import walk

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPES = ("to", "dtype", "stash_type", "output_dtype")  # attributes that name a type


def widened(model: ModelProto) -> ModelProto:
    """Return the model with float32 in place of float16 and bfloat16; `model` is used up.

    Values are the same, sums and products more exact. Casts to half precision become casts to
    float32: what they round away is kept.
    """
    _widen_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            _widen_attributes(node.attribute)
    return model


def _widen_graph(graph: GraphProto) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in _HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in walk(graph):
        _widen_attributes(node.attribute)


def _widen_attributes(attributes: list[AttributeProto]) -> None:
    for attribute in attributes:
        if attribute.type == AttributeProto.TENSOR:
            _widen_tensor(attribute.t)
        elif attribute.type == AttributeProto.GRAPH:
            _widen_graph(attribute.g)
        elif attribute.name in _TYPES and attribute.i in _HALF:
            attribute.i = TensorProto.FLOAT


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in _HALF:
        array = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
