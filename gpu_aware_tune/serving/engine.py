"""The engine: one device's models, queues, lanes and plan, for front ends and for applications.

Everything runs in this process. A run is started by whoever brings the news that makes it possible
(see `dispatcher`), so there is no loop to wait for; `infer` is for asyncio, `submit` for threads.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.partition.thread_pool import pools_at_hand
from gpu_aware_tune.partition.topology import usable_cores
from gpu_aware_tune.planning.curve import MARGIN
from gpu_aware_tune.planning.device import PlanDevice
from gpu_aware_tune.planning.schedule import plan_from_dict
from gpu_aware_tune.serving.catalog import Served, first_rates, open_served
from gpu_aware_tune.serving.controller import Controller
from gpu_aware_tune.serving.deployments import Deployment
from gpu_aware_tune.serving.dispatcher import Dispatcher
from gpu_aware_tune.serving.engine_plan import EnginePlan, make_engine_plan, scaled, with_plan
from gpu_aware_tune.serving.lanes import LanePool
from gpu_aware_tune.serving.model_queue import ModelQueue
from gpu_aware_tune.serving.requests import Draining, Request, UnknownModel
from gpu_aware_tune.serving.served_model import ServedModel
from gpu_aware_tune.serving.statistics import ModelStatistics

_ALL_LANES = 8  # cores up to which every lane is prepared at the start, not only the plan's
_EVENTS = 200
# How long an idle thread spins before it sleeps: enough for the gaps between kernels, and soon over
# where another lane takes the core.
_SPIN_S = 5e-5


class Engine:
    """Serves models on this machine's cores.

    Close it, or use it as a context manager: it has threads.

    Args:
        deployments: the models.
        units: how many cores; all that this process may use by default.
        policy: "plan", or a baseline of `planning.policies`.
        adaptive: plan anew when rates or run times leave what was planned with.
        curves: folder of `tune profile --save`; a model without a curve there is measured now.
        queue_rows: the most rows of a model that wait.
        margin: the planning latency over the measured 90th percentile.

    Raises:
        UserError: a folder cannot be served here, names are given twice, or an SLO cannot be met.
    """

    def __init__(
        self,
        deployments: Sequence[Deployment],
        *,
        units: int | None = None,
        policy: str = "plan",
        adaptive: bool = True,
        curves: Path | None = None,
        queue_rows: int = 256,
        margin: float = MARGIN,
    ) -> None:
        self._curve_folder, self._queue_rows, self._margin = curves, queue_rows, margin
        self._policy, self._fixed = policy, False
        self._changing = threading.Lock()  # of models and plans; never held by a request
        self._draining = False
        self.events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        cores = usable_cores()
        if units is not None and not 1 <= units <= len(cores):
            raise UserError(f"--units {units}: this process may use 1 to {len(cores)} cores")
        self._pool = LanePool(cores[:units])
        self._catalog: dict[str, Served] = {}
        try:
            for deployment in deployments:
                served = open_served(deployment, self._pool, curves, queue_rows)
                if served.model.name in self._catalog:
                    raise UserError(f"{served.model.name} is given twice: name one differently")
                self._catalog[served.model.name] = served
            if pools := pools_at_hand():
                pools.spin(_SPIN_S)
            self._planned = self._plan(first_rates(self._catalog))
            queues = [served.queue for served in self._catalog.values()]
            layout = self._planned.layout(queues, self._pool)
            self._prepare_every_lane()
            self._dispatcher = Dispatcher(self._pool, layout)
        except BaseException:
            self._pool.close()
            raise
        self.note("start", f"{len(self._catalog)} models on {len(self._pool.cores)} cores")
        self._controller = Controller(self)
        if adaptive:
            self._controller.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return not self._draining

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models that are served."""
        return tuple(served.model for served in self._catalog.values())

    def model(self, name: str) -> ServedModel:
        """A model by its name.

        Raises:
            UnknownModel: there is none.
        """
        return self._served(name).model

    def submit(
        self,
        model: str,
        inputs: Mapping[str, Any],
        timeout_s: float | None = None,
        arrived_s: float | None = None,
    ) -> Future[dict[str, np.ndarray]]:
        """Ask for an inference; the future has its outputs, or one of the errors of `requests`.

        Args:
            model: its name.
            inputs: an array for each input, as for `Library`; the first extent counts the rows.
            timeout_s: within which it is to be answered, in place of the model's SLO.
            arrived_s: when it was sent, on the clock of `time.monotonic`; now by default.

        Raises:
            UserError: the inputs do not fit the model.
            UnknownModel: there is no such model.
            Draining: the engine is closing.
            Refused: it cannot be answered in time, or the model's queue is full.
        """
        return self._submit(model, inputs, timeout_s, arrived_s)[1].future

    async def infer(
        self, model: str, inputs: Mapping[str, Any], timeout_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """The same for asyncio; a task that is cancelled takes its request out of the queue.

        Raises:
            Refused: it cannot be answered in time.
            RunFailed: its run failed.
            UserError, UnknownModel, Draining: as for `submit`.
        """
        queue, request = self._submit(model, inputs, timeout_s, None)
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            self._dispatcher.cancel(queue, request)
            raise

    def statistics(self, model: str) -> ModelStatistics:
        """What came of a model's requests so far.

        Raises:
            UnknownModel: there is none of that name.
        """
        queue = self._served(model).queue
        with self._dispatcher.lock:
            return queue.statistics.snapshot()

    def status(self) -> dict[str, Any]:
        """What goes on, for people: lanes, queues, rates, tails, the last changes of plan."""
        with self._dispatcher.lock:
            layout = self._dispatcher.layout
            lanes = [list(lane.cores) for lane in layout.lanes or ()]
            models = [self._model_status(queue) for queue in layout.queues]
        return {
            "policy": self._planned.policy,
            "cores": list(self._pool.cores),
            "lanes": lanes,
            "models": models,
            "headroom": self._planned.plan.headroom,
            "events": list(self.events),
        }

    def plan_dict(self) -> dict[str, Any]:
        """The plan that is carried out, as `tune plan --json` prints one."""
        return self._planned.plan.as_dict()

    def set_plan(self, facts: dict[str, Any]) -> None:
        """Carry out a given plan from now on, and plan no more.

        Raises:
            UserError: it is no plan, or not for these models on this device.
        """
        plan = plan_from_dict(facts, "the plan")
        with self._changing:
            self._check_open()
            self._fixed = True
            planned = with_plan(self._planned, plan, "the plan")
            self._carry_out(self._catalog, planned, "a plan was given")

    def replan(self, rates: Mapping[str, float], drift: Mapping[str, float], reason: str) -> bool:
        """Plan for other rates and run times; returns whether something changed.

        Args:
            rates: requests a second, by model.
            drift: factors on the run times of the curves, by model.
            reason: for the events.
        """
        with self._changing:
            if self._fixed or self._draining or set(rates) != set(self._catalog):
                return False
            self._carry_out(self._catalog, self._plan(rates, drift), reason)
            return True

    def load_model(self, name: str, folder: Path | None = None) -> None:
        """Add a model, or replace one by what its folder, or another one, holds now.

        Requests that wait for a model that is replaced are answered by the new one.

        Raises:
            UserError: the folder cannot be served; what was served before still is.
        """
        with self._changing:
            self._check_open()
            old = self._catalog.get(name)
            if folder is None and old is None:
                raise UnknownModel(f"there is no model {name!r}: give its folder to add it")
            slo_s = max(served.deployment.slo_s for served in self._catalog.values())
            told = old.deployment if old else Deployment((), slo_s, name)
            deployment = replace(told, name=name, folders=(folder,) if folder else told.folders)
            fresh = open_served(deployment, self._pool, self._curve_folder, self._queue_rows)
            catalog = {**self._catalog, name: fresh}
            rates = {**first_rates(catalog), **self._rates()}
            planned = self._plan(rates, catalog=catalog)
            self._carry_out(catalog, planned, f"{name} was {'replaced' if old else 'added'}")
            self._forget(old)

    def unload_model(self, name: str) -> None:
        """Serve a model no more; what waits for it is refused.

        Raises:
            UnknownModel: there is none of that name.
            UserError: it is the last one.
        """
        with self._changing:
            self._check_open()
            old = self._served(name)
            if len(self._catalog) == 1:
                raise UserError(f"{name} is the only model: stop the server instead")
            catalog = {key: each for key, each in self._catalog.items() if key != name}
            planned = self._plan(self._rates(), catalog=catalog)
            self._carry_out(catalog, planned, f"{name} was removed")
            self._forget(old)

    def close(self, timeout_s: float = 30.0) -> None:
        """Accept nothing more, answer what waits, end the threads."""
        with self._changing:
            if self._draining:
                return
            self._draining = True
        self._controller.stop()
        self._dispatcher.drain(timeout_s)
        self._pool.close()

    @property
    def dispatcher(self) -> Dispatcher:
        """Queues and lanes, for the controller and for measurements."""
        return self._dispatcher

    @property
    def catalog(self) -> Mapping[str, Served]:
        """The models with what is known of them."""
        return self._catalog

    @property
    def planned(self) -> EnginePlan:
        """What is carried out."""
        return self._planned

    def _submit(
        self, model: str, inputs: Mapping[str, Any], timeout_s: float | None, at_s: float | None
    ) -> tuple[ModelQueue, Request]:
        while True:
            self._check_open()
            queue = self._served(model).queue
            arrays, rows = queue.model.check(inputs, queue.slots.size // 2)
            arrived_s = time.monotonic() if at_s is None else at_s
            within_s = queue.model.slo_s if timeout_s is None else timeout_s
            request = Request(model, rows, arrived_s, arrived_s + within_s, Future())
            try:
                self._dispatcher.submit(queue, request, arrays)
                return queue, request
            except Draining:
                served = self._catalog.get(model)
                if served is not None and served.queue is queue:
                    raise
                # it was replaced meanwhile: ask the new one

    def _check_open(self) -> None:
        if self._draining:
            raise Draining("the server is stopping: send it elsewhere")

    def _served(self, name: str) -> Served:
        served = self._catalog.get(name)
        if served is None:
            known = ", ".join(sorted(self._catalog))
            raise UnknownModel(f"there is no model {name!r} (models: {known})")
        return served

    def _plan(
        self,
        rates: Mapping[str, float],
        drift: Mapping[str, float] | None = None,
        catalog: Mapping[str, Served] | None = None,
    ) -> EnginePlan:
        models = self._catalog if catalog is None else catalog
        device = PlanDevice("cores", len(self._pool.cores), "core", 1)
        demands = [served.demand(rates[name]) for name, served in models.items()]
        curves = {
            name: scaled(served.curve, (drift or {}).get(name, 1.0))
            for name, served in models.items()
        }
        return make_engine_plan(device, demands, curves, self._policy, self._margin)

    def _rates(self) -> dict[str, float]:
        demands = self._planned.work.demands
        return {demand.model: demand.rate_per_s for demand in demands}

    def _carry_out(self, catalog: dict[str, Served], planned: EnginePlan, reason: str) -> None:
        """Prepare the lanes of a plan while the present ones serve, then switch."""
        queues = [catalog[demand.model].queue for demand in planned.work.demands]
        layout = planned.layout(queues, self._pool)
        self._catalog, self._planned = catalog, planned
        self._dispatcher.switch(layout)
        plan = planned.plan
        widths = "+".join(str(lane.units) for lane in plan.lanes)
        self.note("plan", f"{reason}: lanes of {widths} cores, headroom {plan.headroom:.2f}")

    def _prepare_every_lane(self) -> None:
        """So that no later plan has to open anything while requests wait."""
        if len(self._pool.cores) > _ALL_LANES:
            return
        for width in range(1, len(self._pool.cores) + 1):
            for lane in self._pool.side_by_side([width] * (len(self._pool.cores) // width)):
                lane.prepare(self.models)

    def _forget(self, served: Served | None) -> None:
        if served is not None:
            for lane in self._pool.every():
                lane.forget(served.model)

    def note(self, kind: str, text: str) -> None:
        """Add to the events."""
        self.events.append({"time": time.time(), "kind": kind, "text": text})

    def _model_status(self, queue: ModelQueue) -> dict[str, Any]:
        counts = queue.statistics
        latencies = sorted(queue.latencies)
        p99 = latencies[int(0.99 * (len(latencies) - 1))] if latencies else 0.0
        return {
            "name": queue.model.name,
            "slo_ms": 1e3 * queue.model.slo_s,
            "waiting": len(queue.rows),
            "rate_per_s": self._controller.rate(queue.model.name),
            "p99_ms": 1e3 * p99,
            "answered": counts.success.count,
            "good": counts.good,
            "refused": counts.refused + counts.full + counts.expired,
            "failed": counts.fail.count,
            "drift": queue.drift,
        }
