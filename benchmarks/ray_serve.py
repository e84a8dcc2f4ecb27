"""Plain Ray Serve as a side of `benchmarks.serving`: what a careful user would write with it.

A deployment for each model, one replica each, bound to one core in turns, with `@serve.batch`; called
through its handle, without the HTTP proxy, which would cost more. Nothing refuses a request that comes too
late.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.outcome import Outcome
from gpu_aware_tune.serving.load import Tally, as_outcome, send_as_planned

_LAST_ANSWER_S = 30.0


class Replica:
    """A tuned library on one core."""

    def __init__(self, folder: str, core: int) -> None:
        os.sched_setaffinity(0, {core})
        from gpu_aware_tune.library import load

        self._library = load(folder, units=1)

    async def __call__(self, requests: list[Mapping[str, np.ndarray]]) -> list[Any]:
        """A batch; batch sizes are compiled in, so its requests run one after the other."""
        return [self._library(inputs) for inputs in requests]


@contextlib.contextmanager
def ray_serve(folders: Sequence[Path], cores: Sequence[int]) -> Iterator[list[Any]]:
    """The handles of a running application for each model."""
    import ray
    from ray import serve

    ray.init(address="local", num_cpus=len(cores), include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        handles = []
        for number, folder in enumerate(folders):

            @serve.deployment(
                name=f"model{number}",
                ray_actor_options={"num_cpus": len(cores) / len(folders) * 0.9},
                max_ongoing_requests=1000,
                logging_config={"log_level": "CRITICAL", "enable_access_log": False},
            )
            class Model(Replica):
                @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.002)
                async def __call__(self, requests: list[Mapping[str, np.ndarray]]) -> list[Any]:
                    return await super().__call__(requests)

            core = cores[number % len(cores)]
            bound = Model.bind(str(folder), core)  # type: ignore[attr-defined]
            handles.append(serve.run(bound, name=f"app{number}", route_prefix=None))
        yield handles
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()


async def drive(
    handles: Sequence[Any],
    names: Sequence[str],
    slo_s: Sequence[float],
    streams: Sequence[Floats],
    inputs: Mapping[str, Mapping[str, np.ndarray]],
    seconds: float,
) -> tuple[Outcome, float]:
    """Send the requests as planned; see `serving.load.drive_engine`."""
    tallies = [Tally() for _ in names]

    async def send(model: int, planned_s: float) -> None:
        try:
            await asyncio.wait_for(
                handles[model].remote(dict(inputs[names[model]])), _LAST_ANSWER_S
            )
            tallies[model].answered(time.monotonic() - planned_s, slo_s[model])
        except Exception:  # Ray has many; the request was not answered
            tallies[model].failed += 1

    late_s = await send_as_planned(streams, send)
    return as_outcome("ray-serve", names, streams, tallies, seconds), late_s
