"""Is the fast measurement to be trusted? Against a long, exclusive one, on real candidates.

    python benchmarks/measuring.py

For the heaviest tasks of two models, candidates are drawn as the search draws them, built, and
measured three ways by one worker on the whole CPU share: fast (as the search does, dropping what is
clearly slower than the best so far), with TVM's own settings (100 ms a candidate), and long. Printed
and kept: Kendall's tau of fast against long among the better half, the regret of the fast pick (how
much slower than the true best it is), and seconds per candidate.
"""

from __future__ import annotations

import argparse
import dataclasses
import select
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environment import environment, write_results  # noqa: E402
from benchmarks.light_models import seeded  # noqa: E402
from benchmarks.vs_metaschedule import opened  # noqa: E402
from gpu_aware_tune.measure import RETIME, SEARCH, Effort, Job, Measurer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "measuring.json"
# TVM's EvaluatorConfig: one repeat of at least 100 ms.
TVM = Effort(probe_s=1e-9, repeat_s=0.1, min_repeats=1, max_repeats=1, drop_ratio=float("inf"))
LONG = Effort(probe_s=0.01, repeat_s=0.1, min_repeats=5, max_repeats=5, budget_s=60, spread=0.0)
TOP = 3  # the search's winners that are measured again before one is picked


def main() -> None:
    """Measure, print the table, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="squeezenet,resnet50")
    parser.add_argument("--tasks", type=int, default=2, help="heaviest tasks of each model")
    parser.add_argument("--candidates", type=int, default=30, help="of each task")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    about = environment()
    rows = [
        row
        for model in args.models.split(",")
        for row in compare(model, args.tasks, args.candidates)
    ]
    print(
        "\ntask                               n   tau  regret  after retime   s/candidate fast/TVM/long"
    )
    for row in rows:
        print(
            f"{row['task']:32} {row['n']:4} {row['tau']:5.2f} {100 * row['regret']:6.1f} %"
            f" {100 * row['regret_retimed']:8.1f} %      "
            + " / ".join(f"{row['seconds'][way]:.3f}" for way in ("fast", "tvm", "long"))
        )
    pooled = {
        "candidates": sum(row["n"] for row in rows),
        "tau": statistics.median(row["tau"] for row in rows),
        "regret": max(row["regret"] for row in rows),
        "regret_retimed": max(row["regret_retimed"] for row in rows),
    }
    print(f"all: {pooled}")
    write_results(args.results, about, {"all": pooled, "tasks": rows})


def compare(model: str, tasks: int, count: int) -> list[dict[str, Any]]:
    """Rows of one model."""
    with tempfile.TemporaryDirectory(prefix="measuring-") as folder:
        path = Path(folder) / f"{model}.onnx"
        path.write_bytes(seeded(model, 0).SerializeToString())
        run = opened(path, tasks, count, 16, 0)
        try:
            run.open_records()
            list(run.start_workers())
            return [one_task(run, model, task, count) for task in run.tasks]
        finally:
            run.__exit__(None)


def one_task(run: Any, model: str, task: Any, count: int) -> dict[str, Any]:
    """Draw, build and measure one task's candidates."""
    paths = built(run, task, drawn(run, task, count))
    measurer: Measurer = run._measurers[0]
    long = {path: timed(measurer, task, path, LONG, None)[0] for path in paths}
    ways: dict[str, list[float]] = {"fast": [], "tvm": [], "long": []}
    fast, best = {}, None
    for path in paths:
        fast[path], spent = timed(measurer, task, path, SEARCH, best)
        best = fast[path] if best is None else min(best, fast[path])
        ways["fast"].append(spent)
    for path in paths:
        ways["tvm"].append(timed(measurer, task, path, TVM, None)[1])
    # Long numbers from before and after the fast ones, so that drift of the machine cancels out.
    for path in paths:
        again, spent = timed(measurer, task, path, LONG, None)
        ways["long"].append(spent)
        long[path] = (long[path] + again) / 2
    better = sorted(paths, key=long.__getitem__)[: max(2, len(paths) // 2)]
    finalists = sorted(paths, key=fast.__getitem__)[:TOP]
    retimed = {path: timed(measurer, task, path, RETIME, None)[0] for path in finalists}
    truth = long[better[0]]
    return {
        "task": f"{model}/{task.name}",
        "n": len(paths),
        "tau": kendall([fast[path] for path in better], [long[path] for path in better]),
        "regret": long[finalists[0]] / truth - 1,
        "regret_retimed": long[min(finalists, key=retimed.__getitem__)] / truth - 1,
        "seconds": {way: statistics.median(values) for way, values in ways.items()},
        "samples": [[fast[path], long[path]] for path in paths],
    }


def drawn(run: Any, task: Any, count: int) -> list[str]:
    """Traces of the task's candidates, as the search drafts them."""
    searcher = run._pipeline.searcher_of(task.hash)
    traces: list[str] = []
    while len(traces) < count:
        searcher.ask(task.hash)
        select.select([searcher.worker], [], [])
        found = [candidate.trace for candidate in searcher.worker.recv().candidates]
        searcher.worker.done()
        if not found:
            break
        traces += found
    return traces[:count]


def built(run: Any, task: Any, traces: list[str]) -> list[str]:
    """Artifacts of the candidates that build."""
    waiting, paths = list(traces), []
    while waiting or run._builders.busy:
        while waiting and run._builders.idle:
            run._builders.submit(None, task.hash, waiting.pop())
        ready = select.select(run._builders.busy, [], [], 0.1)[0]
        paths += [b.path for _, b in run._builders.collect(ready) if b.failure is None]
    return paths


def timed(
    measurer: Measurer, task: Any, path: str, effort: Effort, best_s: float | None
) -> tuple[float, float]:
    """(seconds of one call, seconds spent on measuring it)."""
    start = time.monotonic()
    result = measurer.measure(Job(path, task.args, task.hash, best_s, effort))
    if result.seconds is None:
        raise SystemExit(f"{task.name}: {dataclasses.asdict(result)}")
    return result.seconds, time.monotonic() - start


def kendall(xs: list[float], ys: list[float]) -> float:
    """Kendall's tau of two rankings."""
    from scipy.stats import kendalltau

    return float(kendalltau(xs, ys).statistic)


if __name__ == "__main__":
    main()
