"""Several models at the same time against one after another, ours and TVM's own tuner.

    python -m benchmarks.many_models            # about half an hour; run it again to resume

Every side gets the same models, tasks, trials per task and trials per iteration:

    stock     TVM's tune_tasks, one model after another, on all cores
    turns     our tuner, one model after another, on all cores
    together  our tuner, all models in one run, on all cores
    ray       the same through a Ray cluster of one node
    turns-1, slices
              our tuner for one core each: one model after another, and all at once on slices of a
              core each

Each is a process (or one for each model) of its own, the sides take turns, and finished ones are
kept in the results file. Wall time runs from the start of the first process to the end of the last
search, imports included. At the end each model's best kernels are measured again, alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS
from benchmarks.light_models import write_seeded
from benchmarks.scaffold import FLAG, answer, parser, resumed, run_apart
from benchmarks.vs_metaschedule import opened, run_stock, searched

RESULTS_FILE = RESULTS / "many-models.json"
MODELS = "squeezenet,shufflenet,inception_v1,resnet50"
SIDES = ("stock", "turns", "together", "ray", "turns-1", "slices")


def main() -> None:
    """Run what is missing from the results file, then print the table."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--models", default=MODELS)
    command.add_argument("--tasks", type=int, default=4, help="heaviest tasks of each model")
    command.add_argument("--trials", type=int, default=16, help="trials per task")
    command.add_argument("--per-iter", type=int, default=16, help="candidates an iteration")
    command.add_argument("--repeats", type=int, default=1)
    command.add_argument("--sides", default=",".join(SIDES))
    command.add_argument(FLAG, help=argparse.SUPPRESS)
    args = command.parse_args()
    if args.cell:
        answer(args.cell, run_side)
        return
    cells = [
        {"side": side, "models": args.models, "tasks": args.tasks, "trials": args.trials,
         "per_iter": args.per_iter, "repeat": repeat}
        for repeat in range(args.repeats)
        for side in args.sides.split(",")
    ]  # fmt: skip
    show(resumed(args.results, cells, measured))


def measured(cell: dict[str, Any]) -> dict[str, Any]:
    """One side: a process for all models, or one for each in turn."""
    names = cell["models"].split(",")
    groups = [names] if cell["side"] in ("together", "ray", "slices") else [[n] for n in names]
    apart = [{**cell, "models": ",".join(group)} for group in groups]
    parts = [run_apart("benchmarks.many_models", each) for each in apart]
    models = {name: found for part in parts for name, found in part["models"].items()}
    return {
        "wall_s": sum(part["wall_s"] for part in parts),
        "search_s": sum(part["elapsed_s"] for part in parts),
        "trials": sum(part["trials"] for part in parts),
        "latency_s": {name: found["latency_s"] for name, found in models.items()},
    }


def run_side(
    side: str, models: str, tasks: int, trials: int, per_iter: int, repeat: int
) -> dict[str, Any]:
    """Tune (in the process); the wall time leaves out the second measurement at the end."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="many-models-") as folder:
        paths = [write_seeded(name, Path(folder)) for name in models.split(",")]
        if side == "stock":
            result = run_stock(paths[0], tasks, trials, per_iter, repeat, started)
            result["models"] = {paths[0].stem: {"latency_s": result["latency_s"]}}
        else:
            ray = {"ray": "auto"} if side == "ray" else {}
            percent = 50 if side in ("turns-1", "slices") else 100
            session, opened_models = opened(
                paths, tasks, trials=tasks * trials, max_trials_per_task=trials,
                trials_per_iteration=per_iter, seed=repeat, gpu_pct=percent, **ray,
            )  # fmt: skip
            result = searched(session, opened_models, started)
            session.__exit__(None, None, None)
    return {**result, "wall_s": result["import_s"] + result["elapsed_s"]}


def show(runs: list[dict[str, Any]]) -> None:
    """Print a row for each side: wall time, and latencies against the side it is compared with."""
    by_side: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_side.setdefault(run["cell"]["side"], []).append(run)
    print("\nside       wall time (spread)    trials  latency of each model in ms")
    for side, found in by_side.items():
        walls = [run["wall_s"] for run in found]
        latencies = {
            name: statistics.median(1e3 * run["latency_s"][name] for run in found)
            for name in found[0]["latency_s"]
        }
        told = ", ".join(f"{name} {value:.2f}" for name, value in latencies.items())
        print(
            f"{side:9} {statistics.median(walls):8.1f} s ({min(walls):.0f}-{max(walls):.0f})"
            f"  {found[0]['trials']:6}  {told}"
        )
    for slow, fast in (("stock", "together"), ("turns", "together"), ("turns-1", "slices"),
                       ("together", "ray")):  # fmt: skip
        if slow in by_side and fast in by_side:
            compare(slow, by_side[slow], fast, by_side[fast])


def compare(
    slow: str, before: list[dict[str, Any]], fast: str, after: list[dict[str, Any]]
) -> None:
    """How many times sooner one side is through, and what its latencies are of the other's."""
    pairs = list(zip(before, after, strict=False))
    sooner = [b["wall_s"] / a["wall_s"] for b, a in pairs]
    latency = [
        statistics.geometric_mean(a["latency_s"][n] / b["latency_s"][n] for n in a["latency_s"])
        for b, a in pairs
    ]
    print(
        f"{fast} against {slow}: {statistics.median(sooner):.2f}x sooner,"
        f" latency {statistics.median(latency):.3f} (geometric mean)"
    )


if __name__ == "__main__":
    main()
