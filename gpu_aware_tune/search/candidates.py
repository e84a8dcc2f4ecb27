"""TVM's search, driven from Python in workers of its own.

A searcher holds a `TuneContext` for each of its tasks and one cost model for all of them. It drafts
candidates on request and learns from the results that come with the next request, so that it is
never waited for: while one task's candidates are built and measured, the next task's are drafted.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from gpu_aware_tune.workers import Worker, WorkerHost

_TILES = 96  # register tiles tried at most for one task; the cost model ranks them


@dataclass(frozen=True)
class Candidate:
    """One schedule of a task, as the JSON text of its trace.

    `origin` is "default" (the untuned schedule), "seed" (from records of other units) or "search".
    """

    task: str
    trace: str
    origin: str
    number: int = -1  # the searcher's own count; -1 where it did not draft it


@dataclass(frozen=True)
class SearchSettings:
    """How TVM's evolutionary search is run.

    Args:
        population, generations: of each draft; both far below TVM's 512 and 4, because on two cores
            a draft then costs less than the builds it feeds.
        per_draft: candidates of one draft.
        warmup: measurements before the cost model's word counts.
        seed: of every random choice.
        units: SMs of the share, for the one rule that depends on them; 0: not a GPU, or unknown.
    """

    population: int
    generations: int
    per_draft: int
    seed: int
    warmup: int = 16
    units: int = 0


@dataclass(frozen=True)
class NewTask:
    """Message: a task the searcher shall hold.

    `known` are (trace, seconds) to start from, `tried` the traces that are not to be drafted again.
    """

    task: str
    module_json: str
    known: tuple[tuple[str, float], ...] = ()
    tried: tuple[str, ...] = ()


@dataclass(frozen=True)
class DraftRequest:
    """Message: learn from `results` (task, candidate number, seconds or None), then draft."""

    task: str
    results: tuple[tuple[str, int, float | None], ...] = ()


@dataclass(frozen=True)
class Drafted:
    """The searcher's answer; no candidates means that the space is exhausted."""

    task: str
    candidates: tuple[Candidate, ...]


class Searcher:
    """The parent's handle on one searcher worker."""

    def __init__(
        self, host: WorkerHost, target: dict[str, Any], settings: SearchSettings, number: int
    ) -> None:
        self._host = host
        self._args = (target, settings, number)
        self._tasks: dict[str, NewTask] = {}
        self._results: list[tuple[str, int, float | None]] = []
        self._retired_cpu_s = 0.0
        self.worker = self._start()

    def add(self, task: NewTask) -> None:
        """Give it a task to look after."""
        self._tasks[task.task] = task
        self.worker.send(task)
        self.worker.done()

    def tell(self, candidate: Candidate, seconds: float | None) -> None:
        """Keep a result for the next draft."""
        if candidate.number >= 0:
            self._results.append((candidate.task, candidate.number, seconds))

    def ask(self, task: str) -> None:
        """Request a draft; the answer is read from `worker`."""
        results, self._results = tuple(self._results), []
        self.worker.send(DraftRequest(task, results), job=task)

    def cpu_s(self) -> float:
        """CPU seconds of this searcher so far."""
        return self._retired_cpu_s + self.worker.cpu_s()

    def restart(self) -> str:
        """Replace a searcher that died; its cost model starts anew. Returns how it ended."""
        self._retired_cpu_s += self.worker.cpu_s()
        text = self.worker.kill().text
        self.worker = self._start()
        for task in self._tasks.values():
            self.add(task)
        return text

    def _start(self) -> Worker:
        return self._host.spawn(serve, *self._args)


def serve(
    connection: Connection, target: dict[str, Any], settings: SearchSettings, number: int
) -> None:
    """The searcher's loop (in the worker)."""
    import tvm

    search = _Search(tvm.target.Target(target), settings, number)
    while True:
        message: NewTask | DraftRequest = connection.recv()
        if isinstance(message, NewTask):
            search.add(message)
            continue
        search.learn(message.results)
        connection.send(Drafted(message.task, search.draft(message.task)))


