"""Starts and stops the front ends of an engine."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_aware_tune.errors import SetupError, UserError, one_line
from gpu_aware_tune.serving.front_end import FrontEnd, FrontEndOptions

if TYPE_CHECKING:
    from gpu_aware_tune.serving.interface import ServingEngine

HTTP_ADDRESS = "127.0.0.1:8000"
GRPC_ADDRESS = "127.0.0.1:8001"
_OTHER_FILES = 512  # libraries, regions, pipes
# Seconds after which Python lets another thread run: 5 ms would hold back a lane whose run has ended.
SWITCH_INTERVAL_S = 5e-4
# Options of glibc's mallopt: what is freed at the top of a heap is kept up to the first (M_TRIM_THRESHOLD),
# and up to the second (M_MMAP_THRESHOLD, at most 32 MB) memory comes from a heap at all.
_KEPT = {-1: 64 << 20, -3: 32 << 20}


@dataclass(frozen=True)
class Addresses:
    """Where the front ends listen; None for one that was not asked for."""

    http: str | None
    grpc: str | None


async def serve(
    engine: ServingEngine,
    stop: asyncio.Event,
    http: str | None = HTTP_ADDRESS,
    grpc: str | None = GRPC_ADDRESS,
    options: FrontEndOptions | None = None,
    on_start: Callable[[Addresses], None] | None = None,
) -> None:
    """Serve an engine until an event is set, then answer what was accepted.

    Args:
        engine: answers the requests; closing it is the caller's.
        stop: ends serving.
        http: HOST:PORT to listen on; port 0 takes a free one, None does without HTTP.
        grpc: likewise.
        options: limits and permissions.
        on_start: is told where the front ends listen, with the ports that were chosen.

    Raises:
        UserError: an address is not HOST:PORT.
        SetupError: a port is taken, or a package is missing.
    """
    async with front_ends(engine, http, grpc, options) as addresses:
        if on_start is not None:
            on_start(addresses)
        await stop.wait()


@contextlib.asynccontextmanager
async def front_ends(
    engine: ServingEngine,
    http: str | None = HTTP_ADDRESS,
    grpc: str | None = GRPC_ADDRESS,
    options: FrontEndOptions | None = None,
) -> AsyncIterator[Addresses]:
    """Front ends while inside; on leaving they refuse requests, drain and close. See `serve`."""
    front = FrontEnd(engine, options or FrontEndOptions())
    _allow_files(2 * front.options.max_connections + _OTHER_FILES)
    _keep_freed_memory()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        if front.regions is not None:
            stack.callback(front.regions.close)
        http_address = None if http is None else await _start_http(front, http, stack)
        grpc_address = None if grpc is None else await _start_grpc(front, grpc, stack)
        stack.push_async_callback(front.drain)
        yield Addresses(http_address, grpc_address)


async def _start_http(front: FrontEnd, address: str, stack: contextlib.AsyncExitStack) -> str:
    try:
        from gpu_aware_tune.serving.http_server import HttpServer
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    host, port = parse_address(address)
    listener = _bind(host, port)
    stack.callback(listener.close)
    server = HttpServer(front)
    stack.push_async_callback(server.stop)
    await server.start(listener)
    return join_address(host, listener.getsockname()[1])


async def _start_grpc(front: FrontEnd, address: str, stack: contextlib.AsyncExitStack) -> str:
    try:
        from gpu_aware_tune.serving.grpc_server import GrpcServer
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    host, port = parse_address(address)
    server = GrpcServer(front)
    stack.push_async_callback(server.stop)
    return join_address(host, await server.start(host, port))


def _allow_files(count: int) -> None:
    """Let this process have as many open files as its connections may need, if the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _keep_freed_memory() -> None:
    """Let malloc keep what is freed, for as long as the process lives.

    The memory of each request comes from the system anew otherwise, and a fault for each page of it takes
    longer than copying it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries have none
        for option, value in _KEPT.items():
            libc.mallopt(option, value)


def missing_package(error: ModuleNotFoundError) -> SetupError:
    """What to tell where a package of the `serve` extra is not installed."""
    return SetupError(f"serving needs {error.name}: pip install 'gpu-aware-tune[serve]'")


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT as a host and a port; brackets around a host that has colons.

    Raises:
        UserError: it is not.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise UserError(f"address {one_line(text, 80)}: HOST:PORT, as {HTTP_ADDRESS}")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The text that `parse_address` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket on an address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SetupError(
            f"HTTP cannot listen on {join_address(host, port)}: {error.strerror}"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise SetupError(
            f"HTTP cannot listen on {join_address(host, port)}: {error.strerror}"
        ) from None
    return listener
