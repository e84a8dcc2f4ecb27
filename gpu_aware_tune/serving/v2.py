"""The open inference protocol v2 apart from any transport: types, tensors, checks, errors.

A transport turns its messages into an `InferRequest`; `input_arrays` checks that against the model.
Nothing here trusts a client: every fault is one of the errors that `describe_error` knows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_aware_tune.errors import TuneError, UserError, one_line
from gpu_aware_tune.serving.requests import Draining, Refused, RunFailed, UnknownModel

if TYPE_CHECKING:
    from gpu_aware_tune.model.importer import TensorSpec
    from gpu_aware_tune.serving.interface import ModelFacts
    from gpu_aware_tune.serving.shared_memory import Regions

log = logging.getLogger(__name__)

# The protocol's names of types, and NumPy's. BYTES (strings) is left out: no tuned model has any.
NUMPY_NAMES = {
    "BOOL": "bool",
    "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "FP16": "float16", "FP32": "float32", "FP64": "float64", "BF16": "bfloat16",
}  # fmt: skip
DATATYPES = {name: datatype for datatype, name in NUMPY_NAMES.items()}
LARGEST_TIMEOUT_US = 2**63 - 1


class TooLarge(UserError):
    """A request of more bytes than are taken."""


class TooSlow(UserError):
    """A client that did not send its request in time."""


class NotAllowed(UserError):
    """Something that the server was not started with."""


@dataclass(frozen=True, slots=True)
class RegionPart:
    """Where a tensor lies in a registered region of shared memory."""

    region: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class InputTensor:
    """An input as a client describes it, its data in exactly one of the last three."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: memoryview | bytes | None = None
    values: Sequence[Any] | np.ndarray | None = None
    part: RegionPart | None = None


@dataclass(frozen=True, slots=True)
class OutputChoice:
    """An output that a client asks for, and where to."""

    name: str
    binary: bool = False
    part: RegionPart | None = None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One request, not yet checked against the model.

    Args:
        inputs: its tensors.
        outputs: those asked for; None for all of them.
        id: comes back with the answer.
        timeout_s: within which an answer is of use; None for the model's latency objective.
        binary: whether outputs that say nothing come as binary data.
    """

    inputs: tuple[InputTensor, ...]
    outputs: tuple[OutputChoice, ...] | None = None
    id: str = ""
    timeout_s: float | None = None
    binary: bool = False


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """How an error is told to a client: the status of each transport, and one line."""

    http: int
    grpc: str
    text: str


# The first class that an error is of decides.
_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (UnknownModel, 404, "NOT_FOUND"),
    (TooLarge, 413, "RESOURCE_EXHAUSTED"),
    (TooSlow, 408, "DEADLINE_EXCEEDED"),
    (NotAllowed, 403, "PERMISSION_DENIED"),
    (UserError, 400, "INVALID_ARGUMENT"),
    (Refused, 429, "RESOURCE_EXHAUSTED"),
    (Draining, 503, "UNAVAILABLE"),
    (RunFailed, 500, "INTERNAL"),
    (TuneError, 500, "INTERNAL"),
)


def describe_error(error: Exception) -> ErrorFacts:
    """What a client is told; what nobody foresaw goes to the log, not to the client."""
    for kind, http, grpc in _STATUS:
        if isinstance(error, kind):
            return ErrorFacts(http, grpc, one_line(error, 500))
    log.error("a request failed", exc_info=error)
    return ErrorFacts(500, "INTERNAL", f"internal error: {type(error).__name__}")


@cache
def numpy_dtype(datatype: str) -> np.dtype[Any]:
    """The NumPy type of a datatype of the protocol."""
    if datatype == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(NUMPY_NAMES[datatype])


def datatype_of(dtype: object) -> str:
    """The protocol's name of a NumPy type."""
    try:
        return DATATYPES[str(dtype)]
    except KeyError:
        raise UserError(f"the protocol has no datatype for {dtype}") from None


