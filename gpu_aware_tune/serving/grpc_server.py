"""The gRPC server of the open inference protocol v2 and its extensions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
import numpy as np

from gpu_aware_tune.errors import SetupError, UserError, one_line
from gpu_aware_tune.serving.front_end import FrontEnd, model_config, model_metadata
from gpu_aware_tune.serving.grpc_messages import MESSAGES, SERVICE, parse_message
from gpu_aware_tune.serving.interface import ModelFacts
from gpu_aware_tune.serving.server import join_address
from gpu_aware_tune.serving.v2 import (
    InferRequest,
    InputTensor,
    OutputChoice,
    TooLarge,
    datatype_of,
    describe_error,
    raw_bytes,
    region_part,
    timeout_of,
)

Message = Any
Context = Any
Call = Callable[[Message, Context], Awaitable[Message]]

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
STREAM_IN_FLIGHT = 64  # requests of one stream that are answered at a time


class GrpcServer:
    """Listens, and answers by way of a `FrontEnd`.

    Args:
        front: what is served, and how.
    """

    def __init__(self, front: FrontEnd) -> None:
        self._front = front
        options = front.options
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=options.max_connections,
            options=[
                ("grpc.max_receive_message_length", min(options.max_request_bytes, 2**31 - 1)),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", 2 * options.max_header_bytes),
                ("grpc.max_concurrent_streams", options.max_connections),
                ("grpc.so_reuseport", 0),  # a port that is taken is an error
                ("grpc.server_handshake_timeout_ms", round(options.header_timeout_s * 1e3)),
                ("grpc.max_connection_idle_ms", 600_000),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", round(options.write_timeout_s * 1e3)),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))

    async def start(self, host: str, port: int) -> int:
        """Serve on an address; returns the port.

        Raises:
            SetupError: it is taken, or not one of this machine.
        """
        address = join_address(host, port)
        try:
            chosen = self._server.add_insecure_port(address)
        except RuntimeError:
            chosen = 0
        if not chosen:
            raise SetupError(
                f"gRPC cannot listen on {address}: it is taken, or not of this machine"
            )
        await self._server.start()
        return chosen

    async def stop(self) -> None:
        """Close everything."""
        await self._server.stop(1.0)

    def _handlers(self) -> Any:
        calls: dict[str, Call] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._statistics,
            "ModelInfer": self._infer,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "SystemSharedMemoryStatus": self._regions,
            "SystemSharedMemoryRegister": self._register,
            "SystemSharedMemoryUnregister": self._unregister,
            "CudaSharedMemoryStatus": self._no_cuda_status,
            "CudaSharedMemoryUnregister": self._no_cuda_unregister,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._answering(f"{name}Request", call),
                response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
            )
            for name, call in calls.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._stream,
            response_serializer=MESSAGES["ModelStreamInferResponse"].SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _answering(self, name: str, call: Call) -> Callable[[bytes, Context], Awaitable[Message]]:
        """The call from the bytes of its request, with its errors as status codes."""

        async def answer(data: bytes, context: Context) -> Message:
            status = "CANCELLED"
            try:
                try:
                    response = await call(parse_message(name, data), context)
                    status = "OK"
                    return response
                except Exception as error:
                    facts = describe_error(error)
                status = facts.grpc
            finally:
                self._front.count("grpc", status)
            await context.abort(grpc.StatusCode[facts.grpc], facts.text)

        return answer

    async def _live(self, _request: Message, _context: Context) -> Message:
        return MESSAGES["ServerLiveResponse"](live=True)

    async def _ready(self, _request: Message, _context: Context) -> Message:
        return MESSAGES["ServerReadyResponse"](ready=self._front.is_ready)

    async def _model_ready(self, request: Message, _context: Context) -> Message:
        self._front.find(request.name, request.version)
        return MESSAGES["ModelReadyResponse"](ready=self._front.is_ready)

    async def _server_metadata(self, _request: Message, _context: Context) -> Message:
        return MESSAGES["ServerMetadataResponse"](**self._front.server_metadata())

    async def _model_metadata(self, request: Message, _context: Context) -> Message:
        model = self._front.find(request.name, request.version)
        return MESSAGES["ModelMetadataResponse"](**model_metadata(model))

    async def _model_config(self, request: Message, _context: Context) -> Message:
        model = self._front.find(request.name, request.version)
        return MESSAGES["ModelConfigResponse"](config=model_config(model))

    async def _statistics(self, request: Message, _context: Context) -> Message:
        found = self._front.model_statistics(request.name, request.version)
        return MESSAGES["ModelStatisticsResponse"](model_stats=found)

    async def _index(self, request: Message, _context: Context) -> Message:
        return MESSAGES["RepositoryIndexResponse"](models=self._front.index(request.ready))

    async def _load(self, request: Message, _context: Context) -> Message:
        await self._front.load(request.model_name, _parameters(request.parameters).get("folder"))
        return MESSAGES["RepositoryModelLoadResponse"]()

    async def _unload(self, request: Message, _context: Context) -> Message:
        await self._front.unload(request.model_name)
        return MESSAGES["RepositoryModelUnloadResponse"]()

    async def _regions(self, request: Message, _context: Context) -> Message:
        regions = {
            one.name: MESSAGES["SystemSharedMemoryStatusResponse.RegionStatus"](
                name=one.name, key=one.key, offset=one.offset, byte_size=one.size
            )
            for one in self._front.shared_regions().list(request.name)
        }
        response = MESSAGES["SystemSharedMemoryStatusResponse"]()
        for name, region in regions.items():
            response.regions[name].CopyFrom(region)
        return response

    async def _register(self, request: Message, _context: Context) -> Message:
        self._front.shared_regions().register(
            request.name, request.key, request.offset, request.byte_size
        )
        return MESSAGES["SystemSharedMemoryRegisterResponse"]()

    async def _unregister(self, request: Message, _context: Context) -> Message:
        self._front.shared_regions().unregister(request.name)
        return MESSAGES["SystemSharedMemoryUnregisterResponse"]()

    async def _no_cuda_status(self, _request: Message, _context: Context) -> Message:
        return MESSAGES["CudaSharedMemoryStatusResponse"]()

    async def _no_cuda_unregister(self, _request: Message, _context: Context) -> Message:
        return MESSAGES["CudaSharedMemoryUnregisterResponse"]()

    async def _infer(self, request: Message, context: Context) -> Message:
        return await self._answer(request, context.time_remaining())

    async def _answer(self, request: Message, timeout_s: float | None) -> Message:
        model = self._front.find(request.model_name, request.model_version)
        with self._front.accepted():
            size = request.ByteSize()
            self._front.hold(size)
            try:
                asked = read_message(request, self._front.options.max_json_bytes)
                outputs = await self._front.infer(model, asked, timeout_s)
                return write_message(model, asked, outputs)
            finally:
                self._front.release(size)

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> Any:
        """Answer a stream's requests side by side, in their order."""
        answers: asyncio.Queue[asyncio.Task[Message] | None] = asyncio.Queue(STREAM_IN_FLIGHT)
        started: set[asyncio.Task[Message]] = set()

        async def start_all() -> None:
            async for data in requests:
                task = asyncio.create_task(self._stream_answer(data, context))
                started.add(task)
                task.add_done_callback(started.discard)
                await answers.put(task)
            await answers.put(None)

        reader = asyncio.create_task(start_all())
        try:
            while (task := await answers.get()) is not None:
                yield await task
            await reader
        finally:
            reader.cancel()
            for task in started:
                task.cancel()

    async def _stream_answer(self, data: bytes, context: Context) -> Message:
        make = MESSAGES["ModelStreamInferResponse"]
        request = MESSAGES["ModelInferRequest"]()
        status = "CANCELLED"
        try:
            request = parse_message("ModelInferRequest", data)
            answer = await self._answer(request, context.time_remaining())
            status = "OK"
            return make(infer_response=answer)
        except Exception as error:
            facts = describe_error(error)
            status = facts.grpc
            # The request's id says which of the stream's requests failed.
            failed = MESSAGES["ModelInferResponse"](model_name=request.model_name, id=request.id)
            return make(error_message=f"[{facts.grpc}] {facts.text}", infer_response=failed)
        finally:
            self._front.count("grpc_stream", status)


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
        part = region_part(_parameters(entry.parameters), where)
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
        parameters = _parameters(entry.parameters)
        if parameters.get("classification"):
            raise UserError(f"{where}: the classification extension is not supported")
        outputs.append(OutputChoice(entry.name, True, region_part(parameters, where)))
    timeout = timeout_of(_parameters(request.parameters).get("timeout"))
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


def _parameters(found: Mapping[str, Message]) -> dict[str, Any]:
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
