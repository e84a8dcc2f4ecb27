"""One model's part of a run: its kernels chosen, its libraries compiled, timed, verified, exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.events import Event, Finished, Note, Planned, ShareResult, TaskPlan
from gpu_aware_tune.finalize.library_build import Wanted, run_on, time_on, traces_of
from gpu_aware_tune.finalize.results import losses, manifest, reordered, share_results, task_results
from gpu_aware_tune.finalize.retiming import Reorder
from gpu_aware_tune.finalize.selection import Choice, choose
from gpu_aware_tune.search.allocation import Goal
from gpu_aware_tune.search.objectives import ONE_SET, most_throughput
from gpu_aware_tune.search.stage import Search
from gpu_aware_tune.settings import Settings

if TYPE_CHECKING:
    import numpy as np

    from gpu_aware_tune.finalize.verify import References
    from gpu_aware_tune.model.importer import Model
    from gpu_aware_tune.model.tasks import Task
    from gpu_aware_tune.partition import Device, Share
    from gpu_aware_tune.search.pools import Pools
    from gpu_aware_tune.workers import WorkerHost


class ModelRun:
    """What is known of one model while the stages of a run pass."""

    device: Device
    backend: str
    shares: list[Share]
    model: Model
    tasks: list[Task]

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.name = path.stem
        self.libraries: dict[tuple[str, int], Path] = {}  # by "tuned" or "untuned", and units
        self._choices: list[Choice] = []
        self._latency_s: dict[tuple[str, int], float] = {}
        self._errors: dict[int, float | None] = {}
        self._losses: dict[int, float] = {}

    @property
    def units(self) -> list[int]:
        """Of each share."""
        return [share.units for share in self.shares]

    def goals(self) -> list[Goal]:
        """What the search shall bring down for this model."""
        weights = {task.hash: task.weight for task in self.tasks}
        return [Goal(self.name, units, weights) for units in self.units]

    def load(self, target: Mapping[str, Any]) -> None:
        """Import the ONNX file and list its unique kernels."""
        import tvm

        from gpu_aware_tune.model.importer import load_model
        from gpu_aware_tune.model.tasks import extract

        tvm_target = tvm.target.Target(dict(target))
        shapes = self.settings.input_shapes
        self.model = load_model(self.path, tvm_target, shapes, self.settings.dtype)
        self.tasks = extract(self.model, tvm_target)

    def plan(self, search: Search) -> Planned:
        """What is known and what is left to do."""
        settings, allocation = self.settings, search.allocation
        forecast = allocation.planned(search.budgets[self.name].left(), self.name)
        return Planned(
            model=self.name,
            device=self.device.name,
            shares=tuple(share.describe() for share in self.shares),
            units=tuple(self.units),
            backend=self.backend,
            tasks=tuple(
                TaskPlan(
                    name=task.name,
                    hash=task.hash,
                    weight=task.weight,
                    flops=task.flops,
                    planned_trials=forecast[task.hash] if settings.trials else 0,
                    known=allocation.trials(task.hash),
                )
                for task in self.tasks
            ),
            trials=settings.trials or 0,
            time_s=settings.time_s,
            dry_run=settings.dry_run,
        )

    def choose(self, search: Search, pools: Pools, target: object) -> Iterator[Event]:
        """Pick each task's kernel for each share."""
        for item in choose(
            self.tasks,
            self.units,
            search.keys,
            search.store,
            pools.builders,
            self.settings,
            target,
        ):
            if isinstance(item, Choice):
                self._choices.append(item)
            else:
                yield item

    def wanted(self, search: Search, names: Sequence[str] = ("tuned", "untuned")) -> list[Wanted]:
        """Each share's library, and the untuned one to compare with."""
        wanted = []
        for units in self.units:
            target = self.device.target(units)
            traces = {
                "tuned": traces_of(self._choices, units),
                "untuned": search.untuned_traces(self.tasks, units),
            }
            wanted += [Wanted(self.model, n, units, target, traces[n]) for n in names]
        return wanted

    def time(self, host: WorkerHost, pools: Pools, search: Search) -> Iterator[Event]:
        """Time the libraries before and after, each on its own partition; the faster one is kept.

        Kernels that are faster alone need not be so behind one another, in each other's caches.
        """
        weights = self.save_weights(host)
        for units in self.units:
            pair = {n: path for (n, u), path in self.libraries.items() if u == units}
            spent = time_on(host, pools.partition_of(units), pair, weights, self.model)
            slower = spent["untuned"] < spent["tuned"]
            if slower and self.settings.objective not in ONE_SET:  # one set stays one set
                self._keep_untuned(units, search)
                yield Note(
                    f"{self.name}, {units} units: the whole model is faster untuned"
                    f" ({1e3 * spent['untuned']:.2f} ms) than tuned ({1e3 * spent['tuned']:.2f} ms);"
                    " the untuned kernels are kept",
                    "warning",
                )
                spent["tuned"] = spent["untuned"]
            for name, seconds in spent.items():
                self._latency_s[name, units] = seconds
        if self.settings.objective in ONE_SET:
            self._losses = losses(self._choices, search)
        if self.settings.objective == "throughput":
            yield self._keep_most_throughput()

    def _keep_most_throughput(self) -> Note:
        """Ship only the share with which the device serves most requests a second."""
        total = self.device.units_total
        latency_s = {units: self._latency_s["tuned", units] for units in self.units}
        best, rates = most_throughput(latency_s, total)
        told = ", ".join(
            f"{total // units} x {units} units: {rate:.0f}/s" for units, rate in rates.items()
        )
        self.shares = [share for share in self.shares if share.units == best]
        self._choices = [choice for choice in self._choices if choice.units == best]
        return Note(f"{self.name}: throughput by share: {told}; kept {best} units")

    def save_weights(self, host: WorkerHost) -> Path:
        """Write the weights where the workers can read them."""
        from gpu_aware_tune.library import save_weights

        path = host.scratch / "weights.bin"
        save_weights(self.model.weights, path)
        return path

    def export(self, host: WorkerHost, pools: Pools, together: Path | None) -> Iterator[Event]:
        """Check the whole model's numbers on each share, then write the folder.

        Args:
            host, pools: for a worker inside each share.
            together: the library of all shares, None where there is one share.
        """
        from gpu_aware_tune.finalize.verify import References
        from gpu_aware_tune.library import export

        tuned = {units: together or self.libraries["tuned", units] for units in self.units}
        entry = "main_{units}" if together else "main"
        if self.settings.verify:
            seed = self.settings.seed
            references = References(self.model, seed)
            weights = self.save_weights(host)
            for units, path in tuned.items():
                where, main = pools.partition_of(units), entry.format(units=units)
                given = run_on(host, where, path, main, weights, self.model, seed)
                yield self._verify(units, given, references)
        facts = manifest(
            self.device,
            self.backend,
            self.settings,
            self.shares,
            self._share_results(),
            self._choices,
        )
        export(self.settings.output_folder(self.path), self.model, tuned, facts, entry)

    def finish(
        self,
        search: Search,
        reorders: Mapping[tuple[str, int], Reorder],
        elapsed_s: float,
        core_seconds: Mapping[str, float],
    ) -> Finished:
        """What came of it."""
        units, hashes = set(self.units), {task.hash for task in self.tasks}
        mine = [r for (t, u), r in reorders.items() if u in units and t in hashes]
        return Finished(
            model=self.name,
            output=self.settings.output_folder(self.path),
            tasks=task_results(self._choices, search),
            shares=self._share_results(),
            trials=search.budgets[self.name].done,
            elapsed_s=elapsed_s,
            interrupted=search.interrupted,
            failures=dict(search.failures),
            core_seconds=core_seconds,
            stopped_by=search.stopped_by(self.name),
            reordered=reordered(mine),
        )

    def facts(self) -> dict[str, Any]:
        """What the run's row says of the model's latency."""
        return {f"{name}-{units}": s for (name, units), s in self._latency_s.items()}

    def _share_results(self) -> tuple[ShareResult, ...]:
        return share_results(self.shares, self._latency_s, self._errors, self._losses)

    def _keep_untuned(self, units: int, search: Search) -> None:
        """Ship the default schedules on one share."""
        self.libraries["tuned", units] = self.libraries["untuned", units]
        self._choices = [
            self._as_untuned(choice, search) if choice.units == units else choice
            for choice in self._choices
        ]

    def _as_untuned(self, choice: Choice, search: Search) -> Choice:
        seconds = search.untuned_s(choice.task, choice.units)
        trace = search.untuned_trace(choice.task, choice.units)
        return dataclasses.replace(
            choice,
            trace=trace or "",
            seconds=seconds or 0.0,
            origin="default" if trace else "plain",
        )

    def _verify(self, units: int, given: list[np.ndarray], references: References) -> Note:
        from gpu_aware_tune.finalize.verify import judge

        report = judge(self.model, given, references)
        if not report.ok:
            raise TuneError(
                f"{self.name}: the library for {units} units computes wrong numbers"
                f" ({report.text}): not exported; its records are kept, run again with --no-verify"
                " to look at it"
            )
        self._errors[units] = report.max_error
        return Note(f"{self.name}, {units} units: {report.text}")
