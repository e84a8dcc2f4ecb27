"""What a run holds while its stages pass: the settings, the device, the record store, the workers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from gpu_aware_tune.events import Event, Finished, Note
from gpu_aware_tune.finalize.library_build import CompiledLibraries
from gpu_aware_tune.partition import SIDE_BY_SIDE, Device, choose_backend, find_device
from gpu_aware_tune.records.store import Store
from gpu_aware_tune.run.jobs import ModelGoal
from gpu_aware_tune.search.budget import StopRequest
from gpu_aware_tune.search.pools import available_cores
from gpu_aware_tune.settings import RunSettings
from gpu_aware_tune.workers import WorkerHost


class Session:
    """One run of `tune`: a context manager that ends every worker and closes the records on exit.

    Args:
        settings: of the run.
        stop: whether somebody asked to end the search.
    """

    device: Device
    backend: str
    host: WorkerHost
    store: Store
    compiled: CompiledLibraries

    def __init__(self, settings: RunSettings, stop: StopRequest | None = None) -> None:
        self.settings = settings
        self.stop = stop or StopRequest()
        self.stack = contextlib.ExitStack()
        self._run_ids: dict[str, int] = {}
        self.restart_clock()

    def __enter__(self) -> Session:
        from gpu_aware_tune.codegen.cuda_toolchain import runtime_environment

        settings = self.settings
        look = settings.dry_run
        try:
            self.store = self.stack.enter_context(
                Store(settings.records_path, look, missing_ok=look)
            )
            # Workers get their copy of TVM while this process imports the models.
            self.host = self.stack.enter_context(WorkerHost(runtime_environment()))
            self.compiled = CompiledLibraries(self.host.scratch)
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            interrupted = kind is None or issubclass(kind, (GeneratorExit, KeyboardInterrupt))
            for run_id in self._run_ids.values():
                self.store.finish_run(run_id, "interrupted" if interrupted else "failed")
        finally:
            self.stack.close()

    def find_device(self, goals: Sequence[ModelGoal]) -> Iterator[Event]:
        """Find the device and the backend that makes the goals' shares of it real."""
        settings = self.settings
        self.device, note = find_device(settings.target, settings.device, settings.arch)
        if note:
            yield Note(note)
        percents = [percent for goal in goals for percent in goal.percents] or [100]
        several = len(goals) > 1 or settings.slices > 1
        self.backend, why = choose_backend(
            self.device, settings.partition, percents, side_by_side=several
        )
        yield Note(f"partition {self.backend}: {why}")
        if several and self.backend not in SIDE_BY_SIDE:
            yield Note(f"partition {self.backend} has no slices: one share is measured at a time")

    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started

    def left_s(self) -> float | None:
        """Seconds left of `settings.time_s`; None where the run has no such limit."""
        limit = self.settings.time_s
        return None if limit is None else limit - self.elapsed_s()

    def open_row(self, model: str, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> int:
        """Open a model's row in the store's list of runs; returns its id."""
        self._run_ids[model] = self.store.start_run(settings, machine)
        return self._run_ids[model]

    def close_row(self, finished: Finished, **facts: Any) -> None:
        """Close a model's row with what is known of its run."""
        status = "interrupted" if finished.interrupted else "finished"
        self.store.finish_run(self._run_ids.pop(finished.model), status, **facts)

    def machine(self) -> dict[str, Any]:
        """What a run's row says of the machine."""
        import platform

        import tvm

        return {
            "device": self.device.key,
            "backend": self.backend,
            "cores": available_cores(),
            "python": platform.python_version(),
            "tvm": tvm.__version__,
            "platform": platform.platform(),
        }

    def restart_clock(self) -> None:
        """Count the run's time, and this process's share of the cores, from now."""
        self._started, self._main_from_s = time.monotonic(), time.process_time()

    def core_seconds(self, spent: Mapping[str, float], cores: int) -> dict[str, float]:
        """Where the cores' time went since the clock was started, in core seconds.

        Args:
            spent: by the workers, by what they did.
            cores: how many there are.
        """
        whole = {**spent, "main": time.process_time() - self._main_from_s}
        total = self.elapsed_s() * cores
        return {**whole, "idle": max(0.0, total - sum(whole.values())), "total": total}
