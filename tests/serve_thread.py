"""Front ends in a thread of their own, for tests with clients that block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpu_aware_tune.serving.front_end import FrontEndOptions
from gpu_aware_tune.serving.interface import ServingEngine
from gpu_aware_tune.serving.server import Addresses, serve


@dataclass
class Served:
    """What is served, and where."""

    engine: Any
    http: str
    grpc: str
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event
    thread: threading.Thread

    @property
    def http_port(self) -> int:
        return int(self.http.rpartition(":")[2])

    def begin_stop(self) -> None:
        """Ask the server to drain and close."""
        self.loop.call_soon_threadsafe(self.stop.set)


@contextlib.contextmanager
def served(
    engine: ServingEngine, options: FrontEndOptions | None = None, with_grpc: bool = True
) -> Iterator[Served]:
    """Serve an engine while inside, on free ports."""
    ready = threading.Event()
    found: list[Served] = []
    failed: list[BaseException] = []

    async def main() -> None:
        stop = asyncio.Event()

        def started(addresses: Addresses) -> None:
            loop = asyncio.get_running_loop()
            http, grpc = addresses.http or "", addresses.grpc or ""
            found.append(Served(engine, http, grpc, loop, stop, threading.current_thread()))
            ready.set()

        grpc = "127.0.0.1:0" if with_grpc else None
        await serve(engine, stop, "127.0.0.1:0", grpc, options, started)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(20)
    if failed:
        raise failed[0]
    try:
        yield found[0]
    finally:
        if thread.is_alive():
            found[0].begin_stop()
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
        if failed:
            raise failed[0]
