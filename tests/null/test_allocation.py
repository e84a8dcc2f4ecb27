"""Where trials go, without measuring anything."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gpu_aware_tune.allocation import Allocation
from gpu_aware_tune.tasks import Task


def task(name: str, weight: int = 1, flops: float = 1e6) -> Task:
    module: Any = None  # allocation never looks at the kernel itself
    return Task(hash=name, name=name, module=module, weight=weight, flops=flops, args=())


def spend(allocation: Allocation, drafts: int, per_draft: int, gain: float = 0.0) -> Counter[str]:
    """Let the allocation hand out drafts; each trial of a task brings `gain` of its latency."""
    given: Counter[str] = Counter()
    for _ in range(drafts):
        name = allocation.next(10_000)
        if name is None:
            break
        count = allocation.start(name, per_draft)
        given[name] += count
        for _ in range(count):
            for units, seconds in dict(allocation.best_s(name)).items():
                allocation.note(name, units, seconds * (1 - gain), "search")
            allocation.finish(name)
    return given


def test_heavy_tasks_get_the_trials_and_light_ones_none() -> None:
    tasks = [task(f"heavy{n}", flops=1e9) for n in range(3)] + [
        task(f"light{n}") for n in range(27)
    ]
    allocation = Allocation(tasks, (2,), 8, None)
    for one in tasks:
        allocation.note(one.hash, 2, 1e-3 if one.flops > 1e8 else 1e-6, "default")
    given = spend(allocation, drafts=8, per_draft=8)
    assert sum(given[f"heavy{n}"] for n in range(3)) == 64
    assert all(given[f"heavy{n}"] >= 8 for n in range(3))


def test_weight_counts_like_latency() -> None:
    tasks = [task("often", weight=10), task("once")]
    allocation = Allocation(tasks, (1,), 8, None)
    for one in tasks:
        allocation.note(one.hash, 1, 1e-3, "default")
    assert allocation.next(100) == "often"


def test_a_task_that_stopped_improving_yields_to_the_others() -> None:
    tasks = [task("stuck", weight=2, flops=1e9), task("open", flops=1e9)]
    allocation = Allocation(tasks, (1,), 8, None)
    for one in tasks:
        allocation.note(one.hash, 1, 1e-3, "default")
    given = spend(allocation, drafts=10, per_draft=8)
    assert given["open"] >= 16


def test_no_task_gets_more_than_its_limit() -> None:
    tasks = [task("a"), task("b")]
    allocation = Allocation(tasks, (1,), 16, per_task=20)
    for one in tasks:
        allocation.note(one.hash, 1, 1e-3, "default")
    given = spend(allocation, drafts=50, per_draft=16)
    assert given == {"a": 20, "b": 20}
    assert allocation.next(100) is None


def test_trials_in_flight_count_against_the_budget() -> None:
    allocation = Allocation([task("a")], (1,), 8, None)
    allocation.note("a", 1, 1e-3, "default")
    allocation.start("a", 8)
    assert allocation.next(left=8) is None
    assert allocation.next(left=9) == "a"


def test_an_exhausted_task_is_left_alone() -> None:
    allocation = Allocation([task("a")], (1,), 8, None)
    allocation.note("a", 1, 1e-3, "default")
    allocation.exhaust("a")
    assert allocation.next(100) is None


def test_latency_is_the_weighted_sum_and_untuned_stays() -> None:
    tasks = [task("a", weight=3), task("b")]
    allocation = Allocation(tasks, (1, 2), 8, None)
    allocation.note("a", 1, 2e-3, "default")
    allocation.note("b", 1, 1e-3, "default")
    allocation.note("a", 1, 1e-3, "search")
    assert allocation.latency_s()[1] == 4e-3
    assert allocation.latency_s(untuned=True)[1] == 7e-3
