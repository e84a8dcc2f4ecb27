"""Our tuner against TVM's own `tune_tasks`, side by side, on the same tasks.

    python -m benchmarks.vs_metaschedule --quick      # under ten minutes
    python -m benchmarks.vs_metaschedule              # hours; run it again to resume

Both sides get the same model, target, tasks, trials per task and trials per iteration. TVM runs
with its own defaults: LocalBuilder, LocalRunner, XGBModel, population 512. Each run is a process of
its own, the sides take turns, and a finished run is kept in the results file, so that a second call
goes on. Import times are shown apart. At the end every kernel that was the best of its task at some
moment is measured again by one and the same exclusive timer; the latencies over time come from
these numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS
from benchmarks.light_models import write_seeded
from benchmarks.scaffold import FLAG, answer, parser, resumed, run_apart

RESULTS_FILE = RESULTS / "vs-metaschedule.json"


def main() -> None:
    """Run what is missing from the results file, then print the table."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--models", default="squeezenet,resnet50")
    command.add_argument("--tasks", type=int, default=8, help="heaviest tasks of each model")
    command.add_argument("--trials", type=int, default=64, help="trials per task")
    command.add_argument("--per-iter", default="16,64", help="candidates an iteration")
    command.add_argument("--repeats", type=int, default=2)
    command.add_argument(
        "--quick", action="store_true", help="squeezenet, 4 tasks, 32 trials, 16 an iteration"
    )
    command.add_argument(FLAG, help=argparse.SUPPRESS)
    args = command.parse_args()
    if args.cell:
        answer(args.cell, run_one)
        return
    if args.quick:
        args.models, args.tasks, args.trials, args.per_iter, args.repeats = (
            "squeezenet",
            4,
            32,
            "16",
            1,
        )
    cells = [
        {"side": side, "model": model, "tasks": args.tasks, "trials": args.trials,
         "per_iter": per_iter, "repeat": repeat}
        for repeat in range(args.repeats)
        for model in args.models.split(",")
        for per_iter in map(int, args.per_iter.split(","))
        for side in ("stock", "ours")
    ]  # fmt: skip
    show(resumed(args.results, cells, lambda cell: run_apart("benchmarks.vs_metaschedule", cell)))


def run_one(
    side: str, model: str, tasks: int, trials: int, per_iter: int, repeat: int
) -> dict[str, Any]:
    """Tune once with one side, then measure its best kernels again."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vs-metaschedule-") as folder:
        path = write_seeded(model, Path(folder))
        tune = run_stock if side == "stock" else run_ours
        result = tune(path, tasks, trials, per_iter, repeat, started)
    return result


def opened(paths: list[Path], tasks: int, **settings: Any) -> Any:
    """A run of ours up to the lists of tasks, cut to each model's heaviest ones: session, models."""
    from gpu_aware_tune.events import result_of
    from gpu_aware_tune.run.jobs import make_jobs
    from gpu_aware_tune.run.models import import_models
    from gpu_aware_tune.run.session import Session

    db = paths[0].parent / "records"
    job = make_jobs(paths, target="llvm", patience=0, db=db, resume=False, **settings)
    session = Session(job.settings)
    session.__enter__()
    list(session.find_device(job.goals))
    models = result_of(import_models(session, job.goals))
    return session, [dataclasses.replace(m, tasks=m.tasks[:tasks]) for m in models]


def run_ours(
    path: Path, tasks: int, trials: int, per_iter: int, repeat: int, started: float
) -> dict[str, Any]:
    """Our search; the untuned schedules that it measures first are part of its time."""
    session, models = opened(
        [path], tasks, trials=tasks * trials, max_trials_per_task=trials,
        trials_per_iteration=per_iter, seed=repeat,
    )  # fmt: skip
    result = searched(session, models, started)
    session.__exit__(None, None, None)
    return {**result, **result.pop("models")[path.stem]}


