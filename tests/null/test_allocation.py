"""Where trials go, without measuring anything."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gpu_aware_tune.model.tasks import Task
from gpu_aware_tune.search.allocation import Allocation, Goal


def task(name: str, weight: int = 1, flops: float = 1e6) -> Task:
    module: Any = None  # allocation never looks at the kernel itself
    return Task(hash=name, name=name, module=module, weight=weight, flops=flops, args=())


def allocate(
    tasks: list[Task], units: tuple[int, ...], per_draft: int, per_task: int | None = None
) -> Allocation:
    """The allocation of one model on some shares."""
    weights = {one.hash: one.weight for one in tasks}
    return Allocation(tasks, [Goal("net", count, weights) for count in units], per_draft, per_task)


def spend(allocation: Allocation, drafts: int, per_draft: int, gain: float = 0.0) -> Counter[str]:
    """Let the allocation hand out drafts; each trial of a task brings `gain` of its latency."""
    given: Counter[str] = Counter()
    for _ in range(drafts):
        name = allocation.next({"net": 10_000})
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
    allocation = allocate(tasks, (2,), 8)
    for one in tasks:
        allocation.note(one.hash, 2, 1e-3 if one.flops > 1e8 else 1e-6, "default")
    given = spend(allocation, drafts=8, per_draft=8)
    assert sum(given[f"heavy{n}"] for n in range(3)) == 64
    assert all(given[f"heavy{n}"] >= 8 for n in range(3))


def test_weight_counts_like_latency() -> None:
    tasks = [task("often", weight=10), task("once")]
    allocation = allocate(tasks, (1,), 8)
    for one in tasks:
        allocation.note(one.hash, 1, 1e-3, "default")
    assert allocation.next({"net": 100}) == "often"


def test_a_task_that_stopped_improving_yields_to_the_others() -> None:
    tasks = [task("stuck", weight=2, flops=1e9), task("open", flops=1e9)]
    allocation = allocate(tasks, (1,), 8)
    for one in tasks:
        allocation.note(one.hash, 1, 1e-3, "default")
    given = spend(allocation, drafts=10, per_draft=8)
    assert given["open"] >= 16


def test_no_task_gets_more_than_its_limit() -> None:
    tasks = [task("a"), task("b")]
    allocation = allocate(tasks, (1,), 16, per_task=20)
    for one in tasks:
        allocation.note(one.hash, 1, 1e-3, "default")
    given = spend(allocation, drafts=50, per_draft=16)
    assert given == {"a": 20, "b": 20}
    assert allocation.next({"net": 100}) is None


def test_trials_in_flight_count_against_the_budget() -> None:
    allocation = allocate([task("a")], (1,), 8)
    allocation.note("a", 1, 1e-3, "default")
    allocation.start("a", 8)
    assert allocation.next({"net": 8}) is None
    assert allocation.next({"net": 9}) == "a"


def test_an_exhausted_task_is_left_alone() -> None:
    allocation = allocate([task("a")], (1,), 8)
    allocation.note("a", 1, 1e-3, "default")
    allocation.exhaust("a")
    assert allocation.next({"net": 100}) is None


def test_latency_is_the_weighted_sum_and_untuned_stays() -> None:
    tasks = [task("a", weight=3), task("b")]
    allocation = allocate(tasks, (1, 2), 8)
    allocation.note("a", 1, 2e-3, "default")
    allocation.note("b", 1, 1e-3, "default")
    allocation.note("a", 1, 1e-3, "search")
    assert allocation.latency_s("net")[1] == 4e-3
    assert allocation.latency_s("net", untuned=True)[1] == 7e-3


def test_models_are_weighed_by_their_own_latency() -> None:
    slow, fast = task("slow", flops=1e9), task("fast", flops=1e6)
    goals = [Goal("large", 2, {"slow": 1}), Goal("small", 2, {"fast": 1})]
    allocation = Allocation([slow, fast], goals, 8, None)
    allocation.note("slow", 2, 1.0, "default")
    allocation.note("fast", 2, 1e-3, "default")
    given: Counter[str] = Counter()
    for _ in range(8):
        name = allocation.next({"large": 1000, "small": 1000})
        assert name is not None
        given[name] += allocation.start(name, 8)
        for _ in range(8):
            allocation.finish(name)
    assert given["fast"] >= 24 and given["slow"] >= 24


def test_a_model_without_budget_left_gets_no_trials() -> None:
    tasks = [task("a"), task("b")]
    goals = [Goal("one", 1, {"a": 1}), Goal("two", 1, {"b": 1})]
    allocation = Allocation(tasks, goals, 8, None)
    for one in tasks:
        allocation.note(one.hash, 1, 1e-3, "default")
    assert allocation.next({"two": 8}) == "b"
    assert allocation.next({"one": 0, "two": 0}) is None


def test_a_shared_task_is_measured_on_the_units_of_every_model_that_has_it() -> None:
    goals = [Goal("one", 1, {"a": 1}), Goal("two", 2, {"a": 2, "b": 1}), Goal("three", 2, {"a": 1})]
    allocation = Allocation([task("a"), task("b")], goals, 8, None)
    assert allocation.units_of("a") == (1, 2)
    assert allocation.units_of("b") == (2,)
    assert allocation.models_of("a") == ("one", "two", "three")
    allocation.note("a", 1, 1e-3, "default")
    allocation.note("a", 2, 5e-4, "default")
    allocation.start("a", 4)
    assert [allocation.in_flight(name) for name in ("one", "two", "three")] == [4, 4, 4]
    assert allocation.latency_s("two") == {2: 1e-3}


def test_a_task_whose_default_schedules_all_failed_still_gets_trials() -> None:
    tasks = [task("broken", flops=1e9), task("fine", flops=1e6)]
    allocation = allocate(tasks, (1,), 8)
    allocation.note("fine", 1, 1e-3, "default")
    assert spend(allocation, drafts=6, per_draft=8)["broken"] >= 8
