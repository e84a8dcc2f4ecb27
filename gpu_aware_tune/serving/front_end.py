"""What HTTP and gRPC have in common: options, metadata, and the way of a request to the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_aware_tune.errors import UserError, one_line
from gpu_aware_tune.serving.interface import ModelFacts, ServingEngine
from gpu_aware_tune.serving.requests import Draining, Refused, RunFailed, UnknownModel
from gpu_aware_tune.serving.shared_memory import Regions
from gpu_aware_tune.serving.v2 import (
    InferRequest,
    NotAllowed,
    OutputChoice,
    chosen_outputs,
    datatype_of,
    input_arrays,
    raw_bytes,
)

if TYPE_CHECKING:
    from gpu_aware_tune.model.importer import TensorSpec
    from gpu_aware_tune.serving.statistics import Duration

SERVER_NAME = "gpu-aware-tune"
PLATFORM = "tvm"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")


@dataclass(frozen=True)
class FrontEndOptions:
    """Limits of the front ends, and what they may do.

    Args:
        max_request_bytes: of one request, as sent and unpacked.
        max_json_bytes: of its JSON; Python's objects take up to 30 times as much memory.
        max_held_bytes: of all requests that are being answered; over HTTP also of those being received.
        max_header_bytes: of one line of an HTTP request's head.
        max_connections: of HTTP; over gRPC, calls at a time.
        header_timeout_s: from the first byte of an HTTP request to the end of its head.
        body_timeout_s: for its body.
        write_timeout_s: within which a client must take what was written to it.
        idle_timeout_s: until a connection without a request is closed.
        drain_timeout_s: for requests in flight when the server stops.
        admin: clients may load and unload models and set the plan.
        shared_memory: clients may register system shared memory of this user.
    """

    max_request_bytes: int = 64 << 20
    max_json_bytes: int = 16 << 20
    max_held_bytes: int = 1 << 30
    max_header_bytes: int = 8190
    max_connections: int = 1000
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    write_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0
    drain_timeout_s: float = 30.0
    admin: bool = False
    shared_memory: bool = False


class FrontEnd:
    """The state that both transports share; lives in one event loop.

    Args:
        engine: answers the requests.
        options: limits and permissions.
    """

    def __init__(self, engine: ServingEngine, options: FrontEndOptions) -> None:
        self.engine = engine
        self.options = options
        self.regions = Regions(options.max_request_bytes) if options.shared_memory else None
        self.draining = False
        self.in_flight = 0
        self.held_bytes = 0
        # How often each (transport, status) was answered; for metrics.
        self.answers: dict[tuple[str, str], int] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_ready(self) -> bool:
        """Requests are taken."""
        return self.engine.is_ready and not self.draining

    def count(self, transport: str, status: object) -> None:
        """Count an answer."""
        key = (transport, str(status))
        self.answers[key] = self.answers.get(key, 0) + 1

    async def drain(self) -> None:
        """Take no more requests and wait for those in flight, as long as the options say."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self.options.drain_timeout_s)

    @contextlib.contextmanager
    def accepted(self) -> Iterator[None]:
        """A request in flight.

        Raises:
            Draining: the server is stopping.
        """
        if self.draining:
            raise Draining("the server is stopping")
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    def find(self, name: str, version: str = "") -> ModelFacts:
        """A model by name and version.

        Raises:
            UnknownModel: there is none.
        """
        model = self.engine.model(name)
        if version not in ("", model.version):
            raise UnknownModel(f"{name} has version {model.version}, not {one_line(version, 40)}")
        return model

    async def infer(
        self, model: ModelFacts, request: InferRequest, timeout_s: float | None = None
    ) -> list[tuple[OutputChoice, np.ndarray]]:
        """Answer a request: the outputs asked for, those for shared memory already written there.

        Args:
            model: from `find`.
            request: as a client sent it.
            timeout_s: of the transport, where it has one.
        """
        choices = chosen_outputs(model, request)
        arrays = input_arrays(model, request, self.regions)
        for choice in choices:
            if choice.part is not None:
                self.shared_regions().check(choice.part)
        limits = [limit for limit in (request.timeout_s, timeout_s) if limit is not None]
        found = await self.engine.infer(model.name, arrays, min(limits, default=None))
        missing = [choice.name for choice in choices if choice.name not in found]
        if missing:
            raise RunFailed(f"{model.name} returned no output {missing[0]}")
        outputs = [(choice, found[choice.name]) for choice in choices]
        for choice, array in outputs:
            if choice.part is not None:
                self.shared_regions().write(choice.part, raw_bytes(array))
        return outputs

    def shared_regions(self) -> Regions:
        """The registered regions; raises NotAllowed where that is off."""
        if self.regions is None:
            raise NotAllowed("shared memory is off: start the server with it")
        return self.regions

    def require_admin(self) -> None:
        """Raise NotAllowed unless clients may change what is served."""
        if not self.options.admin:
            raise NotAllowed("changing what is served is off: start the server with it")

    def hold(self, size: int) -> None:
        """Count bytes of a request that is received or answered, until `release`.

        Raises:
            Refused: memory for requests is used up.
        """
        options = self.options
        limit = max(options.max_held_bytes, options.max_request_bytes)
        if self.held_bytes + size > limit:
            raise Refused(f"{self.held_bytes} bytes of requests are held; send it again later")
        self.held_bytes += size

    def release(self, size: int) -> None:
        """Count bytes no more."""
        self.held_bytes -= size

    async def load(self, name: str, folder: object) -> None:
        """Add or replace a model; `folder` is a path as a client gave it, or None."""
        self.require_admin()
        if folder is not None and type(folder) is not str:
            raise UserError("parameters: folder is not the path of a tuned model")
        if not 0 < len(name) <= 128 or not name.isprintable() or "/" in name:
            raise UserError("a model's name has from 1 to 128 characters, none of them a slash")
        path = None if folder is None else Path(str(folder))
        await asyncio.to_thread(self.engine.load_model, name, path)

    async def unload(self, name: str) -> None:
        """Remove a model."""
        self.require_admin()
        await asyncio.to_thread(self.engine.unload_model, name)

    def server_metadata(self) -> dict[str, Any]:
        """Name, version, extensions."""
        from gpu_aware_tune import __version__

        shared = () if self.regions is None else ("system_shared_memory",)
        return {
            "name": SERVER_NAME,
            "version": __version__,
            "extensions": [*EXTENSIONS, *shared],
        }

    def index(self, only_ready: bool = False) -> list[dict[str, Any]]:
        """The models and their states."""
        if only_ready and not self.is_ready:
            return []
        state = "READY" if self.is_ready else "UNAVAILABLE"
        return [
            {"name": model.name, "version": model.version, "state": state, "reason": ""}
            for model in self.engine.models
        ]

    def model_statistics(self, name: str = "", version: str = "") -> list[dict[str, Any]]:
        """The statistics extension's facts on one model, or on all."""
        if name:
            return [self._statistics(self.find(name, version))]
        found = []
        for model in self.engine.models:
            with contextlib.suppress(UnknownModel):  # removed just now
                found.append(self._statistics(model))
        return found

    def _statistics(self, model: ModelFacts) -> dict[str, Any]:
        counts = self.engine.statistics(model.name)
        none = {"count": counts.run.count, "ns": 0}
        return {
            "name": model.name,
            "version": model.version,
            "last_inference": round(counts.last_run_s * 1e3),
            "inference_count": counts.rows,
            "execution_count": sum(runs.count for runs in counts.batches.values()),
            "inference_stats": {
                "success": _duration(counts.success),
                "fail": _duration(counts.fail),
                "queue": _duration(counts.queue),
                "compute_input": none,
                "compute_infer": _duration(counts.run),
                "compute_output": none,
                "cache_hit": {"count": 0, "ns": 0},
                "cache_miss": {"count": 0, "ns": 0},
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": {"count": runs.count, "ns": 0},
                    "compute_infer": _duration(runs),
                    "compute_output": {"count": runs.count, "ns": 0},
                }
                for rows, runs in sorted(counts.batches.items())
            ],
        }


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": round(duration.seconds * 1e9)}


