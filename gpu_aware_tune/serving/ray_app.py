"""The engine under Ray Serve: one replica a device, each with its own front end.

Ray places, watches, restarts and updates replicas; requests go past it, to a replica's own HTTP and gRPC
servers, or through a Serve handle (`infer`) where the caller is part of the cluster. A plan arrives as
`user_config`, without a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.serving.deployments import Deployment
from gpu_aware_tune.serving.front_end import FrontEndOptions

if TYPE_CHECKING:
    import numpy as np

APPLICATION = "gpu-aware-tune"
_DEPLOYMENT = "engine"
_READY_S = 120.0
_DEPLOY_S = 240
_STOP_S = 35.0


@dataclass(frozen=True)
class ReplicaOptions:
    """What each replica is to do.

    Args:
        engine: keyword arguments of `Engine`; paths as text.
        http: HOST:PORT of a replica's HTTP server, the same on every machine; None: none.
        grpc: likewise.
        front_end: limits and permissions.
    """

    engine: Mapping[str, Any]
    http: str | None
    grpc: str | None
    front_end: FrontEndOptions


class DeviceEngine:
    """A replica: an engine and its front ends."""

    def __init__(self, deployments: Sequence[Deployment], options: ReplicaOptions) -> None:
        from gpu_aware_tune.serving.engine import Engine

        curves = options.engine.get("curves")
        arguments = {**options.engine, "curves": Path(curves) if curves else None}
        self._engine = Engine(deployments, **arguments)
        self._ended: BaseException | None = None
        self._addresses: dict[str, str | None] = {}
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(options,), daemon=True)
        self._thread.start()
        self._ready.wait(_READY_S)
        self.check_health()

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Carry out the plan in `user_config`, if there is one; called by Ray Serve."""
        if config.get("plan"):
            self._engine.set_plan(dict(config["plan"]))

    def check_health(self) -> None:
        """Raise where the front ends have ended; called by Ray Serve, which then starts anew."""
        if self._ended is not None:
            raise RuntimeError(f"the front ends have ended: {self._ended}")

    async def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], timeout_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """Answer a request from within the cluster; raises as `Engine.infer` does."""
        return await self._engine.infer(model, inputs, timeout_s)

    def where(self) -> dict[str, Any]:
        """The process, and the addresses of its front ends."""
        return {"pid": os.getpid(), "machine": socket.gethostname(), **self._addresses}

    def status(self) -> dict[str, Any]:
        """As `GET v2/status`."""
        return self._engine.status()

    def __del__(self) -> None:  # Ray Serve calls it when a replica ends, and waits for it
        if getattr(self, "_thread", None) is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_STOP_S)
            self._engine.close()

    def _run(self, options: ReplicaOptions) -> None:
        """In a thread: the front ends."""
        from gpu_aware_tune.serving.server import Addresses, serve

        def started(addresses: Addresses) -> None:
            self._addresses = {"http": addresses.http, "grpc": addresses.grpc}
            self._ready.set()

        try:
            self._loop.run_until_complete(
                serve(
                    self._engine, self._stop, options.http, options.grpc, options.front_end, started
                )
            )
        except BaseException as error:
            self._ended = error
        finally:
            self._ready.set()


@contextlib.contextmanager
def served_by_ray(
    address: str,
    deployments: Sequence[Deployment],
    options: ReplicaOptions,
    replicas: int | None = None,
    cores: int | None = None,
    plan: Mapping[str, Any] | None = None,
) -> Iterator[RayApplication]:
    """Deploy an application for the length of a `with`; it is removed at its end.

    Args:
        address: "auto" or HOST:PORT, as for `tune --ray`.
        deployments: the models that every replica serves.
        options: of a replica.
        replicas: how many devices; by default one for each machine of the cluster.
        cores: of a replica; by default all of a machine that Ray knows.
        plan: to carry out; by default each replica makes its own.

    Raises:
        SetupError: Ray or Ray Serve is missing, there is no cluster, or a replica does not start.
    """
    from gpu_aware_tune.cluster.connection import connected

    with connected(address):
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise SetupError(
                f"tune serve --ray needs Ray Serve ({error.name}): pip install 'gpu-aware-tune[ray-serve]'"
            ) from error
        machines = [node for node in ray.nodes() if node["Alive"]]
        most = min(int(node["Resources"].get("CPU", 1)) for node in machines)
        app = RayApplication(deployments, options, replicas or len(machines), cores or most)
        serve.start(proxy_location="Disabled")
        try:
            app.carry_out(plan)
            yield app
        finally:
            serve.delete(APPLICATION)
            serve.shutdown()


