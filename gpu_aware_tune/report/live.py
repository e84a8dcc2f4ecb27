"""Where a run stands, read from its records while another process writes them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gpu_aware_tune.records.lock import is_writing
from gpu_aware_tune.records.store import Run, Store
from gpu_aware_tune.report.history import History, read_history
from gpu_aware_tune.report.inputs import find_run, find_tasks


@dataclass(frozen=True)
class State:
    """A run at a moment.

    Args:
        history: what its records tell.
        writer: the process that writes the store, None where there is none.
        now: when it was looked at.
    """

    history: History
    writer: int | None
    now: float

    @property
    def goes_on(self) -> bool:
        """Whether the run is under way."""
        return self.history.run.status == "running" and self.writer is not None

    @property
    def lost(self) -> bool:
        """Whether its process ended without closing it, as kill -9 does."""
        return self.history.run.status == "running" and self.writer is None

    @property
    def elapsed_s(self) -> float:
        """Seconds that the run has taken, to its last record where it did not end by itself."""
        run = self.history.run
        if self.goes_on:
            return max(0.0, self.now - run.started)
        return (run.finished - run.started) if run.finished else self.history.last_s

    @property
    def measured(self) -> int:
        """How many tasks have a measurement on every share."""
        tasks = self.history.tasks
        return sum(all(curve.steps for curve in task.curves.values()) for task in tasks)

    @property
    def trials_total(self) -> int | None:
        """The trials asked for; None where time alone ends the run."""
        total = self.history.run.settings.get("trials")
        return None if total is None else int(total)

    @property
    def trials_done(self) -> int:
        """Trials as the run counts them: those of earlier runs that it goes on from are included."""
        done = self.history.trials + self.history.known
        return done if self.trials_total is None else min(done, self.trials_total)

    @property
    def trials_per_min(self) -> float:
        """The rate of the search, without what comes before and after it."""
        spent = self.history.phases["search"]
        return 60 * self.history.trials / spent if spent > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds of search left, by trials or by time, whichever ends first; None if unknown."""
        left = []
        if self.trials_total is not None and self.trials_per_min > 0:
            left.append(60 * (self.trials_total - self.trials_done) / self.trials_per_min)
        time_s = self.history.run.settings.get("time_s")
        if time_s is not None:
            left.append(max(0.0, float(time_s) - self.elapsed_s))
        return min(left, default=None)

    @property
    def phase(self) -> str:
        """What the run does now, as far as its records tell; or how it ended."""
        run = self.history.run
        if self.lost:
            return "killed: its process is gone and did not close the run"
        if not self.goes_on:
            return run.status
        if not self.history.trials:
            return "measuring the untuned schedules"
        if self.trials_done == self.trials_total:
            return "measuring the best again, compiling, checking"
        return "searching"


class Watcher:
    """Looks at one run again and again.

    Args:
        store: opened read-only.
        run_id: which run; the latest by default.
    """

    def __init__(self, store: Store, run_id: int | None = None) -> None:
        self._store = store
        run = find_run(store, run_id)
        self._run_id = run.id
        self._infos = find_tasks(store, run)

    def look(self) -> State:
        """Return where the run stands now."""
        run = self._run()
        writer = self._writer(run)
        if run.status == "running" and writer is None:
            run = self._run()  # it may have ended between the two questions
        history = read_history(self._store, run, self._infos)
        return State(history, writer, time.time())

    def _writer(self, run: Run) -> int | None:
        """The process of a run, if it lives."""
        pid = run.machine.get("pid")
        alive = isinstance(pid, int) and is_writing(self._store.path, pid)
        return pid if alive else None

    def _run(self) -> Run:
        return find_run(self._store, self._run_id)
