"""The gRPC server of the open inference protocol v2 and its extensions.

Each call has a thread of gRPC's, and is answered in the event loop of the `FrontEnd`. gRPC's own server for
event loops takes a third longer to pass a request of 600 kB on (`benchmarks/serving_overhead.py`).
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import grpc

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.serving.front_end import FrontEnd, model_config, model_metadata
from gpu_aware_tune.serving.grpc_messages import MESSAGES, SERVICE, parse_message
from gpu_aware_tune.serving.grpc_requests import parameters_of, read_message, write_message
from gpu_aware_tune.serving.server import join_address
from gpu_aware_tune.serving.v2 import (
    ErrorFacts,
    describe_error,
)

log = logging.getLogger(__name__)

Message = Any
Context = Any
Call = Callable[
    [Message, float | None], Awaitable[Message]
]  # a request, and its seconds, if limited

STREAM_IN_FLIGHT = 64  # requests of one stream that are answered at a time
# Of what a client may send ahead: gRPC's own 64 kB are several round trips for one image.
_WINDOW_BYTES = _FRAME_BYTES = 4 << 20
_CENTURY_S = 3e9
_LOOK_S = 1.0  # how often a stream's reader sees whether its call has ended


class GrpcServer:
    """Listens, and answers by way of a `FrontEnd`.

    Args:
        front: what is served, and how.
    """

    def __init__(self, front: FrontEnd) -> None:
        self._front = front
        self._loop: asyncio.AbstractEventLoop | None = None
        options = front.options
        self._threads = ThreadPoolExecutor(options.max_connections, "grpc")
        self._server = grpc.server(
            self._threads,
            maximum_concurrent_rpcs=options.max_connections,
            options=[
                ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
                ("grpc.http2.max_frame_size", _FRAME_BYTES),
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
        """Serve on an address, from this event loop; returns the port.

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
        self._loop = asyncio.get_running_loop()
        self._server.start()
        return chosen

    async def stop(self) -> None:
        """Close everything."""
        await asyncio.to_thread(self._server.stop(1.0).wait)
        self._threads.shutdown(wait=False)

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

    def _answering(self, name: str, call: Call) -> Callable[[bytes, Context], Message]:
        """The call from the bytes of its request, with its errors as status codes."""

        async def answered(data: bytes, timeout_s: float | None) -> Message | ErrorFacts:
            status = "CANCELLED"
            try:
                response = await call(parse_message(name, data), timeout_s)
                status = "OK"
                return response
            except Exception as error:
                facts = describe_error(error)
                status = facts.grpc
                return facts
            finally:
                self._front.count("grpc", status)

        def answer(data: bytes, context: Context) -> Message:
            future = self._in_loop(answered(data, _seconds_left(context)))
            _at_end(context, future.cancel)
            try:
                found = future.result()
            except CancelledError:  # the client is gone, or the server stops
                context.abort(grpc.StatusCode.CANCELLED, "the call has ended")
            if isinstance(found, ErrorFacts):
                context.abort(grpc.StatusCode[found.grpc], found.text)
            return found

        return answer

    def _in_loop(self, work: Coroutine[Any, Any, Message]) -> Future[Message]:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _live(self, _request: Message, _timeout_s: float | None) -> Message:
        return MESSAGES["ServerLiveResponse"](live=True)

    async def _ready(self, _request: Message, _timeout_s: float | None) -> Message:
        return MESSAGES["ServerReadyResponse"](ready=self._front.is_ready)

    async def _model_ready(self, request: Message, _timeout_s: float | None) -> Message:
        self._front.find(request.name, request.version)
        return MESSAGES["ModelReadyResponse"](ready=self._front.is_ready)

    async def _server_metadata(self, _request: Message, _timeout_s: float | None) -> Message:
        return MESSAGES["ServerMetadataResponse"](**self._front.server_metadata())

    async def _model_metadata(self, request: Message, _timeout_s: float | None) -> Message:
        model = self._front.find(request.name, request.version)
        return MESSAGES["ModelMetadataResponse"](**model_metadata(model))

    async def _model_config(self, request: Message, _timeout_s: float | None) -> Message:
        model = self._front.find(request.name, request.version)
        return MESSAGES["ModelConfigResponse"](config=model_config(model))

    async def _statistics(self, request: Message, _timeout_s: float | None) -> Message:
        found = self._front.model_statistics(request.name, request.version)
        return MESSAGES["ModelStatisticsResponse"](model_stats=found)

    async def _index(self, request: Message, _timeout_s: float | None) -> Message:
        return MESSAGES["RepositoryIndexResponse"](models=self._front.index(request.ready))

    async def _load(self, request: Message, _timeout_s: float | None) -> Message:
        await self._front.load(request.model_name, parameters_of(request.parameters).get("folder"))
        return MESSAGES["RepositoryModelLoadResponse"]()

    async def _unload(self, request: Message, _timeout_s: float | None) -> Message:
        await self._front.unload(request.model_name)
        return MESSAGES["RepositoryModelUnloadResponse"]()

    async def _regions(self, request: Message, _timeout_s: float | None) -> Message:
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

    async def _register(self, request: Message, _timeout_s: float | None) -> Message:
        self._front.shared_regions().register(
            request.name, request.key, request.offset, request.byte_size
        )
        return MESSAGES["SystemSharedMemoryRegisterResponse"]()

    async def _unregister(self, request: Message, _timeout_s: float | None) -> Message:
        self._front.shared_regions().unregister(request.name)
        return MESSAGES["SystemSharedMemoryUnregisterResponse"]()

    async def _no_cuda_status(self, _request: Message, _timeout_s: float | None) -> Message:
        return MESSAGES["CudaSharedMemoryStatusResponse"]()

    async def _no_cuda_unregister(self, _request: Message, _timeout_s: float | None) -> Message:
        return MESSAGES["CudaSharedMemoryUnregisterResponse"]()

    async def _infer(self, request: Message, timeout_s: float | None) -> Message:
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

    def _stream(self, requests: Iterator[bytes], context: Context) -> Iterator[Message]:
        """Answer a stream's requests side by side, in their order."""
        answers: queue.Queue[Future[Message] | None] = queue.Queue(STREAM_IN_FLIGHT)
        started: set[Future[Message]] = set()
        ended = threading.Event()

        def end() -> None:
            ended.set()
            for future in list(started):
                future.cancel()

        def put(answer: Future[Message] | None) -> None:
            while not ended.is_set():
                try:
                    return answers.put(answer, timeout=_LOOK_S)
                except queue.Full:
                    continue

        def start_all() -> None:
            try:
                for data in requests:
                    future = self._in_loop(self._stream_answer(data, _seconds_left(context)))
                    started.add(future)
                    future.add_done_callback(started.discard)
                    if ended.is_set():  # perhaps after `end` has looked
                        future.cancel()
                    put(future)
            except Exception:  # gRPC's, of a call that was cancelled; its class is not public
                log.debug("a stream ended", exc_info=True)
            finally:
                put(None)

        _at_end(context, end)
        threading.Thread(target=start_all, name="grpc-stream", daemon=True).start()
        while not ended.is_set():
            try:
                answer = answers.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if answer is None:
                return
            try:
                found = answer.result()
            except CancelledError:
                return
            yield found

    async def _stream_answer(self, data: bytes, timeout_s: float | None) -> Message:
        make = MESSAGES["ModelStreamInferResponse"]
        request = MESSAGES["ModelInferRequest"]()
        status = "CANCELLED"
        try:
            request = parse_message("ModelInferRequest", data)
            answer = await self._infer(request, timeout_s)
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


def _at_end(context: Context, act: Callable[[], object]) -> None:
    """Do something when a call ends, or now, if it has ended already."""
    if not context.add_callback(act):
        act()


def _seconds_left(context: Context) -> float | None:
    """Until the deadline of a call; gRPC gives those without one some centuries."""
    left = context.time_remaining()
    return None if left is None or left > _CENTURY_S else left
