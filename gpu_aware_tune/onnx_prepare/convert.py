"""Conversions of a whole ONNX model by other tools: optimisation, float16."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.onnx_prepare.facts import uses_types, walk
from gpu_aware_tune.onnx_prepare.order import sort_nodes
from gpu_aware_tune.onnx_prepare.shapes import drop_inputs

log = logging.getLogger(__name__)

WEIGHT_BYTES = 1024  # larger initializers stay out of the graph while it is rewritten


def detach_weights(model: ModelProto) -> tuple[ModelProto, list[TensorProto]]:
    """Take the large initializers out, leaving typed graph inputs in their place.

    Rewriting and shape inference serialize the whole model each time: cheap without weights. They are
    copies of their own, as a part keeps the whole model that it is of in memory.
    """
    weights = []
    for tensor in filter(_is_large, model.graph.initializer):
        alone = TensorProto()
        alone.CopyFrom(tensor)
        weights.append(alone)
    return skeleton_of(model), weights


def skeleton_of(model: ModelProto) -> ModelProto:
    """The model with typed graph inputs in place of its large initializers."""
    graph = model.graph
    skeleton = ModelProto()
    skeleton.ir_version = model.ir_version
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    skeleton.graph.name = graph.name
    skeleton.graph.node.extend(graph.node)
    skeleton.graph.input.extend(graph.input)
    skeleton.graph.output.extend(graph.output)
    for tensor in graph.initializer:
        if not _is_large(tensor):
            skeleton.graph.initializer.append(tensor)
            continue
        skeleton.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    return skeleton


def _is_large(tensor: TensorProto) -> bool:
    elements = int(np.prod(tensor.dims, dtype=np.int64))
    return len(tensor.raw_data) > WEIGHT_BYTES or elements > WEIGHT_BYTES // 4


def attach_weights(model: ModelProto, weights: list[TensorProto]) -> ModelProto:
    """Put detached weights back in place of their graph inputs; `weights` is empty afterwards."""
    drop_unused_weights(model, weights)
    drop_inputs(model, {tensor.name for tensor in weights})
    for tensor in taken(weights):
        model.graph.initializer.append(tensor)
    return model


def taken(weights: list[TensorProto]) -> Iterator[TensorProto]:
    """Each of the weights, which leave the list one by one, so that none is in memory twice for long."""
    weights.reverse()
    while weights:
        yield weights.pop()


def drop_unused_weights(model: ModelProto, weights: list[TensorProto]) -> None:
    """Remove detached weights that nothing reads, and their graph inputs."""
    used = {name for node in walk(model.graph) for name in node.input}
    used |= {value.name for value in model.graph.output}
    drop_inputs(model, {tensor.name for tensor in weights} - used)
    weights[:] = [tensor for tensor in weights if tensor.name in used]


def optimised_by_onnxruntime(
    model: ModelProto, weights: list[TensorProto]
) -> tuple[ModelProto, list[TensorProto]]:
    """Fold constants and batch norms with ONNX Runtime, or return the model where it cannot.

    Weights travel in a file of their own, there and back, and are not in memory here meanwhile, where ONNX
    Runtime needs more than the model's size.
    Not for models with half-precision values: on a CPU ONNX Runtime surrounds their operators with
    casts to float32, and writes those back.

    Args:
        model: without its large weights, see `detach_weights`; left as it is.
        weights: those; the list is empty afterwards.

    Returns:
        Likewise a model and its large weights.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        return model, weights
    with tempfile.TemporaryDirectory(prefix="gpu-aware-tune-") as name:
        folder = Path(name)
        _write_apart(model, weights, folder)
        prepared = str(folder / "prepared.onnx")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimised.bin"
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(WEIGHT_BYTES)
        )
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            providers = ["CPUExecutionProvider"]
            ort.InferenceSession(prepared, options, providers=providers)
            optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
        except Exception as error:  # its exception types are not public
            log.debug("ONNX Runtime: %s", error)
            return model, _read_external(onnx.load(prepared, load_external_data=False), folder)
        return _read_apart(optimised, folder)


def _write_apart(model: ModelProto, weights: list[TensorProto], folder: Path) -> None:
    """Write prepared.onnx, its large weights in prepared.bin; `weights` is empty afterwards."""
    graph = ModelProto()
    graph.CopyFrom(model)
    drop_inputs(graph, {tensor.name for tensor in weights})
    with (folder / "prepared.bin").open("wb") as out:
        for tensor in taken(weights):
            content = content_of(tensor)
            place = graph.graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
            )
            place.data_location = TensorProto.EXTERNAL
            facts = {"location": "prepared.bin", "offset": out.tell(), "length": len(content)}
            for key, value in facts.items():
                place.external_data.add(key=key, value=str(value))
            out.write(content)
    (folder / "prepared.onnx").write_bytes(graph.SerializeToString())


def content_of(tensor: TensorProto) -> bytes:
    """A tensor's values as bytes, however it holds them."""
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data


def _read_external(model: ModelProto, folder: Path) -> list[TensorProto]:
    """The initializers whose values are in files of a folder, with their values."""
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        with (folder / entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset", 0)))
            alone = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            alone.raw_data = file.read(int(entries["length"]))
        found.append(alone)
    return found


def _read_apart(model: ModelProto, folder: Path) -> tuple[ModelProto, list[TensorProto]]:
    """The optimised model without its large weights, and those."""
    found = _read_external(model, folder)
    small = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    skeleton, others = detach_weights(_with_initializers(model, small))
    skeleton.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in found
    )
    return skeleton, [*found, *others]


def _with_initializers(model: ModelProto, tensors: list[TensorProto]) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(model)
    del made.graph.initializer[:]
    made.graph.initializer.extend(tensors)
    return made


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
