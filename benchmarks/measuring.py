"""Is the fast measurement to be trusted? Against a long, exclusive one, on real candidates.

    python -m benchmarks.measuring                                        # about ten minutes
    python -m benchmarks.measuring --models squeezenet --candidates 16    # to see that it works

For the heaviest tasks of two models, candidates are drawn as the search draws them, built, and
visited in shuffled order. A visit measures one candidate in several ways, close together in time and
in shuffled order too: fast (as the search does, dropping what is clearly slower than the best so
far), with TVM's own settings (100 ms a candidate), long, and long once more. Between two visits the
task's untuned schedule is timed, the sentinel, which shows how the machine drifts. Later all
candidates are measured long for a third time, in another order.

The headline is Kendall's tau-b of fast against long over all pairs of the better half. Beside it:
the same with drift divided out by the sentinel, over all candidates, over the pairs that the long
measurement can tell apart, against the later long measurement, and the ceilings, which are the long
measurement against itself. Regret is how much slower than the true best the fast pick is.

Short samples of each candidate are recorded as well. The last table replays them to tell what the
fast measurement would give with other settings, and at what cost.
"""

from __future__ import annotations

import contextlib
import math
import random
import select
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, environment, write_results
from benchmarks.light_models import write_seeded
from benchmarks.ranking import (
    TIMING_POLICIES,
    Series,
    better_half,
    kendall,
    normalised,
    resample,
    resolvable,
    retest_error,
)
from benchmarks.scaffold import parser
from gpu_aware_tune.measure import RETIME, SEARCH, ComparisonJob, Job, Measurer, TimingPolicy

RESULTS_FILE = RESULTS / "measuring.json"
FOREVER = float("inf")
# TVM's EvaluatorConfig: one repeat of at least 100 ms.
TVM = TimingPolicy(probe_s=1e-9, repeat_s=0.1, min_repeats=1, max_repeats=1, drop_ratio=FOREVER)
LONG = TimingPolicy(
    probe_s=0.01, repeat_s=0.1, min_repeats=5, max_repeats=5, budget_s=60, spread=0.0
)
SENTINEL = TimingPolicy(probe_s=0.002, repeat_s=0.01, min_repeats=5, max_repeats=5, spread=0.0)
WAYS = {"fast": SEARCH, "tvm": TVM, "long": LONG, "again": LONG}
FEWEST = 4  # candidates of a task
TOP = 3  # the search's winners that are measured again before one is picked
BLOCK_S, SERIES_S = 0.001, 0.25  # of the recorded samples
ROUNDS = 40  # of the replay


