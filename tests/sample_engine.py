"""An engine in NumPy, for tests of the front ends: a few models, and faults to order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.model.importer import TensorSpec
from gpu_aware_tune.serving.requests import UnknownModel
from gpu_aware_tune.serving.statistics import ModelStatistics

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class SampleModel:
    """A model that is a function of arrays."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    function: Callable[[Mapping[str, np.ndarray]], Arrays]
    slo_s: float = 0.1
    version: str = "1"
    folders: tuple[Path, ...] = ()


AFFINE = SampleModel(
    "affine",
    (TensorSpec("x", (-1, 4), "float32"),),
    (TensorSpec("y", (-1, 4), "float32"),),
    8,
    lambda inputs: {"y": inputs["x"] * 2 + 1},
)
PAIR = SampleModel(
    "pair",
    (TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (2, 3), "float32")),
    (TensorSpec("sum", (2, 3), "float32"), TensorSpec("difference", (2, 3), "float32")),
    0,
    lambda inputs: {
        "sum": inputs["a"] + inputs["b"],
        "difference": inputs["a"] - inputs["b"],
    },
)


def typed_model(dtype: str) -> SampleModel:
    """A model that returns its input, of a type."""
    spec = TensorSpec("x", (2, 2), dtype)
    return SampleModel(dtype, (spec,), (spec,), 0, lambda inputs: {"x": inputs["x"].copy()})


class SampleEngine:
    """See `ServingEngine`; `delay_s` makes it slow, `error` makes it fail."""

    def __init__(self, *models: SampleModel) -> None:
        self._models = {model.name: model for model in models or (AFFINE, PAIR)}
        self._statistics = {name: ModelStatistics() for name in self._models}
        self.is_ready = True
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.running = 0
        self.cancelled = 0
        self.timeout_s: float | None = None
        self.plan: dict[str, Any] = {"format": 1, "lanes": []}
        self.loaded: list[tuple[str, Path | None]] = []

    @property
    def models(self) -> tuple[SampleModel, ...]:
        return tuple(self._models.values())

    def model(self, name: str) -> SampleModel:
        try:
            return self._models[name]
        except KeyError:
            raise UnknownModel(f"no model {name}; there are {', '.join(self._models)}") from None

    async def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], timeout_s: float | None = None
    ) -> Arrays:
        found = self.model(model)
        self.timeout_s = timeout_s
        rows = len(next(iter(inputs.values()))) if found.max_batch else 1
        if rows > max(found.max_batch, 1):
            raise UserError(f"a request of {rows} rows: {model} takes up to {found.max_batch}")
        begin_s = time.perf_counter()
        self.running += 1
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            self._statistics[model].cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error
        outputs = found.function(inputs)
        seconds = time.perf_counter() - begin_s
        self._statistics[model].ran(rows, seconds)
        self._statistics[model].run.add(seconds)
        self._statistics[model].queue.add(0.0)
        self._statistics[model].answered(seconds, True)
        return outputs

    def statistics(self, model: str) -> ModelStatistics:
        return self._statistics[self.model(model).name].snapshot()

    def status(self) -> dict[str, Any]:
        models = [
            {"name": name, "waiting": 0, "rate_per_s": 0.0, "p99_ms": 1.5, "drift": 1.0}
            for name in self._models
        ]
        return {
            "policy": "sample",
            "cores": [0, 1, 2, 3],
            "lanes": [[0], [1, 2, 3]],
            "models": models,
            "headroom": 2.0,
            "events": [],
        }

    def plan_dict(self) -> dict[str, Any]:
        return self.plan

    def set_plan(self, facts: dict[str, Any]) -> None:
        if facts.get("format") != 1:
            raise UserError("plan: format is 1")
        self.plan = facts

    def load_model(self, name: str, folder: Path | None) -> None:
        self.loaded.append((name, folder))

    def unload_model(self, name: str) -> None:
        self.loaded.remove((self.model(name).name, None))
