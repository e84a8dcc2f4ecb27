"""The models of an engine: what was asked for, the opened folders, curves and queues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.curve_file import MeasuredCurve
from gpu_aware_tune.planning.demand import Demand
from gpu_aware_tune.planning.fleet import find_curve
from gpu_aware_tune.serving.deployments import Deployment
from gpu_aware_tune.serving.lanes import LanePool
from gpu_aware_tune.serving.measuring import measure_curve
from gpu_aware_tune.serving.model_queue import ModelQueue
from gpu_aware_tune.serving.served_model import ServedModel, open_model


@dataclass(frozen=True, eq=False)
class Served:
    """A model that is served."""

    deployment: Deployment
    curve: MeasuredCurve
    queue: ModelQueue

    @property
    def model(self) -> ServedModel:
        """The opened folders."""
        return self.queue.model

    def demand(self, rate_per_s: float) -> Demand:
        """What the planner is asked for."""
        told = self.deployment
        return Demand(self.model.name, rate_per_s, told.slo_s, told.percentile, told.weight)


def open_served(
    deployment: Deployment, pool: LanePool, curve_folder: Path | None, queue_rows: int
) -> Served:
    """Open a model's folders; measure its curve if there is no folder of curves.

    Raises:
        UserError: it cannot be served here.
    """
    model = open_model(deployment.folders, deployment.slo_s, deployment.name)
    widths = range(1, len(pool.cores) + 1)
    curve = (
        measure_curve(model, pool, widths)
        if curve_folder is None
        else _known_curve(model, curve_folder, len(pool.cores))
    )
    return Served(deployment, curve, ModelQueue(model, queue_rows))


def first_rates(catalog: Mapping[str, Served]) -> dict[str, float]:
    """As told; otherwise rates at which every model takes the same part of half of the device."""
    rates = {}
    for name, served in catalog.items():
        fastest_ms = min(point.latency_ms / point.batch for point in served.curve.points)
        equal = 1e3 / fastest_ms / (2 * len(catalog))
        rates[name] = served.deployment.rate_per_s or equal
    return rates


def _known_curve(model: ServedModel, folder: Path, cores: int) -> MeasuredCurve:
    """The curve that `tune profile --save` left."""
    curve = find_curve(model.variants[0].path, folder)
    if (curve.unit, curve.units_total) != ("core", cores):
        raise UserError(
            f"the curve of {model.name} is of {curve.units_total} {curve.unit}s, this engine has"
            f" {cores} cores: profile it here, or leave --curves out"
        )
    return MeasuredCurve(model.name, curve.device, curve.unit, curve.units_total, curve.points)
