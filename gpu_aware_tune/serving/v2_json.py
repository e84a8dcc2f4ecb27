"""Requests and answers of the protocol as HTTP has them: JSON, and binary data behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.errors import UserError, one_line
from gpu_aware_tune.serving.v2 import (
    InferRequest,
    InputTensor,
    OutputChoice,
    TooLarge,
    datatype_of,
    json_values,
    raw_bytes,
    region_part,
    timeout_of,
)

if TYPE_CHECKING:
    import numpy as np

    from gpu_aware_tune.serving.interface import ModelFacts

_JSON_TYPES: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}


@dataclass(frozen=True, slots=True)
class AnswerBody:
    """The body of an answer, and how long its JSON is where binary data follows it."""

    body: bytes
    header_length: int | None


def parse_object(text: memoryview | bytes, max_bytes: int) -> dict[str, Any]:
    """A JSON object of at most so many bytes.

    Raises:
        TooLarge: it is longer.
        UserError: it is no JSON, or no object.
    """
    if len(text) > max_bytes:
        raise TooLarge(f"{len(text)} bytes of JSON; {max_bytes} are taken: send binary data")
    try:
        found = json.loads(str(text, "utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise UserError("the request's JSON is not UTF-8") from None
    except RecursionError:
        raise UserError("the request's JSON is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"the request is not JSON: {one_line(error, 120)}") from None
    if type(found) is not dict:
        raise UserError("the request's JSON is not an object")
    return found


def _refuse_constant(name: str) -> float:
    raise UserError(f"{name} is not JSON: send such values as binary data")


def split_body(body: memoryview, header_length: str | None) -> tuple[memoryview, memoryview]:
    """The JSON of a body and the binary data behind it.

    Args:
        body: the whole body.
        header_length: the header `Inference-Header-Content-Length`, if there is one.
    """
    if header_length is None:
        return body, body[:0]
    if not re.fullmatch(r"[0-9]{1,15}", header_length) or int(header_length) > len(body):
        raise UserError(
            "Inference-Header-Content-Length is not a number of bytes of the body"
            f" ({one_line(header_length, 40)}; the body has {len(body)})"
        )
    length = int(header_length)
    return body[:length], body[length:]


def read_request(
    body: memoryview, header_length: str | None, model: ModelFacts, max_json_bytes: int
) -> InferRequest:
    """The request that a body holds; its tensors are views of the body.

    Raises:
        UserError: what is wrong with it.
    """
    header, binary = split_body(body, header_length)
    if header_length is not None and not len(header):
        return _raw_request(binary, model)
    facts = parse_object(header, max_json_bytes)
    parameters = _get(facts, "parameters", dict, "the request", {})
    tensors = []
    for entry in _get(facts, "inputs", list, "the request"):
        tensor, used = _read_input(entry, binary)
        binary = binary[used:]
        tensors.append(tensor)
    if len(binary):
        raise UserError(f"{len(binary)} bytes of binary data belong to no input")
    default = _get(parameters, "binary_data_output", bool, "parameters", False)
    outputs = _get(facts, "outputs", list, "the request", [])
    return InferRequest(
        tuple(tensors),
        tuple(_read_output(entry, default) for entry in outputs) or None,
        _get(facts, "id", str, "the request", ""),
        timeout_of(parameters.get("timeout")),
        default,
    )


def _raw_request(binary: memoryview, model: ModelFacts) -> InferRequest:
    """A body that is the one input of a model and nothing else."""
    spec = model.inputs[0]
    shape = (1, *spec.shape[1:]) if model.max_batch else spec.shape
    if len(model.inputs) != 1 or -1 in shape:
        raise UserError(f"{model.name}: a raw binary request is for one input of fixed shape")
    return InferRequest((InputTensor(spec.name, datatype_of(spec.dtype), shape, raw=binary),))


def _read_input(entry: object, binary: memoryview) -> tuple[InputTensor, int]:
    if type(entry) is not dict:
        raise UserError("an input is not an object")
    name = _get(entry, "name", str, "an input")
    where = f"input {one_line(name, 80)}"
    parameters = _get(entry, "parameters", dict, where, {})
    shape = _get(entry, "shape", list, where)
    if not set(map(type, shape)) <= {int}:
        raise UserError(f"{where}: shape is not a list of integers")
    size = parameters.get("binary_data_size")
    if size is not None and (type(size) is not int or not 0 <= size <= len(binary)):
        raise UserError(f"{where}: binary_data_size is not within the {len(binary)} bytes left")
    tensor = InputTensor(
        name,
        _get(entry, "datatype", str, where),
        tuple(shape),
        None if size is None else binary[:size],
        _get(entry, "data", list, where, None),
        region_part(parameters, where),
    )
    return tensor, size or 0


def _read_output(entry: object, default: bool) -> OutputChoice:
    if type(entry) is not dict:
        raise UserError("an output is not an object")
    name = _get(entry, "name", str, "an output")
    where = f"output {one_line(name, 80)}"
    parameters = _get(entry, "parameters", dict, where, {})
    if parameters.get("classification"):
        raise UserError(f"{where}: the classification extension is not supported")
    binary = _get(parameters, "binary_data", bool, where, default)
    return OutputChoice(name, binary, region_part(parameters, where))


_REQUIRED: Any = object()


def _get(facts: dict[str, Any], key: str, kind: type, where: str, default: Any = _REQUIRED) -> Any:
    """A field of a JSON object, checked for its type."""
    value = facts.get(key, default)
    if value is _REQUIRED:
        raise UserError(f"{where}: {key} is missing")
    if value is not default and type(value) is not kind:
        raise UserError(f"{where}: {key} is not {_JSON_TYPES[kind]}")
    return value


def write_answer(
    model: ModelFacts,
    request: InferRequest,
    outputs: Sequence[tuple[OutputChoice, np.ndarray]],
) -> AnswerBody:
    """The body that answers a request.

    Raises:
        UserError: values that JSON cannot express.
    """
    parts: list[memoryview] = []
    described = []
    for choice, array in outputs:
        facts: dict[str, Any] = {
            "name": choice.name,
            "datatype": datatype_of(array.dtype),
            "shape": list(array.shape),
        }
        if choice.part is not None:
            facts["parameters"] = {
                "shared_memory_region": choice.part.region,
                "shared_memory_offset": choice.part.offset,
                "shared_memory_byte_size": array.nbytes,
            }
        elif choice.binary:
            facts["parameters"] = {"binary_data_size": array.nbytes}
            parts.append(raw_bytes(array))
        else:
            facts["data"] = json_values(choice.name, array)
        described.append(facts)
    answer = {"model_name": model.name, "model_version": model.version, "outputs": described}
    if request.id:
        answer["id"] = request.id
    header = json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
    if not any(choice.binary and choice.part is None for choice, _ in outputs):
        return AnswerBody(header, None)
    return AnswerBody(b"".join([header, *parts]), len(header))
