"""Random planning problems, the same for the same seed."""

from __future__ import annotations

import dataclasses
import os
import random

from gpu_aware_tune.planning.curve_file import MeasuredCurve, MeasuredPoint
from gpu_aware_tune.planning.demand import Demand
from gpu_aware_tune.planning.device import PlanDevice
from gpu_aware_tune.planning.lanes import Workload
from gpu_aware_tune.planning.planner import workload

INSTANCES = int(os.environ.get("PLAN_INSTANCES", "40"))  # 1000 for the full check: ten minutes
GPU = PlanDevice("GPU", 132)
_DEVICES = (GPU, PlanDevice("half GPU", 66, "SM", 2), PlanDevice("CPU", 16, "core", 1))


def curve(
    name: str, device: PlanDevice, knee: float = 0.4, run_ms: float = 28.0, fixed: float = 0.25
) -> MeasuredCurve:
    """A curve with a sharp knee: `run_ms` at the knee at batch 16, of which a part is fixed."""
    points = []
    for units in device.widths:
        slower = max(1.0, knee * device.units / units)
        for batch in (1, 2, 4, 8, 16):
            ms = run_ms * (fixed + (1 - fixed) * batch / 16 * slower)
            points.append(MeasuredPoint(units, batch, ms, 1.03 * ms))
    return MeasuredCurve(name, device.name, device.unit, device.units, tuple(points))


def rough_curve(name: str, device: PlanDevice, draw: random.Random) -> MeasuredCurve:
    """A curve as measured ones are: few widths, noise, and now and then more units are slower."""
    smooth = curve(
        name, device, draw.uniform(0.1, 0.7), draw.uniform(5, 60), draw.uniform(0.05, 0.5)
    )
    widths = sorted(draw.sample(device.widths, min(len(device.widths), draw.randint(3, 9))))
    points = [
        dataclasses.replace(
            point,
            latency_ms=(latency_ms := point.latency_ms * draw.uniform(0.93, 1.07)),
            p90_ms=latency_ms * draw.uniform(1.0, 1.15),
        )
        for point in smooth.points
        if point.units in widths
    ]
    return dataclasses.replace(smooth, points=tuple(points))


def instance(seed: int, count: int | None = None) -> Workload:
    """A random workload of 1 to 8 models, each of which fits the device on its own."""
    draw = random.Random(seed)
    device = draw.choice(_DEVICES)
    curves, demands = [], []
    for place in range(count or draw.randint(1, 8)):
        made = rough_curve(f"m{place}", device, draw)
        fastest_ms = min(point.p90_ms for point in made.points if point.batch == 1)
        slo_s = 1e-3 * fastest_ms * draw.uniform(2.5, 12)
        cv = draw.choice([0.0, 0.0, 0.5, 1.0])
        rate = draw.uniform(0.05, 1.0) * 1e3 / fastest_ms
        demands.append(Demand(made.model, rate, slo_s, weight=draw.uniform(0.5, 2), cv=cv))
        curves.append(made)
    return workload(device, demands, curves)


def scaled(work: Workload, factor: float) -> Workload:
    """The same workload at so many times its rates."""
    demands = [
        dataclasses.replace(demand, rate_per_s=demand.rate_per_s * factor)
        for demand in work.demands
    ]
    return dataclasses.replace(work, demands=tuple(demands))