def timeout_of(value: object) -> float | None:
    """The parameter `timeout`, microseconds, in seconds; 0 stands for none."""
    if value is None:
        return None
    if type(value) is str and value.isdecimal() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 0 <= value <= LARGEST_TIMEOUT_US:
        raise UserError("parameter timeout: not a number of microseconds from 0 to 2^63 - 1")
    return value / 1e6 if value else None


def region_part(parameters: dict[str, Any], where: str) -> RegionPart | None:
    """The shared memory that parameters of a tensor name, if they do."""
    region = parameters.get("shared_memory_region")
    if region is None:
        return None
    size = parameters.get("shared_memory_byte_size")
    offset = parameters.get("shared_memory_offset", 0)
    if type(region) is not str:
        raise UserError(f"{where}: shared_memory_region is not a name")
    for name, value in (("byte_size", size), ("offset", offset)):
        if type(value) is not int or not 0 <= value < 2**63:
            raise UserError(f"{where}: shared_memory_{name} is not a number of bytes")
    return RegionPart(region, offset, size)  # type: ignore[arg-type]


def input_arrays(
    model: ModelFacts, request: InferRequest, regions: Regions | None
) -> dict[str, np.ndarray]:
    """A request's inputs as arrays, views of its body where that is possible.

    Raises:
        UserError: with what is wrong with the first input that is.
    """
    specs = {spec.name: spec for spec in model.inputs}
    arrays: dict[str, np.ndarray] = {}
    for tensor in request.inputs:
        spec = specs.get(tensor.name)
        if spec is None:
            raise UserError(_no_such("input", tensor.name, model.name, specs))
        if tensor.name in arrays:
            raise UserError(f"input {tensor.name} is given twice")
        arrays[tensor.name] = _to_array(tensor, spec, regions)
    missing = [name for name in specs if name not in arrays]
    if missing:
        raise UserError(f"input {missing[0]} of {model.name} is missing")
    return arrays


def chosen_outputs(model: ModelFacts, request: InferRequest) -> tuple[OutputChoice, ...]:
    """The outputs that a request asks for, in its order; all of them where it names none."""
    names = [spec.name for spec in model.outputs]
    if not request.outputs:
        return tuple(OutputChoice(name, request.binary) for name in names)
    seen = set()
    for choice in request.outputs:
        if choice.name not in names:
            raise UserError(_no_such("output", choice.name, model.name, names))
        if choice.name in seen:
            raise UserError(f"output {choice.name} is asked for twice")
        seen.add(choice.name)
    return request.outputs


def raw_bytes(array: np.ndarray) -> memoryview:
    """An array's values in C order, little-endian; a view where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def json_values(name: str, array: np.ndarray) -> list[Any]:
    """An output's values as JSON has them, flat."""
    flat = array.reshape(-1)
    if flat.dtype.name in ("float16", "bfloat16"):
        flat = flat.astype(np.float32)
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        raise UserError(
            f"output {name} holds NaN or infinity, which JSON cannot express: ask for binary_data"
        )
    return flat.tolist()


def _no_such(kind: str, name: str, model: str, names: Iterable[str]) -> str:
    return f"{model} has no {kind} {one_line(name, 80)}; it has {', '.join(names)}"


def _to_array(tensor: InputTensor, spec: TensorSpec, regions: Regions | None) -> np.ndarray:
    where = f"input {tensor.name}"
    expected = datatype_of(spec.dtype)
    if tensor.datatype != expected:
        reason = " (strings are not supported)" if tensor.datatype == "BYTES" else ""
        raise UserError(
            f"{where}: datatype {expected}, not {one_line(tensor.datatype, 40)}{reason}"
        )
    _check_shape(where, tensor.shape, spec.shape)
    dtype = numpy_dtype(expected)
    size = prod(tensor.shape) * dtype.itemsize
    if size >= 2**62:
        raise UserError(f"{where}: shape {list(tensor.shape)} has too many values")
    sources = (tensor.raw is not None) + (tensor.values is not None) + (tensor.part is not None)
    if sources != 1:
        raise UserError(f"{where}: {'no data' if not sources else 'data in more than one place'}")
    if isinstance(tensor.values, np.ndarray):
        return _cast(where, tensor.values, dtype, tensor.shape)
    if tensor.values is not None:
        return values_array(where, tensor.values, dtype, tensor.shape)
    raw = tensor.raw
    if tensor.part is not None:
        if regions is None:
            raise NotAllowed("shared memory is off: start the server with it")
        if tensor.part.size != size:  # before anything of that size is read
            raise UserError(_wrong_size(where, tensor, size, tensor.part.size))
        raw = regions.read(tensor.part)
    assert raw is not None
    if len(raw) != size:
        raise UserError(_wrong_size(where, tensor, size, len(raw)))
    if expected == "BOOL" and (np.frombuffer(raw, np.uint8) > 1).any():
        raise UserError(f"{where}: a BOOL is a byte of 0 or 1")
    return np.frombuffer(raw, dtype).reshape(tensor.shape)


