"""What front ends need of an engine; `Engine` has it, and so has any other source of answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from gpu_aware_tune.model.importer import TensorSpec
    from gpu_aware_tune.serving.statistics import ModelStatistics


class ModelFacts(Protocol):
    """What clients may know of a served model; see `ServedModel`."""

    @property
    def name(self) -> str:
        """As clients call it."""

    @property
    def version(self) -> str:
        """The only version there is."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The leading extent is -1 where requests may have any number of rows."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Likewise."""

    @property
    def max_batch(self) -> int:
        """The most rows of one run; 0 where the leading axis is no batch."""

    @property
    def slo_s(self) -> float:
        """Within which a request is to be answered unless it says otherwise."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where it was loaded from."""


class ServingEngine(Protocol):
    """The calls of `Engine` that front ends make, all from one event loop or a thread of it."""

    @property
    def models(self) -> tuple[ModelFacts, ...]:
        """All models."""

    @property
    def is_ready(self) -> bool:
        """Requests are taken."""

    def model(self, name: str) -> ModelFacts:
        """One model; raises UnknownModel."""

    async def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], timeout_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """Answer one request; cancelling the task drops it before it runs."""

    def statistics(self, model: str) -> ModelStatistics:
        """A snapshot of a model's counts."""

    def status(self) -> dict[str, Any]:
        """What `tune watch` shows, for JSON."""

    def plan_dict(self) -> dict[str, Any]:
        """The plan being run, for JSON."""

    def set_plan(self, facts: dict[str, Any]) -> None:
        """Run another plan; raises UserError where it cannot be used."""

    def load_model(self, name: str, folder: Path | None) -> None:
        """Add a model, or replace it by a newly tuned folder; blocks."""

    def unload_model(self, name: str) -> None:
        """Remove a model once its requests are answered; blocks."""