def main() -> None:
    """Measure, print the tables, write the results file after each task."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--models", default="squeezenet,resnet50")
    command.add_argument("--tasks", type=int, default=2, help="heaviest tasks of each model")
    command.add_argument("--candidates", type=int, default=30, help="of each task")
    command.add_argument("--seed", type=int, default=0)
    args = command.parse_args()
    about, rows = environment(), []
    for model in args.models.split(","):
        with Bench(model, args.tasks, args.seed) as bench:
            for task in bench.tasks:
                rows.append(bench.compare(task, args.candidates))
                write_results(args.results, about, {"all": pooled(rows), "tasks": rows})
    show(rows)
    print(f"written to {args.results}")


class Bench:
    """One model's heaviest tasks, and workers to draw, build and measure their candidates."""

    def __init__(self, model: str, tasks: int, seed: int) -> None:
        from gpu_aware_tune.model.importer import load_model
        from gpu_aware_tune.model.tasks import extract
        from gpu_aware_tune.partition import (
            choose_backend,
            find_device,
            open_partitions,
            share_of,
        )
        from gpu_aware_tune.settings import Settings
        from gpu_aware_tune.workers import WorkerHost
        from gpu_aware_tune.workers.warm import load_tvm

        self._model, self._seed, self._settings = model, seed, Settings()
        self._stack = contextlib.ExitStack()
        self._host = self._stack.enter_context(WorkerHost())
        device, _ = find_device("llvm", 0, None)
        backend, _ = choose_backend(device)
        share = share_of(device, 100, backend)
        (self._partition,) = open_partitions([share], device, backend)
        self._target = device.target(share.units)
        load_tvm()
        import tvm

        self.tvm_target = tvm.target.Target(self._target)
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="measuring-"))
        path = write_seeded(model, Path(folder))
        self.tasks = extract(load_model(path, self.tvm_target), self.tvm_target)[:tasks]

    def __enter__(self) -> Bench:
        from gpu_aware_tune.codegen.build_pool import BuildPool
        from gpu_aware_tune.search.candidates import Searcher, SearchSettings

        how, memory = self._settings, self._settings.memory_limit_mb << 20
        self._measurer = Measurer(self._host, self._partition, how.run_timeout_s, memory)
        self._stack.callback(self._measurer.close)
        self._measurer.open()
        search = SearchSettings(how.population, how.generations, 16, self._seed)
        self._searcher = Searcher(self._host, self._target, search, 0)
        cores = self._partition.share.units
        self._builders = BuildPool(self._host, self._target, cores, how.build_timeout_s, memory)
        self._stack.callback(self._builders.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def compare(self, task: Any, count: int) -> dict[str, Any]:
        """Draw, build and measure one task's candidates; gives its row."""
        from gpu_aware_tune.kernels.schedules import baseline_schedules
        from gpu_aware_tune.kernels.traces import UNSCHEDULED, trace_to_json

        self._builders.add_task(task.hash, task.module_json)
        untuned = [trace_to_json(s.trace) for s in baseline_schedules(task.module, self.tvm_target)]
        (sentinel,) = self.built(task, [untuned[0] if untuned else UNSCHEDULED])
        paths = self.built(task, self.drawn(task, count))
        visits = self.visits(task, paths, sentinel)
        found = [visit for visit in visits if all(s is not None for s, _ in visit.values())]
        name = f"{self._model}/{task.name}"
        if len(found) < FEWEST:
            raise SystemExit(f"{name}: {len(found)} candidates ran, {FEWEST} are needed")
        print(f"{name}: {len(found)} of {count} candidates measured", flush=True)
        return self.row(name, task, found)

    def drawn(self, task: Any, count: int) -> list[str]:
        """Traces of the task's candidates, as the search drafts them."""
        from gpu_aware_tune.kernels.traces import module_to_json
        from gpu_aware_tune.search.candidates import NewTask

        self._searcher.add(NewTask(task.hash, module_to_json(task.module)))
        worker = self._searcher.worker
        traces: list[str] = []
        while len(traces) < count:
            self._searcher.ask(task.hash)
            select.select([worker], [], [])
            found = [candidate.trace for candidate in worker.recv().candidates]
            worker.done()
            if not found:
                break
            traces += found
        return traces[:count]

    def built(self, task: Any, traces: Sequence[str]) -> list[str]:
        """Artifacts of the candidates that build; of equal machine code only one."""
        paths: dict[str, str] = {}

        def start(trace: str) -> None:
            self._builders.submit(None, task.hash, trace)

        for _, answer in self._builders.work_off(traces, start):
            if answer.failure is None:
                paths.setdefault(answer.digest, answer.path)
        return list(paths.values())

    def visits(self, task: Any, paths: Sequence[str], sentinel: str) -> list[dict[str, Any]]:
        """Measure every candidate in every way; (seconds, seconds spent) by way, for each."""
        order = random.Random(self._seed)
        found: dict[str, dict[str, Any]] = {path: {"path": (path, 0.0)} for path in paths}
        best: float | None = None
        for path in self._between(task, paths, sentinel, order, found, "sentinel"):
            visit = found[path]
            for way in order.sample(list(WAYS), len(WAYS)):
                known = best if way == "fast" else None
                visit[way] = self.timed(task, path, WAYS[way], known)
            seconds = visit["fast"][0]
            if seconds is not None:
                best = seconds if best is None else min(best, seconds)
                visit["series"] = (self.recorded(task, path), 0.0)
        for path in self._between(task, paths, sentinel, order, found, "sentinel_later"):
            found[path]["later"] = self.timed(task, path, LONG, None)
        return list(found.values())

    def _between(
        self,
        task: Any,
        paths: Sequence[str],
        sentinel: str,
        order: random.Random,
        found: Mapping[str, dict[str, Any]],
        name: str,
    ) -> Iterator[str]:
        """Yield the candidates in a new order, the sentinel timed before and after each."""
        before = self.timed(task, sentinel, SENTINEL, None)[0]
        for path in order.sample(list(paths), len(paths)):
            yield path
            after = self.timed(task, sentinel, SENTINEL, None)[0]
            if before is None or after is None:
                raise SystemExit(f"{task.name}: its untuned schedule does not run")
            found[path][name] = (math.sqrt(before * after), 0.0)
            before = after

    def timed(
        self, task: Any, path: str, timing: TimingPolicy, best_s: float | None
    ) -> tuple[float | None, float]:
        """(seconds of one call or None where it fails, seconds spent on measuring it)."""
        start = time.monotonic()
        result = self._measurer.measure(Job(path, task.args, task.hash, best_s, timing))
        return result.seconds, time.monotonic() - start

    def recorded(self, task: Any, path: str) -> Series | None:
        """Short samples of one candidate, taken inside the partition; None where it crashes."""
        from gpu_aware_tune.measure.worker import call

        worker = self._host.spawn(
            call,
            self._partition,
            record,
            (path, task.args),
            env=self._partition.env(),
        )
        try:
            per_block, blocks = worker.recv()
        except EOFError:
            return None
        finally:
            worker.kill()
        return Series(per_block, tuple(blocks))

    def row(self, name: str, task: Any, visits: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the measurements of one task say."""
        column = {
            way: [visit[way][0] for visit in visits]
            for way in (*WAYS, "later", "sentinel", "sentinel_later", "path", "series")
        }
        long = [
            statistics.fmean(pair) for pair in zip(column["long"], column["again"], strict=True)
        ]
        truth = [(2 * a + b) / 3 for a, b in zip(long, column["later"], strict=True)]
        finalists = sorted(range(len(visits)), key=column["fast"].__getitem__)[:TOP]
        paths = column["path"]
        comparison = ComparisonJob(tuple(paths[i] for i in finalists), task.args, task.hash, RETIME)
        compared = zip(finalists, self._measurer.compare(comparison), strict=True)
        retimed = {i: result.seconds or FOREVER for i, result in compared}
        picked = min(finalists, key=retimed.__getitem__)
        sentinels = [*column["sentinel"], *column["sentinel_later"]]
        low, _, high = statistics.quantiles(sentinels, n=4)
        return {
            "task": name,
            "n": len(visits),
            "better_half": agreement(column, long, better_half(long)),
            "all": agreement(column, long, list(range(len(visits)))),
            "retest_error": retest_error(column["long"], column["again"]),
            "retest_error_later": retest_error(long, column["later"]),
            "drift": (high - low) / statistics.median(sentinels),
            "regret": truth[finalists[0]] / min(truth) - 1,
            "regret_retimed": truth[picked] / min(truth) - 1,
            "seconds": {way: statistics.median(v[way][1] for v in visits) for way in WAYS},
            "efforts": {
                title: resample(column["series"], long, timing, ROUNDS, self._seed)
                for title, timing in TIMING_POLICIES.items()
            },
            "samples": [
                {way: visit[way][0] for way in (*WAYS, "later", "sentinel", "sentinel_later")}
                for visit in visits
            ],
        }


def record(path: str, args: Sequence[tuple[Sequence[int], str]]) -> tuple[int, list[float]]:
    """Time one artifact in blocks of about a millisecond (in a worker inside the partition)."""
    import numpy as np
    import tvm

    rng = np.random.default_rng(0)
    buffers = [
        tvm.runtime.tensor(
            rng.random(shape, dtype=np.float32).astype(dtype)
            if dtype.startswith("float")
            else np.zeros(shape, dtype)
        )
        for shape, dtype in args
    ]
    module = tvm.runtime.load_module(path)

    def blocks(number: int, repeat: int) -> list[float]:
        evaluator = module.time_evaluator("main", tvm.cpu(), number=number, repeat=repeat)
        return [float(value) for value in evaluator(*buffers).results]

    typical = min(blocks(1, 5))  # starts the threads, too
    per_block = max(1, round(BLOCK_S / typical))
    return per_block, blocks(per_block, max(10, round(SERIES_S / (per_block * typical))))


def agreement(
    column: Mapping[str, Sequence[float]], long: Sequence[float], chosen: Sequence[int]
) -> dict[str, float | None]:
    """Kendall's tau-b among the chosen candidates, by what is compared with what."""
    fast, tvm, once, again, later, sentinel, sentinel_later = (
        [column[way][i] for i in chosen]
        for way in ("fast", "tvm", "long", "again", "later", "sentinel", "sentinel_later")
    )
    long = [long[i] for i in chosen]
    error = retest_error(column["long"], column["again"])
    steady, steady_later = normalised(long, sentinel), normalised(later, sentinel_later)
    pairs = len(chosen) * (len(chosen) - 1) // 2
    return {
        "tau": kendall(fast, long),
        "tau_normalised": kendall(normalised(fast, sentinel), steady),
        "tau_resolvable": kendall(fast, long, error),
        "resolvable": len(resolvable(long, error)[0]) / pairs if pairs else None,
        "tau_later": kendall(fast, later),
        "tau_later_normalised": kendall(normalised(fast, sentinel), steady_later),
        "tau_tvm": kendall(tvm, long),
        "ceiling": kendall(once, again),
        "ceiling_later": kendall(long, later),
        "ceiling_later_normalised": kendall(steady, steady_later),
    }


def pooled(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the tasks, and the largest regrets."""

    def typical(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return {
        "candidates": sum(row["n"] for row in rows),
        "tau": typical([row["better_half"]["tau"] for row in rows]),
        **{
            part: {key: typical([row[part][key] for row in rows]) for key in rows[0][part]}
            for part in ("better_half", "all")
        },
        "regret": max(row["regret"] for row in rows),
        "regret_retimed": max(row["regret_retimed"] for row in rows),
        "efforts": {
            title: {
                "tau": {
                    name: statistics.fmean(row["efforts"][title]["tau"][name] for row in rows)
                    for name in rows[0]["efforts"][title]["tau"]
                },
                "seconds": statistics.fmean(row["efforts"][title]["seconds"] for row in rows),
            }
            for title in TIMING_POLICIES
        },
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the tables."""
    print("\ntask                                n   tau ceiling  error  drift regret  after retime"
          "   s/candidate fast/TVM/long")  # fmt: skip
    for row in rows:
        half = row["better_half"]
        times = " / ".join(f"{row['seconds'][way]:.3f}" for way in ("fast", "tvm", "long"))
        print(
            f"{row['task']:32} {row['n']:4} {text(half['tau'])} {text(half['ceiling']):>7}"
            f" {100 * row['retest_error']:4.1f} % {100 * row['drift']:4.1f} %"
            f" {100 * row['regret']:4.1f} % {100 * row['regret_retimed']:10.1f} %   {times}"
        )
    total = pooled(rows)
    print(f"\n{total['candidates']} candidates, medians over tasks   better half    all")
    for key in rows[0]["all"]:
        print(f"{key:40} {text(total['better_half'][key]):>12} {text(total['all'][key]):>6}")
    print("\nreplayed: tau of the better half         lowest quartile minimum median  s/candidate")
    for title, found in total["efforts"].items():
        taus = "  ".join(f"{value:6.2f}" for value in found["tau"].values())
        print(f"{title:42} {taus}   {found['seconds']:.4f}")


def text(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "    -" if value is None else f"{value:5.2f}"


if __name__ == "__main__":
    main()
