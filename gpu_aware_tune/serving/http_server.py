"""The HTTP server of the open inference protocol v2, its extensions, plans and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gpu_aware_tune.errors import UserError, one_line
from gpu_aware_tune.serving.connections import Gate, TimedConnection
from gpu_aware_tune.serving.front_end import FrontEnd, model_config, model_metadata
from gpu_aware_tune.serving.interface import ModelFacts
from gpu_aware_tune.serving.metrics import CONTENT_TYPE, metrics_text
from gpu_aware_tune.serving.v2 import (
    InferRequest,
    NotAllowed,
    OutputChoice,
    TooLarge,
    TooSlow,
    describe_error,
)
from gpu_aware_tune.serving.v2_json import AnswerBody, parse_object, read_request, write_answer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
HEADER_LENGTH = "Inference-Header-Content-Length"
# aiohttp would log each broken request with a traceback and a part of its body.
_NO_LOG = logging.Logger("aiohttp", logging.CRITICAL + 1)
# Larger ones are parsed and written beside the event loop.
SMALL_BYTES = 128 << 10
UNPACKED_AT_A_TIME = 4  # their size is not known before


class HttpServer:
    """Listens, and answers by way of a `FrontEnd`.

    Args:
        front: what is served, and how.
    """

    def __init__(self, front: FrontEnd) -> None:
        self._front = front
        self._held: dict[int, int] = {}  # bytes by request
        self._unpacking = asyncio.Semaphore(UNPACKED_AT_A_TIME)
        app = web.Application(middlewares=[self._answer_errors])
        app.add_routes(self._routes())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=_NO_LOG,
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=front.options.idle_timeout_s,
            lingering_time=1.0,
            read_bufsize=256 << 10,
            max_line_size=front.options.max_header_bytes,
            max_field_size=front.options.max_header_bytes,
            shutdown_timeout=2.0,
        )
        self._server: asyncio.Server | None = None

    async def start(self, listener: socket.socket) -> None:
        """Serve on a socket that is bound."""
        await self._runner.setup()
        options = self._front.options
        inner = self._runner.server
        assert inner is not None
        gate = Gate(
            inner, options.max_connections, options.header_timeout_s, options.write_timeout_s
        )
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(gate, sock=listener, backlog=256)

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()

    def _routes(self) -> list[web.RouteDef]:
        model = "/v2/models/{model}"
        routes = [
            web.get("/v2", self._server_metadata),
            web.get("/v2/", self._server_metadata),
            web.get("/v2/health/live", self._live),
            web.get("/v2/health/ready", self._ready),
            web.get("/v2/models/stats", self._statistics),
            web.post("/v2/repository/index", self._index),
            web.post("/v2/repository/models/{model}/load", self._load),
            web.post("/v2/repository/models/{model}/unload", self._unload),
            web.get("/v2/systemsharedmemory/status", self._regions),
            web.get("/v2/systemsharedmemory/region/{region}/status", self._regions),
            web.post("/v2/systemsharedmemory/region/{region}/register", self._register),
            web.post("/v2/systemsharedmemory/region/{region}/unregister", self._unregister),
            web.post("/v2/systemsharedmemory/unregister", self._unregister),
            # There are none; clients make sure of that before they register others.
            web.get("/v2/cudasharedmemory/status", self._no_regions),
            web.post("/v2/cudasharedmemory/unregister", self._no_regions),
            web.get("/v2/plan", self._plan),
            web.post("/v2/plan", self._set_plan),
            web.get("/v2/status", self._status),
            web.get("/metrics", self._metrics),
        ]
        for path in (model, f"{model}/versions/{{version}}"):
            routes += [
                web.get(path, self._model_metadata),
                web.get(f"{path}/ready", self._model_ready),
                web.get(f"{path}/config", self._model_config),
                web.get(f"{path}/stats", self._statistics),
                web.post(f"{path}/infer", self._infer),
            ]
        return routes

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every error is one line of JSON with its status."""
        connection = request.transport and request.transport.get_protocol()
        if isinstance(connection, TimedConnection):
            connection.head_received()
        status = 499  # the client went away
        try:
            response = await handler(request)
            status = response.status
        except web.HTTPException as error:
            status = error.status
            response = _error(status, one_line(error.reason), keep=False)
        except Exception as error:
            facts = describe_error(error)
            status = facts.http
            keep = not isinstance(error, TooLarge | TooSlow)
            response = _error(status, facts.text, keep)
        finally:
            self._front.release(self._held.pop(id(request), 0))
            if isinstance(connection, TimedConnection):
                connection.answered()
            self._front.count("http", status)
        return response

    async def _live(self, _request: web.Request) -> web.Response:
        return _json({"live": True})

    async def _ready(self, _request: web.Request) -> web.Response:
        ready = self._front.is_ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def _server_metadata(self, _request: web.Request) -> web.Response:
        return _json(self._front.server_metadata())

    async def _model_metadata(self, request: web.Request) -> web.Response:
        return _json(model_metadata(self._find(request)))

    async def _model_config(self, request: web.Request) -> web.Response:
        return _json(model_config(self._find(request)))

    async def _model_ready(self, request: web.Request) -> web.Response:
        model = self._find(request)
        ready = self._front.is_ready
        return _json({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def _statistics(self, request: web.Request) -> web.Response:
        match = request.match_info
        found = self._front.model_statistics(match.get("model", ""), match.get("version", ""))
        return _json({"model_stats": found})

    async def _index(self, request: web.Request) -> web.Response:
        facts = await self._object(request)
        return _json(self._front.index(bool(facts.get("ready"))))

    async def _load(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        parameters = (await self._object(request)).get("parameters", {})
        folder = parameters.get("folder") if type(parameters) is dict else parameters
        await self._front.load(request.match_info["model"], folder)
        return _json({})

    async def _unload(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        await self._front.unload(request.match_info["model"])
        return _json({})

    async def _regions(self, request: web.Request) -> web.Response:
        found = self._front.shared_regions().list(request.match_info.get("region", ""))
        return _json(
            [
                {"name": one.name, "key": one.key, "offset": one.offset, "byte_size": one.size}
                for one in found
            ]
        )

    async def _no_regions(self, _request: web.Request) -> web.Response:
        return _json([])

    async def _register(self, request: web.Request) -> web.Response:
        regions = self._front.shared_regions()
        _refuse_browsers(request)
        facts = await self._object(request)
        key, offset, size = facts.get("key"), facts.get("offset", 0), facts.get("byte_size")
        if type(key) is not str or type(offset) is not int or type(size) is not int:
            raise UserError("a region has a key (text), an offset and a byte_size (integers)")
        regions.register(request.match_info["region"], key, offset, size)
        return _json({})

    async def _unregister(self, request: web.Request) -> web.Response:
        regions = self._front.shared_regions()
        _refuse_browsers(request)
        regions.unregister(request.match_info.get("region", ""))
        return _json({})

    async def _plan(self, _request: web.Request) -> web.Response:
        return _json(self._front.engine.plan_dict())

    async def _set_plan(self, request: web.Request) -> web.Response:
        self._require_admin(request)
        facts = await self._object(request)
        await asyncio.to_thread(self._front.engine.set_plan, facts)
        return _json(self._front.engine.plan_dict())

    async def _status(self, _request: web.Request) -> web.Response:
        return _json(self._front.engine.status())

    async def _metrics(self, _request: web.Request) -> web.Response:
        text = metrics_text(self._front)
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _infer(self, request: web.Request) -> web.Response:
        model = self._find(request)
        with self._front.accepted():
            asked = await self._read_infer(request, model)
            outputs = await self._front.infer(model, asked)
            answer = await _written(model, asked, outputs)
        if answer.header_length is None:
            return web.Response(body=answer.body, content_type="application/json")
        headers = {HEADER_LENGTH: str(answer.header_length)}
        return web.Response(
            body=answer.body, content_type="application/octet-stream", headers=headers
        )

    async def _read_infer(self, request: web.Request, model: ModelFacts) -> InferRequest:
        body = await self._body(request)
        length = request.headers.get(HEADER_LENGTH)
        limit = self._front.options.max_json_bytes
        if length is None and len(body) > SMALL_BYTES:
            return await asyncio.to_thread(read_request, body, length, model, limit)
        return read_request(body, length, model, limit)

    def _find(self, request: web.Request) -> ModelFacts:
        match = request.match_info
        return self._front.find(match["model"], match.get("version", ""))

    def _require_admin(self, request: web.Request) -> None:
        self._front.require_admin()
        _refuse_browsers(request)

    async def _object(self, request: web.Request) -> dict[str, Any]:
        body = await self._body(request)
        if not len(body):
            return {}
        return parse_object(body, self._front.options.max_json_bytes)

    async def _body(self, request: web.Request) -> memoryview:
        """The body of a request, unpacked."""
        options = self._front.options
        size = request.content_length
        if size is not None and size > options.max_request_bytes:
            raise TooLarge(f"a request of {size} bytes; {options.max_request_bytes} are taken")
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("identity", "gzip", "deflate"):
            raise UserError(f"Content-Encoding {one_line(encoding, 40)}: identity, gzip or deflate")
        try:
            async with asyncio.timeout(options.body_timeout_s):
                body = await self._receive(request, size)
        except TimeoutError:
            raise TooSlow(f"no whole request within {options.body_timeout_s:g} s") from None
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise UserError(f"the request's body is broken: {one_line(error, 80)}") from None
        if encoding == "identity":
            return memoryview(body).toreadonly()
        async with self._unpacking:
            unpacked = await asyncio.to_thread(unpack, body, options.max_request_bytes)
            self._hold(request, len(unpacked))
        return memoryview(unpacked)

    async def _receive(self, request: web.Request, size: int | None) -> bytearray:
        """A body as sent; its size may be known before."""
        body = bytearray(size or 0)
        self._hold(request, len(body))
        end = 0
        async for chunk in request.content.iter_any():
            body[end : end + len(chunk)] = chunk
            end += len(chunk)
            if size is None:
                self._hold(request, len(chunk))
                if end > self._front.options.max_request_bytes:
                    limit = self._front.options.max_request_bytes
                    raise TooLarge(f"a request of more than {limit} bytes")
        if size is not None and end != size:
            raise UserError(f"the request ended after {end} of {size} bytes")
        return body

    def _hold(self, request: web.Request, size: int) -> None:
        """Count bytes that a request holds until it is answered."""
        self._front.hold(size)
        self._held[id(request)] = self._held.get(id(request), 0) + size


def unpack(body: bytes | bytearray, max_bytes: int) -> bytes:
    """A body that was packed with gzip or zlib.

    Raises:
        TooLarge: it is more than so many bytes.
        UserError: it is neither, or not whole.
    """
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: either of both
    try:
        found = unpacker.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise UserError(f"the body cannot be unpacked: {one_line(error, 80)}") from None
    if len(found) > max_bytes:
        raise TooLarge(f"more than {max_bytes} bytes unpacked")
    if not unpacker.eof or unpacker.unused_data:
        raise UserError("the body cannot be unpacked: it is not one whole stream")
    return found


async def _written(
    model: ModelFacts, asked: InferRequest, outputs: list[tuple[OutputChoice, np.ndarray]]
) -> AnswerBody:
    """The body of an answer; much JSON is written beside the event loop."""
    as_json = [array.nbytes for choice, array in outputs if not (choice.binary or choice.part)]
    if sum(as_json) > SMALL_BYTES:
        return await asyncio.to_thread(write_answer, model, asked, outputs)
    return write_answer(model, asked, outputs)


def _json(facts: object, status: int = 200) -> web.Response:
    return web.Response(
        body=json.dumps(facts).encode(), status=status, content_type="application/json"
    )


def _error(status: int, text: str, keep: bool) -> web.Response:
    response = _json({"error": text}, status)
    if not keep:
        response.force_close()
    return response


def _refuse_browsers(request: web.Request) -> None:
    """A page in a browser of this machine must not steer the server."""
    if "Origin" in request.headers:
        raise NotAllowed("requests of web pages may not change what is served")
