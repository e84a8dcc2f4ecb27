"""Requests and answers of the protocol as gRPC messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_aware_tune.errors import UserError, one_line
from gpu_aware_tune.serving.grpc_messages import MESSAGES
from gpu_aware_tune.serving.interface import ModelFacts
from gpu_aware_tune.serving.v2 import (
    InferRequest,
    InputTensor,
    OutputChoice,
    TooLarge,
    datatype_of,
    raw_bytes,
    region_part,
    timeout_of,
)

Message = Any

# Which of a message's lists holds the values of a datatype.
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip
WIRE_TYPES = {
    "bool_contents": np.bool_, "int_contents": np.int32, "int64_contents": np.int64,
    "uint_contents": np.uint32, "uint64_contents": np.uint64,
    "fp32_contents": np.float32, "fp64_contents": np.float64,
}  # fmt: skip


def read_message(request: Message, max_typed_bytes: int) -> InferRequest:
    """The request that a message holds.

    Args:
        request: the message.
        max_typed_bytes: of one input's typed contents.

    Raises:
        TooLarge: there are more.
        UserError: what is wrong with it.
    """
    raw = list(request.raw_input_contents)
    tensors = []
    used = 0
    for entry in request.inputs:
        where = f"input {one_line(entry.name, 80)}"
        part = region_part(parameters_of(entry.parameters), where)
        data = None
        if raw and part is None:
            if used == len(raw):
                raise UserError(f"{where} has no raw_input_contents")
            data = raw[used]
            used += 1
        values = _values(entry, where, max_typed_bytes)
        if raw and values is not None:
            raise UserError(f"{where}: contents beside raw_input_contents")
        if data is None and part is None and values is None:
            raise UserError(f"{where}: no data")
        tensors.append(
            InputTensor(entry.name, entry.datatype, tuple(entry.shape), data, values, part)
        )
    if used != len(raw):
        raise UserError(f"{len(raw)} raw_input_contents for {used} inputs without shared memory")
    outputs = []
    for entry in request.outputs:
        where = f"output {one_line(entry.name, 80)}"
        parameters = parameters_of(entry.parameters)
        if parameters.get("classification"):
            raise UserError(f"{where}: the classification extension is not supported")
        outputs.append(OutputChoice(entry.name, True, region_part(parameters, where)))
    timeout = timeout_of(parameters_of(request.parameters).get("timeout"))
    return InferRequest(tuple(tensors), tuple(outputs) or None, request.id, timeout, True)


def _values(entry: Message, where: str, max_bytes: int) -> np.ndarray | None:
    """The typed contents of an input, if it has any."""
    if not entry.HasField("contents"):
        return None
    filled = [field.name for field, _ in entry.contents.ListFields()]
    if not filled:
        return None
    expected = CONTENTS.get(entry.datatype)
    if filled != [expected]:
        wanted = expected or "raw_input_contents"
        datatype = one_line(entry.datatype, 40)
        raise UserError(f"{where}: {datatype} in {', '.join(filled)}, not {wanted}")
    size = entry.contents.ByteSize()
    if size > max_bytes:
        raise TooLarge(f"{where}: {size} bytes of {expected}; use raw_input_contents")
    values = getattr(entry.contents, filled[0])
    return np.fromiter(values, WIRE_TYPES[filled[0]], len(values))


def parameters_of(found: Mapping[str, Message]) -> dict[str, Any]:
    """Parameters as Python values; those that are not set are left out."""
    values = {}
    for name, parameter in found.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None:
            values[name] = getattr(parameter, choice)
    return values


def write_message(
    model: ModelFacts, request: InferRequest, outputs: list[tuple[OutputChoice, np.ndarray]]
) -> Message:
    """The message that answers a request; every output has an entry of raw contents."""
    response = MESSAGES["ModelInferResponse"](
        model_name=model.name, model_version=model.version, id=request.id
    )
    for choice, array in outputs:
        entry = response.outputs.add(
            name=choice.name, datatype=datatype_of(array.dtype), shape=array.shape
        )
        if choice.part is None:
            response.raw_output_contents.append(raw_bytes(array).tobytes())
            continue
        response.raw_output_contents.append(b"")
        entry.parameters["shared_memory_region"].string_param = choice.part.region
        entry.parameters["shared_memory_offset"].int64_param = choice.part.offset
        entry.parameters["shared_memory_byte_size"].int64_param = array.nbytes
    return response
