"""The state of one run, and what each stage of the main path does to it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.events import Event, Finished, Note, Planned, TaskPlan
from gpu_aware_tune.records import RecordKey, Store
from gpu_aware_tune.results import manifest, share_results, task_results
from gpu_aware_tune.search import Search, available_cores, worker_counts
from gpu_aware_tune.selection import Choice, choose, retime
from gpu_aware_tune.settings import Settings
from gpu_aware_tune.shipping import Wanted, compile_all, time_on, traces_of
from gpu_aware_tune.workers import WorkerHost

if TYPE_CHECKING:
    from gpu_aware_tune.builder import BuildPool
    from gpu_aware_tune.measure import Measurer
    from gpu_aware_tune.model import Model
    from gpu_aware_tune.partition import Device, Partition, Share
    from gpu_aware_tune.pipeline import Pipeline
    from gpu_aware_tune.tasks import Task

# Plain loops are measured where they might win: threads cost more than such a task takes.
_LIGHT_FLOPS = 2e6


class Run:
    """One run of `tune`: a context manager that ends every worker and closes the records on exit."""

    device: Device
    shares: list[Share]
    partitions: list[Partition]
    model: Model
    tasks: list[Task]
    store: Store
    search: Search

    def __init__(self, path: Path, settings: Settings) -> None:
        self.settings = settings
        self._path = path
        self._stack = contextlib.ExitStack()
        self.restart_clock()
        self._choices: list[Choice] = []
        self._libraries: dict[tuple[str, int], Path] = {}
        self._latency_s: dict[tuple[str, int], float] = {}
        self._errors: dict[int, float | None] = {}
        self._run_id: int | None = None
        self._drift: dict[str, float] = {}

    def __enter__(self) -> Run:
        from gpu_aware_tune.cuda_toolchain import runtime_environment

        # Workers get their copy of TVM while this process imports the model.
        self._host = self._stack.enter_context(WorkerHost(runtime_environment()))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._run_id is not None:
                interrupted = kind is None or issubclass(kind, (GeneratorExit, KeyboardInterrupt))
                self.store.finish_run(self._run_id, "interrupted" if interrupted else "failed")
        finally:
            self._stack.close()

    def open_device(self) -> Iterator[Event]:
        """Find the device, and make its partitions unless nothing will be measured."""
        from gpu_aware_tune.partition import (
            choose_backend,
            find_device,
            open_partitions,
            share_of,
        )

        settings = self.settings
        self.device, note = find_device(settings.target, settings.device, settings.arch)
        if note:
            yield Note(note)
        self._backend, why = choose_backend(self.device, settings.partition, settings.gpu_pct)
        yield Note(f"partition {self._backend}: {why}")
        shares = [share_of(self.device, percent, self._backend) for percent in settings.gpu_pct]
        self.shares = list({share.units: share for share in shares}.values())
        if len(self.shares) < len(shares):
            yield Note("some shares come to the same units: each number of units is tuned once")
        self._units = [share.units for share in self.shares]
        self._target = self.device.target(max(self._units))
        if settings.dry_run:
            return
        self.partitions = open_partitions(self.shares, self.device, self._backend)
        for partition in self.partitions:
            self._stack.callback(partition.close)

    def load_model(self) -> None:
        """Import the ONNX file."""
        from gpu_aware_tune.model import load_model
        from gpu_aware_tune.workers.warm import load_tvm

        load_tvm()
        self.model = load_model(
            self._path, self._tvm_target(), self.settings.input_shapes, self.settings.dtype
        )

    def extract_tasks(self) -> None:
        """List the model's unique kernels."""
        from gpu_aware_tune.tasks import extract

        self.tasks = extract(self.model, self._tvm_target())

    def open_records(self) -> None:
        """Open the record store, and build what the search keeps its results with."""
        from gpu_aware_tune.budget import Budget
        from gpu_aware_tune.database import args_json, is_same_task
        from gpu_aware_tune.traces import module_to_json

        settings = self.settings
        # Two different kernels with one hash: the one the store does not know stays untuned.
        self.store = self._stack.enter_context(Store(settings.records_path))
        self.tasks = [task for task in self.tasks if is_same_task(self.store, task.module)]
        if not settings.dry_run:
            for task in self.tasks:
                module_json, args = module_to_json(task.module), args_json(task.module)
                self.store.add_task(task.hash, task.name, module_json, args)
        budget = Budget(settings.trials, settings.time_s, settings.patience or 0)
        self.search = Search(
            settings, self.tasks, self._units, self._keys(), self.store, self._backend, budget
        )
        self.search.recall()

    def plan(self) -> Planned:
        """What is known and what is left to do."""
        settings = self.settings
        forecast = self.search.allocation.planned(self.search.budget.left())
        return Planned(
            model=self.model.name,
            device=self.device.name,
            shares=tuple(share.describe() for share in self.shares),
            units=tuple(self._units),
            backend=self._backend,
            tasks=tuple(
                TaskPlan(
                    name=task.name,
                    hash=task.hash,
                    weight=task.weight,
                    flops=task.flops,
                    planned_trials=forecast[task.hash] if settings.trials else 0,
                    known=self.search.allocation.trials(task.hash),
                )
                for task in self.tasks
            ),
            trials=settings.trials or 0,
            time_s=settings.time_s,
            dry_run=settings.dry_run,
        )

    def interrupt(self) -> None:
        """End the search after what is under way (Ctrl-C)."""
        self.search.interrupted = True

    def start_workers(self) -> Iterator[Event]:
        """Start measuring, build and search workers; the run's row is opened here."""
        from gpu_aware_tune.builder import BuildPool
        from gpu_aware_tune.candidates import Searcher, SearchSettings
        from gpu_aware_tune.measure import Measurer
        from gpu_aware_tune.pipeline import Pipeline
        from gpu_aware_tune.traces import module_to_json

        settings, cores = self.settings, available_cores()
        memory = settings.memory_limit_mb << 20
        self._measurers: list[Measurer] = []
        for partition in self.partitions:
            measurer = Measurer(self._host, partition, settings.run_timeout_s, memory)
            self._stack.callback(measurer.close)
            measurer.open()
            self._measurers.append(measurer)
        searchers, builders = worker_counts(cores)
        how = SearchSettings(
            settings.population, settings.generations, settings.trials_per_iteration, settings.seed
        )
        self._searchers = [
            Searcher(self._host, self._target, how, number) for number in range(searchers)
        ]
        self._builders: BuildPool = BuildPool(
            self._host, self._target, builders, settings.build_timeout_s, memory, self._build_env()
        )
        for task in self.tasks:
            self._builders.add_task(task.hash, module_to_json(task.module))
        self._pipeline: Pipeline = Pipeline(
            self.tasks,
            self._searchers,
            self._builders,
            self._measurers,
            cores,
            low_water=max(2 * builders, settings.trials_per_iteration // 2),
        )
        self._run_id = self.store.start_run(settings.as_dict(), self._machine())
        self.search.start(self._pipeline, self._run_id, self._default_traces())
        yield Note(
            f"{builders} build workers, {searchers} search workers, partition {self._backend}"
        )

    def _default_traces(self) -> dict[str, list[str]]:
        """The untuned schedules of every task, the plain loops ("") of light ones among them."""
        from gpu_aware_tune.schedules import default_schedules
        from gpu_aware_tune.traces import trace_to_json

        target, traces = self._tvm_target(), {}
        for task in self.tasks:
            found = [trace_to_json(s.trace) for s in default_schedules(task.module, target)]
            plain = [""] if task.flops < _LIGHT_FLOPS or not found else []
            traces[task.hash] = [*dict.fromkeys(found), *plain]
        return traces

    def choose(self) -> Iterator[Event]:
        """Pick each task's kernel for each share."""
        keys, units = self._keys(), self._units
        yield from retime(self.tasks, units, keys, self.store, self._pipeline, self.settings.top_k)
        self._drift = self.search.drift()
        for item in choose(
            self.tasks,
            units,
            keys,
            self.store,
            self._builders,
            self.settings.verify,
            self._target,
            self.settings.seed,
        ):
            if isinstance(item, Choice):
                self._choices.append(item)
            else:
                yield item

    def compile(self) -> None:
        """Compile each share's library, and the untuned one to compare with."""
        wanted = []
        for units in self._units:
            target = self.device.target(units)
            wanted.append(Wanted("tuned", units, target, traces_of(self._choices, units)))
            wanted.append(Wanted("untuned", units, target, self.search.untuned_traces(units)))
        self._libraries = compile_all(self.model, wanted, self._builders, self._host.scratch)
        self._builders.close()

    def time(self) -> Iterator[Event]:
        """Time the libraries before and after, each on its own partition; the faster one is kept.

        Kernels that are faster alone need not be so behind one another, in each other's caches.
        """
        from gpu_aware_tune.library import save_weights

        weights = self._host.scratch / "weights.bin"
        save_weights(self.model.weights, weights)
        for partition in self.partitions:
            units = partition.share.units
            pair = {n: path for (n, u), path in self._libraries.items() if u == units}
            spent = time_on(self._host, partition, pair, weights, self.model)
            if spent["untuned"] < spent["tuned"]:
                self._libraries["tuned", units] = pair["untuned"]
                self._choices = [
                    self._as_untuned(choice) if choice.units == units else choice
                    for choice in self._choices
                ]
                yield Note(
                    f"{units} units: the whole model is faster untuned"
                    f" ({1e3 * spent['untuned']:.2f} ms) than tuned ({1e3 * spent['tuned']:.2f} ms);"
                    " the untuned kernels are kept",
                    "warning",
                )
                spent["tuned"] = spent["untuned"]
            for name, seconds in spent.items():
                self._latency_s[name, units] = seconds

    def verify(self) -> Iterator[Event]:
        """Export the libraries and check the whole model's numbers on each share."""
        from gpu_aware_tune.library import export

        folder = self.settings.output_folder(self._path)
        tuned = {units: self._libraries["tuned", units] for units in self._units}
        if self.settings.verify:
            for units, path in tuned.items():
                yield from self._verify(units, path)
        facts = manifest(self.device, self._backend, self.settings.seed, self.shares, self._choices)
        for share, result in zip(
            facts["shares"],
            share_results(self.shares, self._latency_s, self._errors),
            strict=True,
        ):
            share.update(
                untuned_s=result.untuned_s, tuned_s=result.tuned_s, max_error=result.max_error
            )
        self._output = export(folder, self.model, tuned, facts)

    def finish(self) -> Finished:
        """Close the run's row and say what came of it."""
        assert self._run_id is not None
        core_s = self.core_seconds()
        finished = Finished(
            output=self._output,
            tasks=task_results(self._choices, self.search),
            shares=share_results(self.shares, self._latency_s, self._errors),
            trials=self.search.budget.done,
            elapsed_s=time.monotonic() - self._started,
            interrupted=self.search.interrupted,
            failures=dict(self.search.failures),
            core_seconds=core_s,
            stopped_by=self.search.stopped_by,
        )
        self.store.finish_run(
            self._run_id,
            "interrupted" if finished.interrupted else "finished",
            drift=self._drift,
            core_seconds=core_s,
            trials=finished.trials,
            latency_s={f"{name}-{units}": s for (name, units), s in self._latency_s.items()},
        )
        self._run_id = None
        return finished

    def _as_untuned(self, choice: Choice) -> Choice:
        seconds = self.search.untuned_s(choice.task, choice.units)
        trace = self.search.untuned_trace(choice.task, choice.units)
        return dataclasses.replace(
            choice,
            trace=trace or "",
            seconds=seconds or 0.0,
            origin="default" if trace else "plain",
        )

    def _build_env(self) -> dict[str, str]:
        from gpu_aware_tune.cuda_toolchain import environment

        return environment() if self.device.kind == "cuda" else {}

    def _tvm_target(self) -> Any:
        import tvm

        return tvm.target.Target(self._target)

    def _keys(self) -> dict[tuple[str, int], RecordKey]:
        import tvm

        from gpu_aware_tune.database import target_text

        text = target_text(self._tvm_target())
        return {
            (task.hash, units): RecordKey(task.hash, self.device.key, units, text, tvm.__version__)
            for task in self.tasks
            for units in self._units
        }

    def _machine(self) -> dict[str, Any]:
        import platform

        import tvm

        return {
            "device": self.device.key,
            "units": self._units,
            "backend": self._backend,
            "cores": available_cores(),
            "python": platform.python_version(),
            "tvm": tvm.__version__,
            "platform": platform.platform(),
            "model": self.model.name,
            "model_hash": self.model.hash,
        }

    def _verify(self, units: int, path: Path) -> Iterator[Event]:
        from gpu_aware_tune.verify import verify_library

        report = verify_library(self.model, path, self.settings.seed)
        if not report.ok:
            raise TuneError(
                f"the library for {units} units computes wrong numbers ({report.text}): not exported;"
                " its records are kept, run again with --no-verify to look at it"
            )
        self._errors[units] = report.max_error
        yield Note(f"{units} units: {report.text}")

    def restart_clock(self) -> None:
        """Count the run's time, and this process's share of the cores, from now."""
        self._started, self._main_from_s = time.monotonic(), time.process_time()

    def core_seconds(self) -> dict[str, float]:
        """Where the cores' time went since the clock was started, in core seconds."""
        elapsed = time.monotonic() - self._started
        spent = {
            "search": sum(searcher.cpu_s() for searcher in self._searchers),
            "build": self._builders.cpu_s(),
            "measure": self._pipeline.measure_core_s,
            "main": time.process_time() - self._main_from_s,
        }
        total = elapsed * available_cores()
        return {**spent, "idle": max(0.0, total - sum(spent.values())), "total": total}