def searched(session: Any, models: Sequence[Any], started: float) -> dict[str, Any]:
    """Search with an opened run of ours, then measure what was once best again."""
    from gpu_aware_tune.events import Trial, result_of
    from gpu_aware_tune.run.models import recall_models
    from gpu_aware_tune.run.search_stage import run_search, start_workers

    models, work, known = result_of(recall_models(session, models))
    import_s = time.monotonic() - started
    begun, begun_at = time.monotonic(), time.time()
    session.restart_clock()
    workers = result_of(start_workers(session, models, work))
    count, failed = 0, 0
    for event in run_search(session, models, work, known, workers, None):
        if isinstance(event, Trial) and event.origin == "search":
            count += 1
            failed += event.failure is not None
    elapsed = time.monotonic() - begun
    cores = session.core_seconds(workers.pipeline.core_seconds(), workers.pipeline.cores)
    history: dict[str, list[tuple[float, str, float, str, str]]] = {}
    for model in models:
        for task in model.tasks:
            for record in known.records.all(task.hash, model.units[0]):
                if record.seconds is not None:
                    at = record.created - begun_at
                    row = (at, task.hash, record.seconds, record.trace, record.origin)
                    history.setdefault(model.name, []).append(row)
    again = {m.name: retimed(workers.pools, m, history[m.name]) for m in models}
    return {"import_s": import_s, "elapsed_s": elapsed, "trials": count, "failed": failed,
            "core_seconds": cores, "models": again}  # fmt: skip


def run_stock(
    path: Path, tasks: int, trials: int, per_iter: int, repeat: int, started: float
) -> dict[str, Any]:
    """TVM's tuner with its defaults; a callback notes when each result came in."""
    import tvm
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.meta_schedule.measure_callback import PyMeasureCallback

    from gpu_aware_tune.events import result_of
    from gpu_aware_tune.kernels.traces import trace_to_json
    from gpu_aware_tune.run.models import recall_models, target_of
    from gpu_aware_tune.run.search_stage import start_workers

    session, models = opened([path], tasks, trials=tasks * trials, max_trials_per_task=trials)
    (model,) = models
    target = tvm.target.Target(dict(target_of(models, session.device)))
    contexts = stock_contexts(model.tasks, target, repeat + 1)
    history: list[tuple[float, str, float, str, str]] = []
    failed = 0

    @derived_object
    class Clock(PyMeasureCallback):
        def apply(self, task_scheduler: Any, task_id: int, measure_candidates: Any,
                  builder_results: Any, runner_results: Any) -> None:  # fmt: skip
            nonlocal failed
            now = time.monotonic() - begun
            for candidate, result in zip(measure_candidates, runner_results, strict=True):
                if result.run_secs is None:
                    failed += 1
                    continue
                seconds = statistics.fmean(float(value) for value in result.run_secs)
                trace = trace_to_json(candidate.sch.trace)
                history.append((now, model.tasks[task_id].hash, seconds, trace, "search"))

    import_s = time.monotonic() - started
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vs-metaschedule-") as folder:
        ms.tune.tune_tasks(
            tasks=contexts, task_weights=[float(task.weight) for task in model.tasks], work_dir=folder,
            max_trials_global=tasks * trials, max_trials_per_task=trials, num_trials_per_iter=per_iter,
            measure_callbacks=[Clock(), *ms.measure_callback.MeasureCallback.create("default")],
        )  # fmt: skip
    elapsed = time.monotonic() - begun
    (model,), work, _ = result_of(recall_models(session, models))
    workers = result_of(start_workers(session, [model], work))
    kernels = retimed(workers.pools, model, history)
    session.__exit__(None, None, None)
    return {
        "import_s": import_s,
        "elapsed_s": elapsed,
        "trials": len(history) + failed,
        "failed": failed,
        **kernels,
    }


def stock_contexts(tasks: Sequence[Any], target: Any, seed: int) -> list[Any]:
    """The tasks as `tune_tasks` takes them, each with a random state of its own."""
    from tvm.s_tir import meta_schedule as ms

    return [
        ms.TuneContext(
            mod=task.module, target=target, space_generator="post-order-apply",
            search_strategy="evolutionary", task_name=task.name, rand_state=state,
        ).clone()
        for task, state in zip(tasks, ms.utils.fork_seed(seed, n=len(tasks)), strict=True)
    ]  # fmt: skip


