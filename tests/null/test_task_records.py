"""Which record of a task counts: one rule for every choice among kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from gpu_aware_tune.codegen.build_pool import BuildPool
from gpu_aware_tune.finalize.selection import choose
from gpu_aware_tune.model.tasks import Task
from gpu_aware_tune.records.rows import UNFIT
from gpu_aware_tune.records.store import Record, RecordKey, Store
from gpu_aware_tune.records.task_records import TaskRecords
from gpu_aware_tune.settings import Objective, RunSettings

KEY = RecordKey("7", "llvm/x", 2, "llvm", "0.27")


@pytest.fixture
def records(tmp_path: Path) -> Iterator[TaskRecords]:
    with Store(tmp_path / "db") as store:
        yield TaskRecords(store, {("7", 2): KEY})


def test_a_quick_number_does_not_beat_one_that_was_measured_again(records: TaskRecords) -> None:
    records.store.add(
        [
            Record(KEY, "lucky", 0.001, origin="default"),
            Record(KEY, "steady", 0.002, origin="default"),
            Record(KEY, "found", 0.0015),
        ]
    )
    baseline = records.baseline("7", 2)
    assert baseline is not None and baseline.trace == "lucky", "nothing else to go by"
    records.set_retimed("7", 2, "steady", 0.0021)
    baseline = records.baseline("7", 2)
    assert baseline is not None and baseline.trace == "steady"
    assert records.fastest_s("7", 2) == 0.0021
    records.set_retimed("7", 2, "found", 0.0014)
    assert records.fastest_s("7", 2) == 0.0014
    assert records.baseline_traces({"7": ["first"]}, 2) == {"7": "steady"}


def test_a_task_without_records_takes_its_first_baseline_schedule(records: TaskRecords) -> None:
    assert records.baseline_traces({"7": ["first", "second"]}, 2) == {"7": "first"}
    assert records.baseline_traces({"7": [""]}, 2) == {}, "the unscheduled kernel has no trace"


def test_wrong_failed_and_unfit_records_never_count(records: TaskRecords) -> None:
    records.store.add(
        [
            Record(KEY, "wrong", 0.001, wrong=True),
            Record(KEY, "failed", failure="crash"),
            Record(KEY, "unfit", 0.0005),
            Record(KEY, "good", 0.004, origin="default"),
        ]
    )
    records.mark_unfit("7", "unfit")
    assert [record.trace for record in records.usable("7", 2)] == ["good"]
    assert "unfit" not in {record.trace for record in records.all("7", 2)}
    kept = [record for record in records.store.all(KEY) if record.failure == UNFIT]
    assert [record.seconds for record in kept] == [0.0005], "what was measured stays"


class Passing:
    """Build workers in which every kernel is numerically correct."""

    def call_all(self, calls: Any) -> Iterator[tuple[Any, None]]:
        for name in calls:
            yield name, None


@pytest.mark.parametrize("objective", [Objective.ROBUST, Objective.MEAN])
def test_one_kernel_for_all_shares_is_not_chosen_by_one_share_that_was_measured_again(
    tmp_path: Path, objective: Objective
) -> None:
    task = Task("7", "conv", None, 1, 1.0, ())
    task.__dict__["module_json"] = ""
    one = RecordKey("7", "llvm/x", 1, "llvm", "0.27")
    with Store(tmp_path / "db") as store:
        records = TaskRecords(store, {("7", 1): one, ("7", 2): KEY})
        store.add(
            [
                Record(KEY, "narrow", 0.009),
                Record(one, "narrow", 0.010),
                Record(KEY, "even", 0.005),
                Record(one, "even", 0.011),
            ]
        )
        records.set_retimed("7", 1, "narrow", 0.010)
        records.set_retimed("7", 1, "even", 0.011)
        settings = RunSettings(objective=objective)
        passing = cast(BuildPool, Passing())
        steps = choose([task], [1, 2], records, {"7": ()}, passing, settings, {})
        while True:
            try:
                next(steps)
            except StopIteration as end:
                chosen = end.value
                break
        assert {choice.trace for choice in chosen} == {"even"}, "twice as fast on two units"
