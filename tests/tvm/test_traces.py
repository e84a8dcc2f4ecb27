"""Traces and modules as text: nothing is lost on the way, and one trace has one text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
import tvm
import tvm_ffi
from tvm import te
from tvm.s_tir import Schedule

from gpu_aware_tune.kernels.traces import (
    TraceError,
    apply_trace,
    canonical_trace,
    module_from_json,
    module_to_json,
    task_hash,
    trace_to_json,
)


def product_of(length: int) -> tvm.IRModule:
    a = te.placeholder((64, length), name="a")
    k = te.reduce_axis((0, length), name="k")
    product = te.compute((64, 64), lambda i, j: te.sum(a[i, k] * a[j, k], k), name="product")
    result = te.compute((64, 64), lambda i, j: te.max(product[i, j], 0.0), name="result")
    function = te.create_prim_func([a, result]).with_attr("global_symbol", "main")
    return tvm.IRModule({"main": function})


@pytest.fixture(scope="module")
def module() -> tvm.IRModule:
    return product_of(48)


def tiled(schedule: Schedule) -> None:
    block = schedule.get_sblock("product")
    i, j, k = schedule.get_loops(block)
    tile = schedule.sample_perfect_tile(i, n=2, max_innermost_factor=16, decision=[8, 8])
    outer, inner = schedule.split(i, factors=tile)
    schedule.reorder(outer, j, k, inner)
    step = schedule.sample_categorical(candidates=[0, 16], probs=[0.1, 0.9], decision=1)
    schedule.parallel(outer)
    schedule.annotate(inner, "pragma_auto_unroll_max_step", step)
    schedule.compute_at(block, schedule.sample_compute_location(block, decision=-1))


def annotated(value: object) -> Callable[[Schedule], None]:
    def act(schedule: Schedule) -> None:
        schedule.annotate(schedule.get_sblock("product"), "note", value)

    return act


def transposed(schedule: Schedule) -> None:
    schedule.transform_layout("product", ("write", 0), lambda i, j: (j // 8, i, j % 8))


def postprocessed(schedule: Schedule) -> None:
    tiled(schedule)
    schedule.enter_postproc()
    schedule.decompose_reduction("product", schedule.get_loops("product")[1])


SCHEDULES: dict[str, Callable[[Schedule], None]] = {
    "nothing": lambda schedule: None,
    "tiled": tiled,
    "transposed": transposed,
    "postprocessed": postprocessed,
    "int": annotated(3),
    "float": annotated(1.0),
    "bool": annotated(True),
    "text": annotated('a "b"'),
    "list": annotated([1, 0]),
    "map": annotated({"x": 1, "y": [2.5]}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_rebuilt_from_text(module: tvm.IRModule, name: str) -> None:
    schedule = Schedule(module)
    SCHEDULES[name](schedule)
    text = trace_to_json(schedule.trace)
    rebuilt = apply_trace(text, module)
    assert tvm_ffi.structural_equal(rebuilt.mod, schedule.mod)
    assert trace_to_json(rebuilt.trace) == text
    assert canonical_trace(json.loads(text)) == text


def test_a_module_is_not_changed_by_its_schedules(module: tvm.IRModule) -> None:
    before = task_hash(module)
    schedule = Schedule(module)
    tiled(schedule)
    apply_trace(trace_to_json(schedule.trace), module)
    assert task_hash(module) == before


def test_one_trace_has_one_text() -> None:
    sample = '["SampleCategorical",[],[[0,16],[1.0,0.5]],["v0"]]'
    ours = f'[[{sample},["Split",["l0"],[1,0],["l1"]]],[[0,1]]]'
    theirs = ours.replace("1.0,", "1,").replace("[1,0]", "[true, false]")
    assert canonical_trace(json.loads(theirs)) == canonical_trace(json.loads(ours)) == ours


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSON|Expecting"),
        ("[]", "two arrays"),
        ('{"a":1}', "two arrays"),
        ('[[["GetSBlock",[],["conv","main"],["b0"]]],[]]', "block"),
        ('[[["Nope",[],[],[]]],[]]', "Nope"),
        ('[[["GetLoops",["b7"],[],["l0"]]],[]]', "b7"),
    ],
)
def test_a_trace_that_does_not_fit(module: tvm.IRModule, text: str, reason: str) -> None:
    with pytest.raises(TraceError, match=reason) as error:
        apply_trace(text, module)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "value",
    [7, "[[],[]]", [], [[], []][:1], [[["A"]], []], [[["A", [], [], []]], [[1, 0]]],
     [[["A", [], [], []]], [[-1, 0]]], [[["A", {}, [], []]], []], [[], [["0", 1]]],
     [[["A", [], {"x": 1}, []]], []], [[["SampleCategorical", [], [], []]], []]],
)  # fmt: skip
def test_what_is_no_trace_is_refused(value: object) -> None:
    # TVM writes outside its memory when the index of a decision is out of range.
    with pytest.raises(TraceError, match="not a trace"):
        canonical_trace(value)


def test_modules_and_their_names(module: tvm.IRModule) -> None:
    again = module_from_json(module_to_json(module))
    assert tvm_ffi.structural_equal(again, module)
    assert task_hash(again) == task_hash(module)
    for length in range(1, 9):  # some hashes are above 2**63
        named = product_of(length)
        workload = tvm.s_tir.meta_schedule.database.Workload(named).as_json()
        assert task_hash(named) == workload[0]


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "{}", tvm.ir.save_json(tvm.tirx.IntImm("int32", 3))]
)
def test_text_that_holds_no_module(text: str) -> None:
    with pytest.raises(TraceError, match="module"):
        module_from_json(text)


def test_text_costs_little_beside_the_replay(module: tvm.IRModule) -> None:
    schedule = Schedule(module)
    postprocessed(schedule)
    text = trace_to_json(schedule.trace)

    def fastest_s(act: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            act()
            times.append(time.perf_counter() - start)
        return min(times)

    def replay() -> None:
        schedule.trace.apply_to_schedule(Schedule(module), remove_postproc=False)

    assert fastest_s(lambda: trace_to_json(schedule.trace)) < 0.002
    assert fastest_s(lambda: apply_trace(text, module)) < fastest_s(replay) + 0.002
