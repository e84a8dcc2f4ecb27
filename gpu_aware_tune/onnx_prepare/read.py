"""Reads an ONNX file, or says in one line why it cannot be read."""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import ModelProto

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.onnx_prepare.limits import (
    check_ends,
    check_equations,
    check_functions,
    check_nodes,
    check_sizes,
    check_text,
)
from gpu_aware_tune.onnx_prepare.order import sort_nodes, sort_top_k
from gpu_aware_tune.onnx_prepare.tensors import LIMIT_BYTES, load_external_data, make_dense


def read_model(path: Path) -> ModelProto:
    """Read an ONNX file: with its external data, dense, its nodes in order.

    Raises:
        UserError: it cannot be read; one line says why.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of an ONNX model") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the path of an ONNX model") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not data:
        raise UserError(f"{path}: the file is empty; give the path of an ONNX model")
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the model; run `git lfs pull` first")
    if len(data) > LIMIT_BYTES:
        raise UserError(f"{path}: larger than 2 GiB; save it with external data and split it")
    model = ModelProto()
    looks_like_onnx = data[0] == 0x08 and data[1:2] < b"\x20"  # field 1, a small IR version
    try:
        model.ParseFromString(data)
    except DecodeError:
        if looks_like_onnx:
            raise UserError(f"{path}: the file is truncated or damaged; get it again") from None
        raise UserError(f"{path}: not an ONNX model; export the network to ONNX first") from None
    if not model.graph.output:
        if looks_like_onnx:
            raise UserError(f"{path}: the file is truncated or damaged: it has no outputs")
        raise UserError(f"{path}: not an ONNX model; export the network to ONNX first")
    if not model.opset_import:
        raise UserError(f"{path}: the file is truncated or damaged: it names no operator set")
    check_text(model)
    check_ends(model)
    check_functions(model)
    check_equations(model)
    check_nodes(model)
    load_external_data(model, path)
    make_dense(model.graph)
    sort_nodes(model.graph)
    sort_top_k(model.graph)
    check_sizes(model)
    return model
