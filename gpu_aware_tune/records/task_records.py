"""The records of one run's tasks: what the stages read and write, without keys and SQL."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpu_aware_tune.records.rows import UNFIT
from gpu_aware_tune.records.store import Record, RecordKey, Store

BASELINE = "default"  # origin of a baseline schedule


@dataclass(frozen=True)
class TaskRecords:
    """A store, seen through the keys of one run.

    One rule holds for every choice among kernels: where any of them was measured a second time,
    longer and alone, only those that were can win. A quick number that happens to be low must not.

    Args:
        store: where the records are.
        keys: the key of each task, by its hash and units.
    """

    store: Store
    keys: Mapping[tuple[str, int], RecordKey]

    def all(self, task: str, units: int) -> list[Record]:
        """Every record of a task on some units, failures too, without those that do not fit it."""
        return [r for r in self.store.all(self.keys[task, units]) if r.failure != UNFIT]

    def usable(self, task: str, units: int) -> list[Record]:
        """The records of kernels that ran and are numerically correct, by what counts, best first."""
        return decisive(record for record in self.all(task, units) if record.usable)

    def best(self, task: str, units: int, count: int) -> list[Record]:
        """The fastest records, measured a second time or not."""
        return self.store.best(self.keys[task, units], count)

    def fastest_s(self, task: str, units: int) -> float | None:
        """Seconds of the fastest kernel, None where none ran."""
        found = self.usable(task, units)
        return found[0].best_s if found else None

    def baseline(self, task: str, units: int) -> Record | None:
        """The fastest baseline schedule, None where none ran."""
        records = (r for r in self.all(task, units) if r.usable and r.origin == BASELINE)
        found = decisive(records)
        return found[0] if found else None

    def baseline_traces(self, baselines: Mapping[str, Sequence[str]], units: int) -> dict[str, str]:
        """The kernels of an untuned library: each task's fastest baseline schedule.

        Args:
            baselines: traces of each task's baseline schedules, the most promising first; that one
                is taken where none has been measured.
            units: of the library.
        """
        traces = {}
        for task, known in baselines.items():
            record = self.baseline(task, units)
            traces[task] = record.trace if record else next(iter(known), "")
        return {task: trace for task, trace in traces.items() if trace}

    def seeds(self, task: str, units: int, count: int) -> list[Record]:
        """The best schedules that the task has on other units or devices of the same kind."""
        return self.store.seeds(self.keys[task, units], count)

    def relative(self, task: str, units: int, other: str) -> list[Record]:
        """What the store holds of another task under a task's key: `usable` kernels, best first."""
        found = self.store.all(dataclasses.replace(self.keys[task, units], task=other))
        return decisive(record for record in found if record.usable)

    def from_others(self, last_id: int, runs: Sequence[int]) -> list[Record]:
        """What runs in other processes have added for these tasks since; see `Store.added_since`."""
        wanted = set(self.keys.values())
        return [r for r in self.store.added_since(last_id, runs) if r.key in wanted]

    def set_retimed(self, task: str, units: int, trace: str, seconds: float) -> None:
        """Keep the seconds of a second measurement, made alone; from then on they count."""
        self.store.set_retimed(self.keys[task, units], trace, seconds)

    def mark_wrong(self, task: str, units: Sequence[int], trace: str) -> None:
        """Mark a kernel that computes wrong numbers."""
        for count in units:
            self.store.mark_wrong(self.keys[task, count], trace)

    def mark_unfit(self, task: str, trace: str) -> None:
        """Mark a trace that cannot be applied to its task."""
        self.store.mark_unfit(task, trace)


def decisive(records: Iterable[Record]) -> list[Record]:
    """Rank usable records of one task on some units: those measured twice, where there are any."""
    found = list(records)
    again = [record for record in found if record.retimed is not None]
    return sorted(again or found, key=lambda record: record.best_s or 0.0)
