"""The search worker's inside: drafts, what it learns, and schedules that are turned down for size."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_aware_tune.workers.warm import load_tvm

load_tvm()

import tvm  # noqa: E402

from gpu_aware_tune.kernels.space import MAX_STATEMENTS, make_space, statements  # noqa: E402
from gpu_aware_tune.kernels.traces import apply_trace, module_to_json, task_hash  # noqa: E402
from gpu_aware_tune.search.candidates import NewTask, SearchSettings, _Search  # noqa: E402

TARGET = tvm.target.Target({"kind": "llvm", "num-cores": 2})


def matmul() -> Any:
    a = tvm.te.placeholder((64, 64), name="a")
    b = tvm.te.placeholder((64, 64), name="b")
    k = tvm.te.reduce_axis((0, 64), name="k")
    c = tvm.te.compute((64, 64), lambda i, j: tvm.te.sum(a[i, k] * b[k, j], axis=k), name="c")
    return tvm.IRModule({"main": tvm.te.create_prim_func([a, b, c])})


@pytest.fixture
def search() -> _Search:
    return _Search(TARGET, SearchSettings(population=8, generations=1, per_draft=4, seed=3), 0)


def test_drafts_are_new_apply_to_the_task_and_come_from_both_sources(search: _Search) -> None:
    module = matmul()
    name = task_hash(module)
    search.add(NewTask(name, module_to_json(module)))
    seen: set[str] = set()
    annotated = 0
    for draft in range(4):
        found = search.draft(name)
        assert found, f"draft {draft} is empty"
        for candidate in found:
            assert candidate.trace not in seen
            seen.add(candidate.trace)
            apply_trace(candidate.trace, module)
            annotated += "SamplePerfectTile" in candidate.trace
        search.learn([(name, candidate.number, 1e-3 / (1 + draft)) for candidate in found])
    assert 0 < annotated < len(seen), "register tiles sample nothing, TVM's schedules do"


def test_what_was_tried_is_not_drafted_again(search: _Search) -> None:
    module = matmul()
    name = task_hash(module)
    search.add(NewTask(name, module_to_json(module)))
    first = {candidate.trace for candidate in search.draft(name)}
    again = _Search(TARGET, SearchSettings(8, 1, 4, 3), 0)
    again.add(NewTask(name, module_to_json(module), tried=tuple(first)))
    assert not first & {candidate.trace for candidate in again.draft(name)}


def test_a_known_schedule_is_where_the_search_starts(search: _Search) -> None:
    module = matmul()
    name = task_hash(module)
    search.add(NewTask(name, module_to_json(module)))
    drafted = [*search.draft(name), *search.draft(name)]
    evolved = [c.trace for c in drafted if "SamplePerfectTile" in c.trace]
    again = _Search(TARGET, SearchSettings(8, 1, 4, 4), 0)
    again.add(NewTask(name, module_to_json(module), known=tuple((t, 1e-3) for t in evolved)))
    assert again._task(name)._learned == len(evolved) > 0


def test_statements_counts_what_unrolling_makes() -> None:
    module = matmul()
    plain = statements(module)
    schedule = tvm.s_tir.Schedule(module)
    block = schedule.get_sblock("c")
    i, j, k = schedule.get_loops(block)
    _, inner = schedule.split(j, [None, 16])
    schedule.vectorize(inner)
    assert statements(schedule.mod) == plain, "a vector is one statement"
    schedule.unroll(i)
    assert statements(schedule.mod) == 64 * plain
    schedule.unroll(k)
    assert statements(schedule.mod) > MAX_STATEMENTS


def test_the_space_turns_large_code_down() -> None:
    module = matmul()
    space = make_space(module, TARGET)
    limit = space.postprocs[-1]
    schedule = tvm.s_tir.Schedule(module)
    assert limit.apply(schedule)
    i, j, _ = schedule.get_loops(schedule.get_sblock("c"))
    schedule.unroll(i)
    schedule.unroll(j)
    assert not limit.apply(schedule)
