"""Reads an ONNX file, or says in one line why it cannot be read."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto

from gpu_aware_tune.errors import UserError

PROTOBUF_LIMIT_BYTES = 2**31 - 1


def read_model(path: Path) -> ModelProto:
    """Read an ONNX file with its external data, or say in one line why it cannot be read."""
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
    if len(data) > PROTOBUF_LIMIT_BYTES:
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
    _load_external_data(model, path)
    return model


def _load_external_data(model: ModelProto, path: Path) -> None:
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, onnx.checker.ValidationError, ValueError) as error:
        wanted = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        missing = sorted(name for name in wanted if not (path.parent / name).is_file())
        if missing:
            text = f"its weights are in {', '.join(missing)}, which is not in {path.parent}"
        else:
            text = f"its external data cannot be read: {str(error).splitlines()[0]}"
        raise UserError(f"{path}: {text}; put the file next to the model") from None
    total = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if total > PROTOBUF_LIMIT_BYTES:
        raise UserError(f"{path}: {total / 2**30:.1f} GiB of weights; models up to 2 GiB are taken")