class _Search:
    """One cost model and the contexts of this searcher's tasks (in the worker)."""

    def __init__(self, target: Any, settings: SearchSettings, number: int) -> None:
        import logging

        import numpy as np
        from tvm.s_tir import meta_schedule as ms

        logging.disable(logging.WARNING)  # TVM logs each draft; nobody reads a worker's log of it
        np.random.seed(settings.seed + number)  # the cost model's guesses before it is trained
        self._target = target
        self._settings = settings
        # One training thread: two on busy cores take 20 times as long. Ten rounds without gain end it.
        self._model = ms.cost_model.XGBModel(
            num_warmup_samples=settings.warmup, early_stopping_rounds=10, num_tuning_cores=1
        )
        self._pending: dict[str, NewTask] = {}
        self._held: dict[str, _TaskSearch] = {}

    def add(self, task: NewTask) -> None:
        """Remember a task; its space is made when it is first drafted for."""
        self._pending[task.task] = task

    def learn(self, results: Sequence[tuple[str, int, float | None]]) -> None:
        """Commit results to the tasks' databases and train the cost model."""
        by_task: dict[str, list[tuple[int, float | None]]] = {}
        for task, number, seconds in results:
            by_task.setdefault(task, []).append((number, seconds))
        for task, pairs in by_task.items():
            self._task(task).learn(pairs, self._model)

    def draft(self, task: str) -> tuple[Candidate, ...]:
        """The next candidates of one task."""
        return self._task(task).draft()

    def _task(self, task: str) -> _TaskSearch:
        if task not in self._held:
            new = self._pending.pop(task)
            self._held[task] = _TaskSearch(new, self._target, self._settings, self._model)
        return self._held[task]


