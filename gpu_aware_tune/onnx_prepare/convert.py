"""Conversions of a whole ONNX model by other tools: optimisation, float16."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.onnx_prepare.facts import uses_types, walk
from gpu_aware_tune.onnx_prepare.order import sort_nodes

log = logging.getLogger(__name__)

WEIGHT_BYTES = 1024  # larger initializers stay out of the graph while it is rewritten


def detach_weights(model: ModelProto) -> tuple[ModelProto, list[TensorProto]]:
    """Take the large initializers out, leaving typed graph inputs in their place.

    Rewriting and shape inference serialize the whole model each time: cheap without weights.
    """
    graph = model.graph
    weights: list[TensorProto] = []
    small: list[TensorProto] = []
    for tensor in graph.initializer:
        elements = int(np.prod(tensor.dims, dtype=np.int64))
        is_large = len(tensor.raw_data) > WEIGHT_BYTES or elements > WEIGHT_BYTES // 4
        (weights if is_large else small).append(tensor)
    skeleton = ModelProto()
    kept = list(graph.node), list(graph.input), list(graph.output)
    skeleton.ir_version = model.ir_version
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    skeleton.graph.name = graph.name
    skeleton.graph.node.extend(kept[0])
    skeleton.graph.input.extend(kept[1])
    skeleton.graph.output.extend(kept[2])
    skeleton.graph.initializer.extend(small)
    skeleton.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in weights
    )
    return skeleton, weights


def attach_weights(model: ModelProto, weights: list[TensorProto]) -> ModelProto:
    """Put detached weights back in place of their graph inputs."""
    names = {tensor.name for tensor in weights}
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    used = {name for node in walk(model.graph) for name in node.input}
    used |= {value.name for value in model.graph.output}
    model.graph.initializer.extend(tensor for tensor in weights if tensor.name in used)
    return model


def optimised_by_onnxruntime(model: ModelProto) -> ModelProto:
    """Fold constants and batch norms with ONNX Runtime, or return the model where it cannot.

    The model goes there in a file: ONNX Runtime needs several times its size, without another copy.
    Not for models with half-precision values: on a CPU ONNX Runtime surrounds their operators with
    casts to float32, and writes those back.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        return model
    with tempfile.TemporaryDirectory(prefix="gpu-aware-tune-") as folder:
        source = Path(folder) / "prepared.onnx"
        source.write_bytes(model.SerializeToString())
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            providers = ["CPUExecutionProvider"]
            ort.InferenceSession(str(source), options, providers=providers)
            optimised: ModelProto = onnx.load(options.optimized_model_filepath)
        except Exception as error:  # its exception types are not public
            log.debug("ONNX Runtime: %s", error)
            return model
    return optimised


def to_float16(model: ModelProto) -> ModelProto:
    """Convert float32 values to float16; graph inputs and outputs keep their types."""
    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ImportError:
        raise SetupError("dtype float16 needs ONNX Runtime: pip install onnxruntime") from None
    if not uses_types(model, {TensorProto.FLOAT}):
        raise UserError("dtype float16: the model has no float32 values to convert")
    converted: ModelProto = convert_float_to_float16(
        model, keep_io_types=True, max_finite_val=float(np.finfo(np.float16).max)
    )
    sort_nodes(converted.graph)  # the converter appends its casts
    return converted
