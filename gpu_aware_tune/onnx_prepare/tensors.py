"""Brings the tensors of a model into it: from files beside it, and from their sparse form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, SparseTensorProto, TensorProto, numpy_helper

from gpu_aware_tune.errors import UserError, one_line
from gpu_aware_tune.onnx_prepare.facts import bodies

LIMIT_BYTES = 2**31 - 1  # what a protobuf message can hold


def load_external_data(model: ModelProto, path: Path) -> None:
    """Read the tensors that are stored in files beside the model.

    ONNX's own loader refuses symbolic links, of which a Hugging Face cache consists. Here the file
    may be one, but its location must be relative and must not lead out of the model's folder.

    Raises:
        UserError: a file is missing, not allowed or too short.
    """
    tensors = [tensor for tensor in _tensors(model) if tensor.data_location == TensorProto.EXTERNAL]
    total = sum(_size(tensor) for tensor in tensors)
    total += sum(len(tensor.raw_data) for tensor in _tensors(model))
    if total > LIMIT_BYTES:
        raise UserError(f"{path}: {total / 2**30:.1f} GiB of weights; models up to 2 GiB are taken")
    for tensor in tensors:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        shown = one_line(location, 80)
        try:
            file = _allowed(location, path.parent)
            if file is None:
                raise UserError(
                    f"{path}: its external data is at {shown!r}, which is not beside the model; "
                    "save it again with its data in the same folder"
                )
            tensor.raw_data = _part(file, entries, _size(tensor))
        except FileNotFoundError:
            raise UserError(
                f"{path}: its weights are in {shown}, which is not in {path.parent}; "
                "put the file next to the model"
            ) from None
        except (OSError, ValueError) as error:  # also a path that no file can have
            reason = error.strerror if isinstance(error, OSError) else one_line(error, 80)
            raise UserError(
                f"{path}: its external data {shown} cannot be read: {reason}; get it again"
            ) from None
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT


def _size(tensor: TensorProto) -> int:
    """Return the bytes of a tensor's values."""
    elements = math.prod(tensor.dims)
    bits = 4 if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) else 0
    if not bits:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return (elements * bits + 7) // 8


def _allowed(location: str, folder: Path) -> Path | None:
    parts = PurePosixPath(location).parts
    is_absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    if not parts or is_absolute or ".." in parts or ".." in PureWindowsPath(location).parts:
        return None
    file = folder / location
    inside = file.parent.resolve().is_relative_to(folder.resolve())
    return file if inside else None


def _part(file: Path, entries: dict[str, str], size: int) -> bytes:
    """Read a tensor's bytes; `entries` may have an offset and a length."""
    offset, length = (int(entries.get(key) or 0) for key in ("offset", "length"))
    if not file.exists():
        raise FileNotFoundError
    if not file.is_file():
        raise ValueError("it is not a regular file")
    if offset < 0 or (length and length != size) or file.stat().st_size < offset + size:
        raise ValueError("it is too short, or for another model")
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from _tensors_in(model.graph)
    for function in model.functions:
        for node in function.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)


def _tensors_in(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
        for body in bodies(node):
            yield from _tensors_in(body)


def make_dense(graph: GraphProto) -> None:
    """Turn sparse initializers and constants into dense ones, inside nodes too.

    Raises:
        UserError: indices do not fit, or the dense tensor is too large.
    """
    graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
    graph.ClearField("sparse_initializer")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                dense = onnx.helper.make_attribute("value", _dense(attribute.sparse_tensor))
                attribute.CopyFrom(dense)
        for body in bodies(node):
            make_dense(body)


def _dense(sparse: SparseTensorProto) -> TensorProto:
    name, shape = sparse.values.name, list(sparse.dims)
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    shown = one_line(repr(name), 80)
    if math.prod(shape) * values.itemsize > LIMIT_BYTES:
        raise UserError(f"the sparse tensor {shown} has more than 2 GiB as a dense one")
    dense = np.zeros(shape, values.dtype)
    try:
        if indices.ndim == 2:
            indices = np.ravel_multi_index(tuple(indices.T), tuple(shape))
        dense.reshape(-1)[indices] = values
    except (IndexError, ValueError):
        raise UserError(f"the sparse tensor {shown} has indices outside its shape") from None
    return numpy_helper.from_array(dense, name)
