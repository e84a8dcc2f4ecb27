"""Names inside kernels: by order alone, so that models share records; stores of before are renamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
import tvm_ffi
from onnx import TensorProto, helper, numpy_helper
from tiny_library import target

from gpu_aware_tune.kernels.naming import canonical_names, fits_names, names_in, renamed_trace
from gpu_aware_tune.kernels.schedules import baseline_schedules
from gpu_aware_tune.kernels.traces import (
    apply_trace,
    module_from_json,
    module_to_json,
    task_hash,
    trace_to_json,
)
from gpu_aware_tune.model.importer import load_model
from gpu_aware_tune.model.tasks import Task, extract
from gpu_aware_tune.records.rows import UNFIT
from gpu_aware_tune.records.store import Record, RecordKey, Store
from gpu_aware_tune.records.tvm_database import adopt_task, args_json


def pooled(path: Path, depth: int) -> list[Task]:
    """Tasks of convolutions, as many as `depth`, and a pooling whose name in TVM depends on it."""
    rng = np.random.default_rng(1)
    nodes, weights, last = [], [], "x"
    for layer in range(depth):
        weight = rng.standard_normal((32, 32, 1, 1)).astype("float32")
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last = f"r{layer}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"]))
    shape = [1, 32, 12, 12]
    graph = helper.make_graph(
        nodes,
        "pooled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return extract(load_model(path, target()), target())


def pooling_of(tasks: list[Task]) -> Task:
    (found,) = (task for task in tasks if "mean" in task.name)
    return found


def test_models_that_share_a_kernel_share_its_names(tmp_path: Path) -> None:
    one, other = (pooling_of(pooled(tmp_path / f"{n}.onnx", n)) for n in (1, 3))
    assert one.hash == other.hash
    names = [names_in(module_to_json(task.module)) for task in (one, other)]
    assert names[0] == names[1]
    assert names[0].are_canonical
    trace = trace_to_json(baseline_schedules(one.module, target())[0].trace)
    assert tvm_ffi.structural_equal(
        apply_trace(trace, one.module).mod, apply_trace(trace, other.module).mod
    )


def foreign(task: Task, prefix: str) -> tvm.IRModule:
    """The task as a store of before holds it, named after some model's variables."""
    text = module_to_json(task.module)
    for kind, names in (("block", names_in(text).blocks), ("b", names_in(text).buffers)):
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(f'"{name}"', f'"{prefix}_{kind}_{name}"')
    return module_from_json(text)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return pooling_of(pooled(tmp_path / "m.onnx", 1))


def test_canonical_names_keep_structure_and_hash(task: Task) -> None:
    renamed = foreign(task, "lv4")
    assert not names_in(module_to_json(renamed)).are_canonical
    again = canonical_names(renamed)
    assert task_hash(renamed) == task_hash(again) == task.hash
    assert names_in(module_to_json(again)) == names_in(module_to_json(task.module))


def every_kind(module: tvm.IRModule) -> Any:
    """A schedule whose trace names a block, one made from a block, and one made from a buffer."""
    schedule = tvm.s_tir.Schedule(module)
    block = next(iter(names_in(module_to_json(module)).blocks))
    copy = schedule.cache_read(schedule.get_sblock(block), 0, "global")
    schedule.get_sblock(str(schedule.get(copy).name_hint))
    loops = schedule.get_loops(schedule.get_sblock(block))
    schedule.decompose_reduction(schedule.get_sblock(block), loops[0])
    schedule.get_sblock(f"{block}_init")
    schedule.get_sblock(f"{block}_update")
    return schedule.trace


def test_a_trace_of_other_names_is_renamed(task: Task) -> None:
    old = foreign(task, "lv4")
    names = names_in(module_to_json(old))
    trace = trace_to_json(every_kind(old))
    new = names_in(module_to_json(task.module))
    assert not fits_names(trace, new)
    renamed = renamed_trace(trace, names)
    assert fits_names(renamed, new)
    assert tvm_ffi.structural_equal(
        apply_trace(trace, old).mod, apply_trace(renamed, task.module).mod
    )


def test_a_store_of_before_keeps_working(task: Task, tmp_path: Path) -> None:
    old = foreign(task, "lv4")
    fitting = [trace_to_json(s.trace) for s in baseline_schedules(old, target())]
    strange = trace_to_json(baseline_schedules(foreign(task, "other"), target())[0].trace)
    key = RecordKey(task.hash, "llvm/x", 2, "llvm", "0")
    with Store(tmp_path / "db") as store:
        store.add_task(task.hash, "mean", module_to_json(old), args_json(old))
        store.add([Record(key, trace, 0.001 * (n + 2)) for n, trace in enumerate(fitting)])
        store.add([Record(key, strange, 0.001), Record(key, "", 0.5, origin="default")])
        assert adopt_task(store, task.module) == 1
        best = store.best(key, 9)
        assert [record.seconds for record in best] == [0.002, 0.003, 0.004, 0.5][-len(best) :]
        assert len(best) == len(fitting) + 1
        for record in best[:-1]:
            apply_trace(record.trace, task.module)
        (unfit,) = (record for record in store.all(key) if record.failure == UNFIT)
        assert unfit.seconds == 0.001, "what was measured stays"
        assert adopt_task(store, task.module) == 0, "done once"
