"""The state of one run over one or more models, and what each stage of the main path does to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.events import Event, Finished, Note, Planned, Stage
from gpu_aware_tune.finalize.library_build import compile_all, compile_together
from gpu_aware_tune.finalize.retiming import Reorder, retime
from gpu_aware_tune.records.store import RecordKey, Store
from gpu_aware_tune.run.model_run import ModelRun
from gpu_aware_tune.search.pools import Pools, PoolSettings, available_cores, plan_slices
from gpu_aware_tune.search.stage import Search, Workers
from gpu_aware_tune.settings import Settings
from gpu_aware_tune.workers import WorkerHost

if TYPE_CHECKING:
    from gpu_aware_tune.model.tasks import Task
    from gpu_aware_tune.partition import Device
    from gpu_aware_tune.search.pipeline import TaskSpec

# Plain loops are measured where they might win: threads cost more than such a task takes.
_LIGHT_FLOPS = 2e6


class Run:
    """One run of `tune`: a context manager that ends every worker and closes the records on exit.

    Args:
        jobs: each model's file with its settings; those about machine, search and records are the
            same for all.
    """

    device: Device
    store: Store
    search: Search
    pools: Pools

    def __init__(self, jobs: Sequence[tuple[Path, Settings]]) -> None:
        self.models = [ModelRun(path, settings) for path, settings in jobs]
        self.settings = jobs[0][1]
        self._stack = contextlib.ExitStack()
        self.restart_clock()
        self._run_ids: dict[str, int] = {}
        self._reorders: dict[tuple[str, int], Reorder] = {}

    def __enter__(self) -> Run:
        from gpu_aware_tune.codegen.cuda_toolchain import runtime_environment

        # Workers get their copy of TVM while this process imports the models.
        self.host = self._stack.enter_context(WorkerHost(runtime_environment()))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            interrupted = kind is None or issubclass(kind, (GeneratorExit, KeyboardInterrupt))
            for run_id in self._run_ids.values():
                self.store.finish_run(run_id, "interrupted" if interrupted else "failed")
        finally:
            self._stack.close()

    def open_device(self) -> Iterator[Event]:
        """Find the device and the backend that makes shares of it real."""
        from gpu_aware_tune.partition import SIDE_BY_SIDE, choose_backend, find_device

        settings = self.settings
        self.device, note = find_device(settings.target, settings.device, settings.arch)
        if note:
            yield Note(note)
        percents = [percent for model in self.models for percent in model.settings.gpu_pct]
        several = len(self.models) > 1 or settings.slices > 1
        wanted = settings.partition
        self._backend, why = choose_backend(self.device, wanted, percents, side_by_side=several)
        yield Note(f"partition {self._backend}: {why}")
        if several and self._backend not in SIDE_BY_SIDE:
            yield Note(f"partition {self._backend} has no slices: one share is measured at a time")

    def load_models(self) -> Iterator[Event]:
        """Import the ONNX files, list their kernels, and give each model its units."""
        from gpu_aware_tune.workers.warm import load_tvm

        load_tvm()
        for model in self.models:
            yield Stage("model", f"importing {model.path.name}")
            model.load(self.device.target(self.device.units_total))
            for note in model.model.notes:
                yield Note(f"{model.path.name}: {note}")
        yield from self._assign_shares()

    def _assign_shares(self) -> Iterator[Event]:
        from gpu_aware_tune.partition import share_of

        work = {m.name: sum(t.flops * t.weight for t in m.tasks) for m in self.models}
        for model in self.models:
            percents = model.settings.gpu_pct
            if self.settings.share == "auto":
                percents = (max(1, int(100 * work[model.name] / (sum(work.values()) or 1))),)
            shares = [share_of(self.device, percent, self._backend) for percent in percents]
            model.shares = list({share.units: share for share in shares}.values())
            model.device, model.backend = self.device, self._backend
            if len(model.shares) < len(shares):
                yield Note("some shares come to the same units: each number of units is tuned once")
        self.target = self.device.target(max(u for model in self.models for u in model.units))

    def open_records(self) -> Iterator[Event]:
        """Open the record store, and build what the search keeps its results with."""
        from gpu_aware_tune.search.budget import Budget

        settings = self.settings
        look = settings.dry_run
        self.store = self._stack.enter_context(Store(settings.records_path, look, missing_ok=look))
        for model in self.models:
            yield from self._know_tasks(model)
        self.search = Search(
            settings,
            self.tasks,
            [goal for model in self.models for goal in model.goals()],
            self._keys(),
            self.store,
            self._backend,
            {m.name: Budget(settings.trials, settings.time_s, settings.patience or 0)
             for m in self.models},
        )  # fmt: skip
        self.search.recall()

    def _know_tasks(self, model: ModelRun) -> Iterator[Event]:
        """Keep a model's tasks in the store; of two different kernels with one hash only the first."""
        from gpu_aware_tune.kernels.traces import module_to_json
        from gpu_aware_tune.records.tvm_database import args_json, is_same_task

        for task in list(model.tasks):
            if not is_same_task(self.store, task.module):
                model.tasks.remove(task)
                yield Note(f"{task.name} stays untuned: another kernel has its hash", "warning")
            elif not self.settings.dry_run:
                module_json, args = module_to_json(task.module), args_json(task.module)
                self.store.add_task(task.hash, task.name, module_json, args)

    @property
    def tasks(self) -> list[Task]:
        """Every task of every model, each once, heaviest first."""
        tasks = {task.hash: task for model in reversed(self.models) for task in model.tasks}
        return sorted(tasks.values(), key=lambda task: -task.flops * task.weight)

    def plan(self) -> list[Planned]:
        """What is known and what is left to do, for each model."""
        return [model.plan(self.search) for model in self.models]

    def interrupt(self) -> None:
        """End the search after what is under way (Ctrl-C)."""
        self.search.interrupted = True

    def start_workers(self) -> Iterator[Event]:
        """Start measuring, build and search workers; the runs' rows are opened here."""
        from gpu_aware_tune.kernels.traces import module_to_json
        from gpu_aware_tune.search.pipeline import TaskSpec

        units_of = self.search.allocation.units_of
        settings = self._pool_settings()
        specs = {task.hash: TaskSpec(task.args, units_of(task.hash)) for task in self.tasks}
        modules = {task.hash: module_to_json(task.module) for task in self.tasks}
        self.pools = self._stack.enter_context(Pools(self.host, settings))
        text = self.pools.start(specs, modules)
        pipeline: Workers = self.pools.pipeline
        if self.settings.ray is not None:  # the local ones stay for what comes after the search
            pipeline = yield from self._join_cluster(self.settings.ray, settings, specs, modules)
        for model in self.models:
            row = self.store.start_run(model.settings.as_dict(), self._machine(model))
            self._run_ids[model.name] = row
        self.search.start(pipeline, self._run_ids, self._default_traces())
        yield Note(text)

    def _join_cluster(
        self,
        address: str,
        pools: PoolSettings,
        specs: Mapping[str, TaskSpec],
        modules: Mapping[str, str],
    ) -> Generator[Event, None, Workers]:
        """Start workers like this machine's own on every machine of a Ray cluster."""
        import tvm

        from gpu_aware_tune import __version__
        from gpu_aware_tune.cluster import NodeSetup, connect

        versions = (__version__, tvm.__version__)
        exclusive = self.settings.exclusive
        setup = NodeSetup(pools, specs, modules, self.settings.arch, versions, exclusive)
        cluster, text = connect(address, setup, self._stack)
        yield Note(text)
        for line in cluster.wait():
            yield Note(line)
        return cluster

    def _pool_settings(self) -> PoolSettings:
        from gpu_aware_tune.partition import SIDE_BY_SIDE, instance_units
        from gpu_aware_tune.search.candidates import SearchSettings

        settings, models = self.settings, self.models
        shares = [share for model in models for share in model.shares]
        most = settings.slices or len(models)
        if self._backend not in SIDE_BY_SIDE:
            most = 1
        return PoolSettings(
            device=self.device,
            backend=self._backend,
            slices=plan_slices(
                shares, self.device, most, instance_units(self.device, self._backend)
            ),
            target=self.target,
            search=SearchSettings(
                settings.population,
                settings.generations,
                settings.trials_per_iteration,
                settings.seed,
                units=max(s.units for s in shares) if self.device.kind == "cuda" else 0,
            ),
            build_timeout_s=settings.build_timeout_s,
            run_timeout_s=settings.run_timeout_s,
            memory_bytes=settings.memory_limit_mb << 20,
        )

    def _default_traces(self) -> dict[str, list[str]]:
        """The untuned schedules of every task, on a CPU the plain loops ("") of light ones among them.

        Plain loops bind no GPU threads: the host would run them, on addresses of the device.
        """
        from gpu_aware_tune.kernels.schedules import default_schedules
        from gpu_aware_tune.kernels.traces import trace_to_json

        target, traces = self.tvm_target(), {}
        on_cpu = target.kind.name == "llvm"
        for task in self.tasks:
            found = [trace_to_json(s.trace) for s in default_schedules(task.module, target)]
            plain = on_cpu and (task.flops < _LIGHT_FLOPS or not found)
            traces[task.hash] = [*dict.fromkeys(found), *([""] if plain else [])]
        return traces

    def choose(self) -> Iterator[Event]:
        """Measure the best kernels again, alone, and pick each task's for each share."""
        self._reorders = yield from retime(self.search, self.pools, self.settings.top_k)
        self._drift = {model.name: self.search.drift(model.name) for model in self.models}
        for model in self.models:
            yield from model.choose(self.search, self.pools, self.target)

    def compile(self) -> None:
        """Compile every model's libraries side by side."""
        wanted = [item for model in self.models for item in model.wanted(self.search)]
        paths = compile_all(wanted, self.pools.builders, self.host.scratch)
        for model in self.models:
            mine = {key[1:]: path for key, path in paths.items() if key[0] == model.name}
            model.libraries = mine

    def time(self) -> Iterator[Event]:
        """Time every library on its own partition, before and after, one at a time."""
        for model in self.models:
            yield from model.time(self.host, self.pools, self.search)

    def export(self) -> Iterator[Event]:
        """Compile the shares of each model into one library, verify and write the folders."""
        several = [model for model in self.models if len(model.units) > 1]
        wanted = [item for model in several for item in model.wanted(self.search, ("tuned",))]
        together = compile_together(wanted, self.pools.builders, self.host.scratch)
        self.pools.builders.close()
        for model in self.models:
            yield from model.export(self.host, self.pools, together.get(model.name))

    def finish(self) -> Iterator[Finished]:
        """Close the runs' rows and say what came of each model."""
        core_s = self.core_seconds()
        elapsed_s = time.monotonic() - self._started
        for model in self.models:
            finished = model.finish(self.search, self._reorders, elapsed_s, core_s)
            self.store.finish_run(
                self._run_ids.pop(model.name),
                "interrupted" if finished.interrupted else "finished",
                drift=self._drift[model.name],
                core_seconds=core_s,
                trials=finished.trials,
                latency_s=model.facts(),
            )
            yield finished

    def tvm_target(self) -> Any:
        """What kernels are compiled for during the search."""
        import tvm

        return tvm.target.Target(dict(self.target))

    def _keys(self) -> Mapping[tuple[str, int], RecordKey]:
        import tvm

        from gpu_aware_tune.records.tvm_database import target_text

        text, device = target_text(self.tvm_target()), self.device.key
        return {
            (task.hash, units): RecordKey(task.hash, device, units, text, tvm.__version__)
            for model in self.models
            for task in model.tasks
            for units in model.units
        }

    def _machine(self, model: ModelRun) -> dict[str, Any]:
        import platform

        import tvm

        return {
            "device": self.device.key,
            "units": model.units,
            "backend": self._backend,
            "evidence": self.pools.evidence(model.units),
            "cores": available_cores(),
            "python": platform.python_version(),
            "tvm": tvm.__version__,
            "platform": platform.platform(),
            "model": model.name,
            "model_hash": model.model.hash,
            "models": [other.name for other in self.models],
            "tasks": [
                {"hash": task.hash, "name": task.name, "weight": task.weight}
                for task in model.tasks
            ],
        }

    def restart_clock(self) -> None:
        """Count the run's time, and this process's share of the cores, from now."""
        self._started, self._main_from_s = time.monotonic(), time.process_time()

    def core_seconds(self) -> dict[str, float]:
        """Where the cores' time went since the clock was started, in core seconds."""
        elapsed = time.monotonic() - self._started
        main = time.process_time() - self._main_from_s
        spent = {**self.search.pipeline.core_seconds(), "main": main}
        total = elapsed * self.search.pipeline.cores
        return {**spent, "idle": max(0.0, total - sum(spent.values())), "total": total}
