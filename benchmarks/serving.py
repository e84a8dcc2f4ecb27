"""Goodput of the engine under every policy, in turns, on this machine's cores; and the simulator's.

    python -m benchmarks.serving a.tuned b.tuned ...             # half an hour for four models
    python -m benchmarks.serving a.tuned b.tuned ... --quick     # a few minutes; nothing is written
    python -m benchmarks.serving a.tuned b.tuned ... --ray       # and plain Ray Serve (ray[serve])

Open-loop arrivals are drawn beforehand and are the same for every side; latency counts from the planned
arrival. Each model gets an equal part of the work; the load is in parts of what any schedule could carry
(`Plan.headroom_limit`). An SLO is 2.5 or 5 times the model's latency on one core. Sides:

plan           the plan's policy, which is told no rates and adapts
plan-fixed     the plan for the mean rates, which never changes
equal-shares, gslice, d-stack, temporal-fifo    the baselines of `planning.policies`, told the mean rates
ray-serve      a replica a model, on one core each in turns, `@serve.batch`, called through its handle

With two cores a lane is one core wide or two. What is sent late is the generator's fault: cells in which
it was late by more than 5 ms (p99) are marked, and count for no side. For the sides that do not adapt the
same streams are simulated with the same curves and policy: that is the simulator's fidelity.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, environment, stamp, write_results
from benchmarks.ray_serve import drive, ray_serve
from gpu_aware_tune.partition import usable_cores
from gpu_aware_tune.planning.arrivals import draw_streams, parse_arrivals
from gpu_aware_tune.planning.curve import Floats
from gpu_aware_tune.planning.curve_file import MeasuredCurve
from gpu_aware_tune.planning.outcome import Outcome
from gpu_aware_tune.planning.simulator import curve_durations, simulate
from gpu_aware_tune.serving.deployments import Deployment
from gpu_aware_tune.serving.engine import Engine
from gpu_aware_tune.serving.load import drive_engine, random_arrays
from gpu_aware_tune.serving.server import SWITCH_INTERVAL_S

SIDES = {
    "plan": ("plan", True),
    "plan-fixed": ("plan", False),
    "equal-shares": ("equal-shares", False),
    "gslice": ("gslice", False),
    "d-stack": ("d-stack", False),
    "temporal-fifo": ("temporal-fifo", False),
}
ARRIVALS = ("poisson", "gamma:4", "square:3:4")
RAY = "ray-serve"
_LATE_S = 0.005


def main() -> None:
    """Run every cell on every side in turns, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--slo", type=float, nargs="+", default=[5.0, 2.5], help="x 1-core latency")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.2, 0.6, 1.0, 1.4])
    parser.add_argument("--arrivals", nargs="+", default=list(ARRIVALS))
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--ray", action="store_true", help="plain Ray Serve, too")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving.json")
    args = parser.parse_args()
    if args.quick:
        args.slo, args.loads, args.seeds, args.seconds = [5.0], [0.6, 1.2], 1, 5.0
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as `tune serve` does
    about, rows = environment(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        curves = Path(folder)
        args.handles = None
        if args.ray:
            args.sides = [*args.sides, RAY]
            args.handles = stack.enter_context(ray_serve(args.folders, usable_cores()))
        latency_s = measure(args.folders, curves)
        for slo in args.slo:
            for load in args.loads:
                for arrivals in args.arrivals:
                    cell = Cell(args, curves, latency_s, slo, load, arrivals)
                    for seed in range(args.seeds):
                        rows += cell.run(seed)
                    print(cell.line(rows), flush=True)
                    if not args.quick:
                        facts = {"latency_s": latency_s, "rows": rows, "measured": stamp(about)}
                        write_results(args.results, about, facts)
    print_summary(rows)


def measure(folders: Sequence[Path], curves: Path) -> dict[str, float]:
    """Measure and keep every model's curve; returns its latency on one core."""
    found = {}
    with Engine([Deployment((folder,), 10.0) for folder in folders], adaptive=False) as engine:
        for name, served in engine.catalog.items():
            write_curve(served.curve, curves / f"{name}.json")
            found[name] = 1e-3 * served.curve.points[0].latency_ms
    return found


def write_curve(curve: MeasuredCurve, path: Path) -> None:
    """As `tune profile --save` does."""
    points = [vars(point) for point in curve.points]
    with path.open("w") as file:
        json.dump({**vars(curve), "points": points}, file)


class Cell:
    """One SLO, load and kind of arrivals."""

    def __init__(
        self, args: argparse.Namespace, curves: Path, latency_s: dict[str, float],
        slo: float, load: float, arrivals: str,
    ) -> None:  # fmt: skip
        self.args, self.curves, self.arrivals = args, curves, parse_arrivals(arrivals)
        self.key = {"slo": slo, "load": load, "arrivals": arrivals}
        self.names = list(latency_s)
        self.slo_s = [slo * seconds for seconds in latency_s.values()]
        self.rates = [1 / seconds for seconds in latency_s.values()]
        with self.engine("plan-fixed") as engine:
            limit = engine.planned.plan.headroom_limit
        self.rates = [load * limit * rate for rate in self.rates]

    def engine(self, side: str) -> Engine:
        policy, adaptive = SIDES[side]
        rows = zip(self.args.folders, self.slo_s, self.rates, strict=True)
        deployments = [
            Deployment((folder,), slo_s, rate_per_s=None if adaptive else rate)
            for folder, slo_s, rate in rows
        ]
        return Engine(deployments, policy=policy, adaptive=adaptive, curves=self.curves)

    def run(self, seed: int) -> list[dict[str, Any]]:
        """Every side once on the same arrivals; who begins changes."""
        seconds = self.args.seconds
        streams = draw_streams(self.arrivals, self.rates, seconds, seed)
        sides = self.args.sides[seed % len(self.args.sides) :]
        sides += self.args.sides[: seed % len(self.args.sides)]
        return [self.side(side, seed, streams, seconds) for side in sides]

    def side(self, side: str, seed: int, streams: list[Floats], seconds: float) -> dict[str, Any]:
        if side == RAY:
            sent = drive(self.args.handles, self.names, self.slo_s, streams, self.inputs(), seconds)
            outcome, late_s = asyncio.run(sent)
            return {**self.key, "side": side, "seed": seed, "late_s": late_s, **outcome.as_dict()}
        with self.engine(side) as engine:
            inputs = random_arrays(engine)
            outcome, late_s = drive_engine(engine, self.names, streams, inputs, seconds)
            facts = {**self.key, "side": side, "seed": seed, "late_s": late_s, **outcome.as_dict()}
            planned = engine.planned
            if not SIDES[side][1]:
                simulated = simulate(
                    planned.fresh_policy(), planned.work, streams, seconds,
                    curve_durations(planned.work, seed=seed),
                )  # fmt: skip
                facts["simulated"] = fidelity(outcome, simulated)
        return facts

    def inputs(self) -> dict[str, dict[str, np.ndarray]]:
        """What is sent to each model."""
        with self.engine("plan-fixed") as engine:
            return random_arrays(engine)

    def line(self, rows: list[dict[str, Any]]) -> str:
        """The sides' goodput in this cell."""
        own = [row for row in rows if all(row[key] == value for key, value in self.key.items())]
        cells = []
        for side in self.args.sides:
            found = [row["goodput_per_s"] for row in own if row["side"] == side]
            cells.append(f"{side} {statistics.median(found):.1f}")
        late = sum(row["late_s"] > _LATE_S for row in own)
        head = f"slo x{self.key['slo']:g} load {self.key['load']:g} {self.key['arrivals']}"
        offered = f"offered {sum(self.rates):.1f}"
        return f"{head}: {offered}; {', '.join(cells)}{f' ({late} sent late)' if late else ''}"


def fidelity(real: Outcome, simulated: Outcome) -> dict[str, float]:
    """How far the simulator is from the real run: attainment in points, p99 as a ratio."""
    tails = [
        one.latency_at(99) / other.latency_at(99)
        for one, other in zip(simulated.models, real.models, strict=True)
        if other.latency_at(99) and one.latency_at(99)
    ]
    return {
        "attainment": simulated.attainment,
        "difference": simulated.attainment - real.attainment,
        "p99_ratio": float(np.median(tails)) if tails else 0.0,
    }


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Ratios over cells: ours to each side, and the simulator to the real runs."""
    clean = [row for row in rows if row["late_s"] <= _LATE_S]
    print(f"{len(clean)} of {len(rows)} runs were sent in time")
    cells: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in clean:
        key = row["slo"], row["load"], row["arrivals"]
        cells.setdefault(key, {}).setdefault(row["side"], []).append(row["goodput_per_s"])
    medians = {
        key: {side: statistics.median(found) for side, found in sides.items()}
        for key, sides in cells.items()
    }
    for side in dict.fromkeys(row["side"] for row in rows):
        ratios = [m["plan"] / m[side] for m in medians.values() if m.get(side) and "plan" in m]
        if ratios and side != "plan":
            print(
                f"plan / {side}: median {statistics.median(ratios):.2f},"
                f" least {min(ratios):.2f}, most {max(ratios):.2f} over {len(ratios)} cells"
            )
    gaps = [abs(row["simulated"]["difference"]) for row in clean if "simulated" in row]
    tails = [row["simulated"]["p99_ratio"] for row in clean if "simulated" in row]
    if gaps:
        print(
            f"simulator: attainment off by {100 * statistics.median(gaps):.1f} points in the median,"
            f" {100 * max(gaps):.1f} at most; p99 {statistics.median(tails):.2f} times the real one"
            f" in the median ({min(tails):.2f} to {max(tails):.2f})"
        )


if __name__ == "__main__":
    main()