class _TaskSearch:
    """The search over one task (in the worker): register tiles by rule, and TVM's evolution.

    The tiles that the baseline schedules were picked from come ranked by a cost model, need no search
    time and build quickly; the evolution finds what no rule knows. The first draft takes tiles, the
    second samples TVM's space; from then on the source whose best is better gets two drafts of three.
    Of a convolution in Winograd's form, TVM's own candidates take minutes to compile: tiles only.
    TVM's candidates are kept until their result is told, because it learns from schedules.
    """

    def __init__(self, new: NewTask, target: Any, settings: SearchSettings, model: Any) -> None:
        from tvm.s_tir import meta_schedule as ms

        from gpu_aware_tune.kernels.traces import module_from_json
        from gpu_aware_tune.kernels.winograd import roles_of

        self._hash = new.task
        self._target = target
        self._module = module_from_json(new.module_json)
        self._evolves = not roles_of(self._module["main"])
        self._database = ms.database.MemoryDatabase()
        self._workload = self._database.commit_workload(self._module)
        seed = (settings.seed * 1_000_003 + int(new.task)) % (2**31 - 1) or 1
        sampled = settings.per_draft * 2
        self._sampling: Any = None
        self._evolving: Any = None
        self._make_evolving: Callable[[], Any] = functools.partial(
            self._context, settings, seed + 1, settings.population, settings.generations, model
        )
        self._tiles = _tile_traces(self._module, target)
        self._best = {"tiles": float("inf"), "evolution": float("inf")}
        self._per_draft = settings.per_draft
        self._drafts = 0
        self._waiting: dict[int, Any] = {}  # TVM's candidate by number; None for a tile
        self._seen: set[str] = {trace for trace, _ in new.known} | set(new.tried)
        self._next = 0
        self._learned = 0
        if self._evolves:
            self._sampling = self._context(settings, seed, sampled, 0, model)
            self._adopt(new.known, model)

    def _context(
        self, settings: SearchSettings, seed: int, population: int, generations: int, model: Any
    ) -> Any:
        from tvm.s_tir import meta_schedule as ms

        from gpu_aware_tune.kernels.space import make_space

        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=population,
            init_measured_ratio=0.4,
            init_min_unmeasured=max(1, population // 4),
            genetic_num_iters=generations,
            eps_greedy=0.1,
        )
        context = ms.TuneContext(
            mod=self._module,
            target=self._target,
            space_generator=make_space(self._module, self._target, settings.units),
            search_strategy=strategy,
            rand_state=seed,
            num_threads=1,  # parallelism comes from several searchers
        ).clone()
        context.pre_tuning(
            max_trials=1 << 30,
            num_trials_per_iter=settings.per_draft,
            database=self._database,
            cost_model=model,
        )
        return context

    def draft(self) -> tuple[Candidate, ...]:
        """Candidates from the source whose turn it is, or from the other where it has none."""
        ahead = self._best["tiles"] <= self._best["evolution"]
        turn = self._drafts % 3 != 2 if self._drafts > 1 else True
        tiles_first = self._drafts == 0 or (self._drafts > 1 and ahead == turn)
        self._drafts += 1
        order = [self._draft_tiles, self._evolve] if self._evolves else [self._draft_tiles]
        for source in order if tiles_first else reversed(order):
            found = source()
            if found:
                return found
        return ()

    def _draft_tiles(self) -> tuple[Candidate, ...]:
        fresh = (trace for trace in self._tiles if trace not in self._seen)
        return tuple(self._named(t, None) for t in itertools.islice(fresh, self._per_draft))

    def _evolve(self) -> tuple[Candidate, ...]:
        from gpu_aware_tune.kernels.traces import trace_to_json

        context = self._sampling
        if self._learned:
            self._evolving = context = self._evolving or self._make_evolving()
        drawn = context.generate_measure_candidates() or ()
        traces = [(trace_to_json(candidate.sch.trace), candidate) for candidate in drawn]
        return tuple(self._named(t, c) for t, c in traces if t not in self._seen)

    def _named(self, trace: str, candidate: Any) -> Candidate:
        self._seen.add(trace)
        self._waiting[self._next] = candidate
        self._next += 1
        return Candidate(self._hash, trace, "search", self._next - 1)

    def learn(self, results: Sequence[tuple[int, float | None]], model: Any) -> None:
        """Take in results: TVM learns from its own candidates, tiles only count for whose turn it is."""
        pairs = []
        for number, seconds in results:
            if number not in self._waiting:
                continue  # drafted by a searcher that this one replaced
            candidate = self._waiting.pop(number)
            source = "tiles" if candidate is None else "evolution"
            if seconds is not None:
                self._best[source] = min(self._best[source], seconds)
            if candidate is not None:
                pairs.append((candidate, seconds))
        self._commit(pairs, model)

    def _adopt(self, known: Sequence[tuple[str, float]], model: Any) -> None:
        """Start from what earlier runs measured on the same units."""
        from tvm.s_tir.meta_schedule.arg_info import ArgInfo
        from tvm.s_tir.meta_schedule.search_strategy import MeasureCandidate

        from gpu_aware_tune.kernels.traces import TraceError, apply_trace

        pairs = []
        for trace, seconds in known:
            try:
                schedule = apply_trace(trace, self._module)
            except TraceError:
                continue  # a record of a schedule this version of TVM no longer applies
            info = ArgInfo.from_entry_func(self._module, remove_preproc=True)
            pairs.append((MeasureCandidate(schedule, info), seconds))
        self._commit(pairs, model)

    def _commit(self, pairs: Sequence[tuple[Any, float | None]], model: Any) -> None:
        from tvm.s_tir.meta_schedule.database import TuningRecord
        from tvm.s_tir.meta_schedule.runner import RunnerResult

        if not pairs:
            return
        results = []
        for candidate, seconds in pairs:
            run_secs = [seconds] if seconds is not None else [1e10]
            results.append(RunnerResult(run_secs if seconds is not None else None, None))
            if seconds is not None:
                self._database.commit_tuning_record(
                    TuningRecord(
                        candidate.sch.trace,
                        self._workload,
                        run_secs,
                        self._target,
                        candidate.args_info,
                    )
                )
        model.update(self._sampling, [candidate for candidate, _ in pairs], results)
        self._learned += len(pairs)


def _tile_traces(module: Any, target: Any) -> Iterator[str]:
    """Traces of the baseline schedule with one register tile after the other, the likeliest first.

    The first few are the baseline schedules themselves, which are measured before the search.
    """
    if target.kind.name != "llvm":
        return
    from gpu_aware_tune.kernels.schedules import MOST_BASELINES
    from gpu_aware_tune.kernels.schedules.cpu import cpu_schedules, machine_of
    from gpu_aware_tune.kernels.traces import trace_to_json

    schedules = cpu_schedules(module, machine_of(target), _TILES)
    for schedule in itertools.islice(schedules, MOST_BASELINES, None):
        if schedule.trace is not None:
            yield trace_to_json(schedule.trace)
