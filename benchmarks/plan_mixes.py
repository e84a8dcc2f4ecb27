"""Goodput of every policy on mixes of models: ours, D-STACK, GSLICE and others, and an upper bound.

    python benchmarks/plan_mixes.py            # about a quarter of an hour on one core
    python benchmarks/plan_mixes.py --quick    # a minute; nothing is written

Nothing here is run on a GPU. The simulator drives the policies, the one that serves among them, with
latencies from curves:

knee       mixes of 2, 3, 4 and 7 models on 132 SMs. Knees, SLOs and run times are those of D-STACK's
           models as we recall them, not measurements. A quarter of a run at batch 16 is fixed, the rest
           is in proportion to the batch, and to 1 / SMs up to the knee. 90th percentile: 5 % more.
amdahl     the same models, but with the parallel part that puts the knee (5 % above the whole device)
           where it is told: the shape that published H200 curves have.
packrat    measured mean latencies of four models on 1 to 16 CPU cores, from Packrat's repository (its
           commit is in data/packrat-cloudlab.json). An SLO is twice one request's latency on one core.

Each model gets an equal part of the device's work, and the load is in parts of the largest load that
any schedule could carry (`headroom_bound`). The bound on goodput is the linear program's, or all that
was offered. Arrivals are the same for every policy. Figures go to benchmarks/results/plan-mixes.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environment import environment, write_results  # noqa: E402
from gpu_aware_tune.planning.arrivals import parse_arrivals  # noqa: E402
from gpu_aware_tune.planning.bounds import goodput_bound, headroom_bound  # noqa: E402
from gpu_aware_tune.planning.curve_file import MeasuredCurve, MeasuredPoint  # noqa: E402
from gpu_aware_tune.planning.demand import Demand  # noqa: E402
from gpu_aware_tune.planning.device import PlanDevice  # noqa: E402
from gpu_aware_tune.planning.lanes import Workload  # noqa: E402
from gpu_aware_tune.planning.planner import plan_workload, workload  # noqa: E402
from gpu_aware_tune.planning.policies import POLICIES, make_policy  # noqa: E402
from gpu_aware_tune.planning.schedule import PlanObjective  # noqa: E402
from gpu_aware_tune.planning.search import cheapest_cost  # noqa: E402
from gpu_aware_tune.planning.simulator import curve_durations, draw_arrivals, simulate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "plan-mixes.json"
PACKRAT = ROOT / "benchmarks" / "data" / "packrat-cloudlab.json"

GPU = PlanDevice("H100", 132)
CPU = PlanDevice("CloudLab CPU", 16, "core", 1)

RECALLED = {  # knee in parts of the device, SLO in ms, run at the knee at batch 16 in ms
    "mobilenet": (0.20, 25, 10),
    "alexnet": (0.30, 25, 8),
    "bert": (0.30, 25, 9),
    "resnet18": (0.30, 25, 12),
    "inception": (0.40, 50, 25),
    "resnet50": (0.40, 50, 28),
    "vgg19": (0.50, 100, 55),
}
FIXED, TAIL = 0.25, 1.05
KNEE_WITHIN = 0.05
MIXES = {
    "2": ["mobilenet", "resnet50"],
    "3": ["alexnet", "resnet50", "vgg19"],
    "4": ["mobilenet", "alexnet", "resnet50", "vgg19"],
    "7": list(RECALLED),
}
CPU_MIXES = {
    "2": ["resnet", "bert"],
    "3": ["resnet", "inception", "bert"],
    "4": ["resnet", "inception", "bert", "gpt2"],
}
CASES = [  # arrivals, and the load in parts of what any schedule could carry
    *(("poisson", load) for load in (0.5, 0.7, 0.8, 0.9, 1.0, 1.2)),
    ("gamma:4", 0.5),
    ("gamma:4", 0.9),
    ("square:3:0.5", 0.5),
    ("square:3:0.5", 0.9),
]
TEMPORAL = ("temporal-fifo", "temporal-rr")
D_STACK = ("d-stack", "d-stack-knee")


def main() -> None:
    """Simulate every mix, print a line for each, write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=30_000, help="simulated in each case")
    parser.add_argument("--quick", action="store_true", help="two loads, fewer requests, no file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    requests = 6_000 if args.quick else args.requests
    cases = [("poisson", 0.7), ("poisson", 0.9)] if args.quick else CASES
    about = environment()
    rows: list[dict[str, Any]] = []
    for family, mix, device, curves, slo_ms in mixes():
        work = balanced(device, curves, slo_ms)
        limit = headroom_bound(work, planned=False).value
        for number, (arrivals, load) in enumerate(cases):
            row = one_case(scaled(work, limit * load), arrivals, requests, number)
            rows.append({"curves": family, "mix": mix, "arrivals": arrivals, "load": load, **row})
            print(line(rows[-1]), flush=True)
            if not args.quick:
                facts = {"requests": requests, "summary": summary(rows), "rows": rows}
                write_results(args.results, about, facts)
    print(json.dumps(summary(rows), indent=1))


def mixes() -> Iterator[tuple[str, str, PlanDevice, list[MeasuredCurve], list[float]]]:
    """Every family of curves with every mix."""
    for family in ("knee", "amdahl"):
        for mix, names in MIXES.items():
            curves = [recalled_curve(name, family) for name in names]
            yield family, mix, GPU, curves, [RECALLED[name][1] for name in names]
    measured = json.loads(PACKRAT.read_text())["latency_ms"]
    for mix, names in CPU_MIXES.items():
        curves = [packrat_curve(name, measured[name]) for name in names]
        yield "packrat", mix, CPU, curves, [2 * measured[name]["1"][0] for name in names]


def recalled_curve(name: str, family: str) -> MeasuredCurve:
    """A curve of the recalled shape, at every width that a lane may have."""
    knee, _, knee_ms = RECALLED[name]
    at = knee * GPU.units
    points = []
    for units in GPU.widths:
        if family == "knee":
            slower = at / min(units, at)
        else:  # serial + parallel / units, within 5 % of the whole device at the knee
            grown = 1 + KNEE_WITHIN
            parallel = KNEE_WITHIN / (1 / at - grown / GPU.units)
            slower = (1 + parallel / units) / (1 + parallel / at)
        for batch in (1, 2, 4, 8, 16):
            latency_ms = knee_ms * (FIXED + (1 - FIXED) * batch / 16 * slower)
            if family == "amdahl":
                latency_ms = knee_ms * (FIXED + (1 - FIXED) * batch / 16) * slower
            points.append(MeasuredPoint(units, batch, latency_ms, TAIL * latency_ms))
    return MeasuredCurve(name, GPU.name, "SM", GPU.units, tuple(points))


def packrat_curve(name: str, by_batch: dict[str, list[float]]) -> MeasuredCurve:
    """A measured curve; the source has means and no percentiles."""
    points = [
        MeasuredPoint(cores, int(batch), latency_ms, latency_ms)
        for batch, line_ms in by_batch.items()
        for cores, latency_ms in enumerate(line_ms, 1)
    ]
    return MeasuredCurve(name, CPU.name, "core", CPU.units, tuple(points))


def balanced(device: PlanDevice, curves: list[MeasuredCurve], slo_ms: list[float]) -> Workload:
    """A workload in which every model needs an equal part of the device."""
    demands = [
        Demand(curve.model, 1.0, 1e-3 * slo) for curve, slo in zip(curves, slo_ms, strict=True)
    ]
    work = workload(device, demands, curves)
    parts = device.units / (len(demands) * cheapest_cost(work))
    demands = [
        dataclasses.replace(demand, rate_per_s=float(part))
        for demand, part in zip(demands, parts, strict=True)
    ]
    return dataclasses.replace(work, demands=tuple(demands))


def scaled(work: Workload, factor: float) -> Workload:
    """The same at so many times the rates."""
    demands = [
        dataclasses.replace(demand, rate_per_s=demand.rate_per_s * factor)
        for demand in work.demands
    ]
    return dataclasses.replace(work, demands=tuple(demands))


def one_case(work: Workload, arrivals: str, requests: int, seed: int) -> dict[str, Any]:
    """Simulate every policy under one load."""
    seconds = requests / sum(demand.rate_per_s for demand in work.demands)
    streams = draw_arrivals(work, parse_arrivals(arrivals), seconds, seed)
    made = plan_workload(work, why=False)
    greedy = plan_workload(work, PlanObjective.GOODPUT, why=False)
    counts = [len(stream) for stream in streams]
    offered = sum(counts) / seconds
    bound = most_goodput(work, counts, seconds)
    policies = {name: make_policy(name, work, made) for name in POLICIES}
    policies["plan-goodput"] = make_policy("plan", work, greedy)
    found = {}
    for name, policy in policies.items():
        outcome = simulate(policy, work, streams, seconds, curve_durations(work, seed=seed))
        found[name] = {
            "goodput_per_s": round(outcome.goodput_per_s, 1),
            "attainment": round(outcome.attainment, 4),
            "worst_model": round(min(model.attainment for model in outcome.models), 4),
            "utilisation": round(outcome.utilisation, 3),
            "fairness": round(outcome.fairness, 3),
        }
    return {
        "seconds": round(seconds, 2),
        "offered_per_s": round(offered, 1),
        "bound_per_s": round(bound, 1),
        "headroom": round(made.headroom, 3),
        "policies": found,
    }


def most_goodput(work: Workload, counts: list[int], seconds: float) -> float:
    """What no policy can pass on these arrivals; the last ones are answered after the end."""
    longer = 1 + max(demand.slo_s for demand in work.demands) / seconds
    demands = [
        dataclasses.replace(demand, rate_per_s=max(count, 1) / seconds / longer)
        for demand, count in zip(work.demands, counts, strict=True)
    ]
    bound = goodput_bound(dataclasses.replace(work, demands=tuple(demands))).value
    return min(bound * longer, sum(counts) / seconds)


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Our goodput over that of others, and over the bound."""
    good = {name: each["goodput_per_s"] for name, each in row["policies"].items()}
    temporal, d_stack = (max(good[name] for name in kind) for kind in (TEMPORAL, D_STACK))
    others = {name: value for name, value in good.items() if not name.startswith("plan")}
    return {
        "of_bound": good["plan"] / row["bound_per_s"],
        "over_d_stack": good["plan"] / d_stack,
        "over_temporal": good["plan"] / temporal,
        "over_best_other": good["plan"] / max(others.values()),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By curves, arrivals and load: the least and the median ratio over the mixes."""
    keys = dict.fromkeys((row["curves"], row["arrivals"], row["load"]) for row in rows)
    found = []
    for curves, arrivals, load in keys:
        chosen = [
            ratios(row)
            for row in rows
            if (row["curves"], row["arrivals"], row["load"]) == (curves, arrivals, load)
        ]
        entry: dict[str, Any] = {"curves": curves, "arrivals": arrivals, "load": load}
        for name in chosen[0]:
            values = [each[name] for each in chosen]
            entry[name] = {
                "least": round(min(values), 3),
                "median": round(statistics.median(values), 3),
            }
        found.append(entry)
    return found


def line(row: dict[str, Any]) -> str:
    """One case on one line: goodput in parts of the bound."""
    parts = [
        f"{name} {each['goodput_per_s'] / row['bound_per_s']:.3f}"
        for name, each in row["policies"].items()
    ]
    head = f"{row['curves']}-{row['mix']} {row['arrivals']} {row['load']:g}"
    return f"{head:26s} offered {row['offered_per_s']:7.0f} bound {row['bound_per_s']:7.0f}: " + (
        ", ".join(parts)
    )


if __name__ == "__main__":
    main()