def _wrong_size(where: str, tensor: InputTensor, size: int, given: int) -> str:
    shape = list(tensor.shape)
    return f"{where}: {given} bytes of data; {tensor.datatype} of shape {shape} has {size}"


def _check_shape(where: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    fits = len(shape) == len(expected) and all(
        given == extent or (extent == -1 and 1 <= given < 2**31)
        for given, extent in zip(shape, expected, strict=True)
    )
    if not fits:
        shown = one_line([*shape[:9], *(["..."] if len(shape) > 9 else [])], 120)
        raise UserError(f"{where}: shape {list(expected)}, not {shown} (-1: any extent from 1)")


def values_array(
    where: str, values: Sequence[Any], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray:
    """Values of JSON or of a message as an array: flat, or nested as the shape is.

    Raises:
        UserError: another number of values or another nesting than the shape has, or values that
            the type cannot hold.
    """
    flat = _flatten(where, values, shape)
    _check_count(where, len(flat), shape)
    kinds = set(map(type, flat))
    is_float = dtype.kind not in "biu"  # NumPy calls bfloat16 V
    allowed = {int, float} if is_float else {bool} if dtype.kind == "b" else {int}
    if not kinds <= allowed:
        odd = min(kind.__name__ for kind in kinds - allowed)
        raise UserError(f"{where}: a value of type {odd} in data of type {dtype.name}")
    if dtype.kind in "iu" and len(flat):
        limits = np.iinfo(dtype)
        if min(flat) < limits.min or max(flat) > limits.max:
            raise UserError(f"{where}: a value that {dtype.name} cannot hold")
    try:
        # NumPy warns where a value becomes infinite, which is an error below.
        with np.errstate(all="ignore"):
            array = np.array(flat, np.float64 if is_float else dtype).astype(dtype, copy=False)
            finite = not is_float or bool(np.isfinite(array).all())
    except OverflowError:
        finite = False
    if not finite:
        raise UserError(f"{where}: a value that {dtype.name} cannot hold")
    return array.reshape(shape)


def _cast(
    where: str, values: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray:
    """Values of a message, whose types are fewer, as the type that they stand for."""
    _check_count(where, len(values), shape)
    array = values.astype(dtype, copy=False)
    if values.dtype != dtype and (array != values).any():
        raise UserError(f"{where}: a value that {dtype.name} cannot hold")
    return array.reshape(shape)


def _check_count(where: str, count: int, shape: tuple[int, ...]) -> None:
    if count != prod(shape):
        raise UserError(f"{where}: {count} values; shape {list(shape)} has {prod(shape)}")


def _flatten(where: str, values: Sequence[Any], shape: Sequence[int]) -> Sequence[Any]:
    """The values of nested lists in order; lists are as long as the shape says, at every level."""
    level = 0
    while len(values) and isinstance(values[0], list):
        level += 1
        extent = shape[level] if level < len(shape) else -1
        if len(values) != prod(shape[:level]) or not all(
            isinstance(row, list) and len(row) == extent for row in values
        ):
            raise UserError(f"{where}: nested data is not of shape {list(shape)}")
        values = list(chain.from_iterable(values))
    if level and level != len(shape) - 1:
        raise UserError(f"{where}: nested data is not of shape {list(shape)}")
    return values