def model_metadata(model: ModelFacts) -> dict[str, Any]:
    """Name, versions and tensors of a model, as the protocol has them."""
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": PLATFORM,
        "inputs": [_tensor_metadata(spec) for spec in model.inputs],
        "outputs": [_tensor_metadata(spec) for spec in model.outputs],
    }


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": list(spec.shape)}


def model_config(model: ModelFacts) -> dict[str, Any]:
    """The part of Triton's model configuration that clients read."""
    batching: dict[str, Any] = {"dynamic_batching": {}} if model.max_batch else {}
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": model.max_batch,
        "input": [_tensor_config(spec, model.max_batch) for spec in model.inputs],
        "output": [_tensor_config(spec, model.max_batch) for spec in model.outputs],
        "model_transaction_policy": {"decoupled": False},
        **batching,
    }


def _tensor_config(spec: TensorSpec, max_batch: int) -> dict[str, Any]:
    dims = list(spec.shape[1:] if max_batch else spec.shape)
    if not dims:  # Triton's dims are never empty
        return {
            "name": spec.name,
            "data_type": f"TYPE_{datatype_of(spec.dtype)}",
            "dims": [1],
            "reshape": {"shape": []},
        }
    return {"name": spec.name, "data_type": f"TYPE_{datatype_of(spec.dtype)}", "dims": dims}