def retimed(
    pools: Any, model: Any, history: list[tuple[float, str, float, str, str]]
) -> dict[str, Any]:
    """Measure every kernel of a model that was once its task's best again, alone.

    Gives the latency over time.
    """
    from gpu_aware_tune.measure import RETIME
    from gpu_aware_tune.search.candidates import Candidate

    steps: list[tuple[float, str, str, str]] = []
    best: dict[str, float] = {}
    for at, task, seconds, trace, origin in sorted(history):
        if seconds < best.get(task, float("inf")):
            best[task] = seconds
            steps.append((at, task, trace, origin))
    units = model.units[0]
    again: dict[tuple[str, str], float] = {}
    wanted = [Candidate(task, trace, "default") for _, task, trace, _ in steps]
    for outcome in pools.pipeline.run(wanted, timing=RETIME, alone=True):
        seconds = outcome.measurements[units].seconds
        if seconds is not None:
            again[outcome.candidate.task, outcome.candidate.trace] = seconds
    weights = {task.hash: task.weight for task in model.tasks}
    current: dict[str, float] = {}
    curve: list[tuple[float, float]] = []
    origins: dict[str, str] = {}
    for at, task, trace, origin in steps:
        seconds = again.get((task, trace), float("inf"))
        if seconds < current.get(task, float("inf")):
            current[task], origins[task] = seconds, origin
        if len(current) == len(weights):
            curve.append((at, sum(weights[name] * value for name, value in current.items())))
    names = {task.hash: task.name for task in model.tasks}
    return {
        "latency_s": curve[-1][1] if curve else None,
        "curve": curve,
        "kernels": {
            names[task]: {"seconds": seconds, "weight": weights[task], "origin": origins[task]}
            for task, seconds in current.items()
        },
    }


def show(runs: list[dict[str, Any]]) -> None:
    """Print the comparison, a row for each model and iteration size."""
    groups: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for run in runs:
        cell = run["cell"]
        pairs = groups.setdefault((cell["model"], cell["per_iter"]), {})
        pairs.setdefault(cell["repeat"], {})[cell["side"]] = run
    print(
        "\nmodel       iter stock/min ours/min  ratio (spread)    stock's end reached in  latency"
    )
    for (model, per_iter), pairs in groups.items():
        both = [pair for pair in pairs.values() if len(pair) == 2]
        if both:
            row(model, per_iter, both)
            for pair in both:
                details(pair)


def row(model: str, per_iter: int, both: list[dict[str, Any]]) -> None:
    """One line of the table."""
    rates = [{side: per_minute(pair[side]) for side in ("stock", "ours")} for pair in both]
    ratios = [rate["ours"] / rate["stock"] for rate in rates]
    quality = [latency_s(pair["ours"]) / latency_s(pair["stock"]) for pair in both]
    sooner = ", ".join(f"1/{text(time_to_reach(pair))}" for pair in both)
    print(
        f"{model:11} {per_iter:4} {statistics.median(rate['stock'] for rate in rates):9.1f}"
        f" {statistics.median(rate['ours'] for rate in rates):8.1f}"
        f"  {statistics.median(ratios):5.1f}x ({min(ratios):.1f}-{max(ratios):.1f})  {sooner:>22}"
        f"  {statistics.median(quality):.2f} ({min(quality):.2f}-{max(quality):.2f})"
    )


def per_minute(run: dict[str, Any]) -> float:
    """Trials per minute of one run."""
    return float(60 * run["trials"] / run["elapsed_s"])


def latency_s(run: dict[str, Any]) -> float:
    """Seconds of all tasks at the end of a run; infinite where none of a task's kernels ran."""
    return float("inf") if run["latency_s"] is None else float(run["latency_s"])


def details(pair: dict[str, Any]) -> None:
    """Where our cores' time went, failures and import times of one pair of runs."""
    cores = dict(pair["ours"]["core_seconds"])
    total = cores.pop("total")
    busy = total - cores["idle"]
    parts = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in cores.items())
    print(f"            ours: {parts}; {100 * total / busy - 100:.0f} % above the floor")
    for side in ("stock", "ours"):
        run = pair[side]
        print(
            f"            {side}: {run['elapsed_s']:.0f} s, {run['failed']} failed,"
            f" import {run['import_s']:.1f} s, latency {1e3 * latency_s(run):.2f} ms"
        )


def time_to_reach(pair: dict[str, Any]) -> float | None:
    """How many times sooner ours reached what stock ended with; None when it never did."""
    goal = latency_s(pair["stock"])
    for at, latency in pair["ours"]["curve"]:
        if latency <= goal:
            return pair["stock"]["elapsed_s"] / max(at, 0.1)
    return None


def text(value: float | None) -> str:
    """One decimal, or "never"."""
    return "never" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