def build(arguments: Mapping[str, Any]) -> Any:
    """What Ray Serve imports and calls: the application, with one deployment, `engine`.

    Args:
        arguments: `deployments` and `options` as `RayApplication` writes them.
    """
    from ray import serve

    deployments = [
        Deployment(**{**each, "folders": tuple(map(Path, each["folders"]))})
        for each in arguments["deployments"]
    ]
    given = dict(arguments["options"])
    options = ReplicaOptions(**{**given, "front_end": FrontEndOptions(**given["front_end"])})
    return serve.deployment(DeviceEngine, name=_DEPLOYMENT).bind(deployments, options)


class RayApplication:
    """An application; `carry_out` deploys it.

    Args:
        deployments: the models that every replica serves.
        options: of a replica.
        replicas: how many.
        cores: of each.
    """

    def __init__(
        self, deployments: Sequence[Deployment], options: ReplicaOptions, replicas: int, cores: int
    ) -> None:
        self._arguments = {
            "deployments": [
                {**vars(each), "folders": [str(path.absolute()) for path in each.folders]}
                for each in deployments
            ],
            "options": dataclasses.asdict(options),
        }
        self._replicas, self._cores = replicas, cores

    @property
    def handle(self) -> Any:
        """Ray Serve's handle to any of the replicas."""
        from ray import serve

        return serve.get_app_handle(APPLICATION)

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], timeout_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """Answer a request through the handle, by any replica; raises as `Engine.infer` does."""
        answer: dict[str, np.ndarray] = self.handle.infer.remote(model, inputs, timeout_s).result()
        return answer

    def where(self, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """Processes and addresses of the replicas that answer; asks until all have been heard."""
        found: dict[int, dict[str, Any]] = {}
        end = time.monotonic() + timeout_s
        while len(found) < self._replicas and time.monotonic() < end:
            answers = [self.handle.where.remote() for _ in range(2 * self._replicas)]
            for each in answers:
                with contextlib.suppress(Exception):  # of a replica that is gone
                    answer = each.result(timeout_s=5)
                    found[answer["pid"]] = answer
        return list(found.values())

    def carry_out(self, plan: Mapping[str, Any] | None) -> None:
        """Deploy, or give every replica another plan without a restart.

        The application is described as in Ray Serve's configuration files: only there another
        `user_config` is no new version.

        Raises:
            SetupError: a replica does not start.
        """
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        deployment = {
            "name": _DEPLOYMENT,
            "num_replicas": self._replicas,
            "max_ongoing_requests": 1000,
            "health_check_period_s": 1.0,
            "graceful_shutdown_timeout_s": _STOP_S,
            "ray_actor_options": {"num_cpus": self._cores},
            # Every refusal would be logged with a traceback.
            "logging_config": {"log_level": "CRITICAL", "enable_access_log": False},
            "user_config": {"plan": dict(plan) if plan else None},
        }
        application = {
            "name": APPLICATION,
            "import_path": f"{__name__}:build",
            "route_prefix": None,
            "args": self._arguments,
            "deployments": [deployment],
        }
        schema = ServeDeploySchema(applications=[application])
        try:
            client = _get_global_client()
            client.deploy_apps(schema)
            # Its own way to wait gives a busy machine 60 s, and does not tell why a deployment failed.
            client._wait_for_application_running(APPLICATION, timeout_s=_DEPLOY_S)
        except (RuntimeError, TimeoutError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise SetupError(f"Ray Serve did not start it: {lines[-1][:200]}") from error
