"""Records as TVM's databases: applied by its passes, exported to its files and back."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from click.testing import CliRunner
from tvm import relax

from benchmarks.draws import random_schedules
from gpu_aware_tune.cli.records import records as records_command
from gpu_aware_tune.errors import SetupError, TuneError, UserError
from gpu_aware_tune.kernels.traces import (
    TraceError,
    apply_trace,
    module_from_json,
    module_to_json,
    task_hash,
    trace_to_json,
)
from gpu_aware_tune.records import tvm_database
from gpu_aware_tune.records.store import Record, RecordKey, Store
from gpu_aware_tune.workers.warm import load_intrinsics

load_intrinsics("llvm")
ms = tvm.s_tir.meta_schedule

TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64", "num-cores": 2})
TEXT = "llvm -mcpu=x86-64"
DEVICE = "llvm/cpu/x86-64"


def fused() -> tvm.IRModule:
    """A model of two kernels: a matrix product with relu, and a softmax."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((16, 32), "float32"))
    w = relax.Var("w", relax.TensorType((32, 24), "float32"))
    with builder.function("main", [x, w]):
        with builder.dataflow():
            product = builder.emit(relax.op.nn.relu(builder.emit(relax.op.matmul(x, w))))
            result = builder.emit_output(builder.emit(relax.op.nn.softmax(product)))
        builder.emit_func_output(result)
    with TARGET:
        return relax.get_pipeline("zero")(builder.get())


@pytest.fixture(scope="module")
def model() -> tvm.IRModule:
    return fused()


@pytest.fixture(scope="module")
def modules(model: tvm.IRModule) -> dict[str, tvm.IRModule]:
    """The model's tasks by name, as TVM extracts them."""
    tasks = ms.relax_integration.extract_tasks(model, TARGET)
    return {task.task_name: task.dispatched[0] for task in tasks}


@pytest.fixture(scope="module")
def matmul(modules: dict[str, tvm.IRModule]) -> tvm.IRModule:
    return modules["fused_matmul_relu"]


@pytest.fixture(scope="module")
def candidates(matmul: tvm.IRModule) -> list[tvm.s_tir.Schedule]:
    """Schedules of the matrix product as TVM's search makes them, postprocessors included."""
    return random_schedules(matmul, TARGET, "post-order-apply", 6, seed=1)


@pytest.fixture(scope="module")
def traces(candidates: list[tvm.s_tir.Schedule]) -> list[str]:
    found = list(dict.fromkeys(trace_to_json(schedule.trace) for schedule in candidates))
    assert len(found) >= 4
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "db") as opened:
        yield opened


def key_of(module: tvm.IRModule, units: int = 2) -> RecordKey:
    return RecordKey(task_hash(module), DEVICE, units, TEXT, str(tvm.__version__))


def fill(store: Store, module: tvm.IRModule, traces: list[str], units: int = 2) -> None:
    """Put a trace a millisecond slower than the one before, a failure and a wrong kernel."""
    key = key_of(module, units)
    good = [Record(key, trace, 0.001 * (i + 1)) for i, trace in enumerate(traces[:-2])]
    store.add([*good, Record(key, traces[-2], failure="crash")])
    store.add([Record(key, traces[-1], 1e-9, wrong=True), Record(key, "", 0.5, origin="default")])
    store.add_task(key.task, "matmul", module_to_json(module), tvm_database.args_json(module))


def stock(folder: Path) -> Any:
    return ms.database.JSONDatabase(
        str(folder / "database_workload.json"), str(folder / "database_tuning_record.json"),
        allow_missing=False,
    )  # fmt: skip


def seconds(record: Any) -> list[float]:
    return [value.value for value in record.run_secs]


# -- the kernels chosen -----------------------------------------------------------------------


def test_relax_finds_the_chosen_kernel_and_no_other(
    model: tvm.IRModule, matmul: tvm.IRModule, candidates: list[tvm.s_tir.Schedule]
) -> None:
    chosen = trace_to_json(candidates[0].trace)
    name = task_hash(matmul)
    kernels = tvm_database.memory_database({name: matmul}, {name: chosen}, TARGET)
    with TARGET, kernels:
        applied = relax.transform.MetaScheduleApplyDatabase()(model)
    scheduled = {
        var.name_hint: bool(function.attrs and "tirx.is_scheduled" in function.attrs)
        for var, function in applied.functions.items()
        if var.name_hint != "main"
    }
    assert scheduled == {"fused_matmul_relu": True, "softmax": False}
    body = applied["fused_matmul_relu"].body
    assert tvm_ffi.structural_equal(body, candidates[0].mod["main"].body, map_free_vars=True)
    x, w = (np.random.default_rng(0).random(s, np.float32) for s in ((16, 32), (32, 24)))
    run = relax.VirtualMachine(tvm.compile(applied, TARGET), tvm.cpu())["main"]
    product = np.maximum(x @ w, 0)
    expected = np.exp(product) / np.exp(product).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        run(tvm.runtime.tensor(x), tvm.runtime.tensor(w)).numpy(), expected, 1e-4
    )


def test_one_record_a_task_and_none_for_plain_loops(
    modules: dict[str, tvm.IRModule], traces: list[str]
) -> None:
    by_hash = {task_hash(module): module for module in modules.values()}
    matmul = task_hash(modules["fused_matmul_relu"])
    chosen = {matmul: traces[0], task_hash(modules["softmax"]): ""}
    kernels = tvm_database.memory_database(by_hash, chosen, TARGET)
    (record,) = kernels.get_all_tuning_records()
    assert trace_to_json(record.trace) == traces[0]
    found = kernels.query_schedule(by_hash[matmul], TARGET, "main")
    assert tvm_ffi.structural_equal(found.mod, apply_trace(traces[0], by_hash[matmul]).mod)


def test_a_trace_of_another_task_is_named(
    modules: dict[str, tvm.IRModule], traces: list[str]
) -> None:
    softmax = modules["softmax"]
    name = task_hash(softmax)
    with pytest.raises(TraceError, match=f"task {name}: .*block"):
        tvm_database.memory_database({name: softmax}, {name: traces[0]}, TARGET)
    with pytest.raises(TraceError, match="its module has the hash"):
        tvm_database.memory_database({"77": softmax}, {"77": traces[0]}, TARGET)


def test_two_modules_with_one_hash_are_told_apart(
    store: Store, modules: dict[str, tvm.IRModule]
) -> None:
    matmul, softmax = modules["fused_matmul_relu"], modules["softmax"]
    assert tvm_database.is_same_task(store, matmul), "a task that is new to the store"
    store.add_task(task_hash(matmul), "matmul", module_to_json(matmul))
    store.add_task(task_hash(softmax), "clash", module_to_json(matmul))
    assert tvm_database.is_same_task(store, module_from_json(module_to_json(matmul)))
    assert not tvm_database.is_same_task(store, softmax)


def test_target_text_leaves_out_what_the_units_say() -> None:
    assert tvm_database.target_text(TARGET) == TEXT
    assert tvm_database.target_text(tvm.target.Target({"kind": "llvm", "num-cores": 64})) == "llvm"
    gpu = tvm.target.Target("nvidia/nvidia-h100", host={"kind": "llvm", "mcpu": "znver5"})
    assert tvm_database.target_text(gpu) == "cuda -arch=sm_90a"
    several = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64", "mattr": ["+avx2", "+fma"]})
    assert tvm_database.target_text(several) == "llvm -mcpu=x86-64 -mattr=+avx2,+fma"


# -- TVM's files ------------------------------------------------------------------------------


def test_stock_tvm_reads_what_was_exported(
    store: Store, matmul: tvm.IRModule, traces: list[str], tmp_path: Path
) -> None:
    fill(store, matmul, traces)
    store.set_retimed(key_of(matmul), traces[0], 0.0025)
    moved = tvm_database.export_tvm(store, tmp_path / "out")
    assert (moved.tasks, moved.records, moved.skipped) == (1, len(traces) - 2, 0)
    loaded = stock(tmp_path / "out")
    assert len(loaded) == len(traces) - 2
    best = loaded.get_top_k(loaded.commit_workload(matmul), 2)
    assert [seconds(record) for record in best] == [[0.002], [0.0025]]
    assert [trace_to_json(record.trace) for record in best] == [traces[1], traces[0]]
    assert tvm_ffi.structural_equal(best[0].workload.mod, matmul)
    assert best[0].target.export() == TARGET.export()
    assert [list(arg.shape) for arg in best[0].args_info] == [[16, 32], [32, 24], [16, 24]]
    best[0].as_measure_candidate()


def test_round_trip_through_tvm_files(
    store: Store, matmul: tvm.IRModule, traces: list[str], tmp_path: Path
) -> None:
    fill(store, matmul, traces)
    tvm_database.export_tvm(store, tmp_path / "out")
    with Store(tmp_path / "second") as second:
        moved = tvm_database.import_tvm(second, tmp_path / "out", DEVICE, 2)
        assert (moved.tasks, moved.records, moved.failures) == (1, len(traces) - 2, 0)
        key = key_of(matmul)
        before = [(r.trace, r.best_s) for r in store.best(key, 99) if r.trace]
        assert [(r.trace, r.best_s) for r in second.best(key, 99)] == before
        assert {record.flags for record in second.all(key)} == {"imported"}
        task = second.task(key.task)
        assert task is not None
        assert tvm_ffi.structural_equal(module_from_json(task.module), matmul)
        assert "matmul" in task.name
        again = tvm_database.import_tvm(second, tmp_path / "out", DEVICE, 2)
        assert again == moved
        assert second.known(key) == len(traces) - 2
        tvm_database.export_tvm(second, tmp_path / "again")
    for name in ("database_workload.json", "database_tuning_record.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_records_that_tvm_wrote_are_the_same_to_us(
    store: Store,
    matmul: tvm.IRModule,
    candidates: list[tvm.s_tir.Schedule],
    traces: list[str],
    tmp_path: Path,
) -> None:
    theirs = ms.database.JSONDatabase(work_dir=str(tmp_path))
    workload = theirs.commit_workload(matmul)
    args = ms.arg_info.ArgInfo.from_entry_func(matmul, remove_preproc=False)
    times: list[list[float] | None] = [[0.25, 0.75], [1e10], None, [0.125]]
    for schedule, run_secs in zip(candidates, times, strict=False):
        record = ms.database.TuningRecord(schedule.trace, workload, run_secs, TARGET, args)
        theirs.commit_tuning_record(record)
    moved = tvm_database.import_tvm(store, tmp_path, DEVICE, 1)
    assert (moved.records, moved.failures) == (2, 2)
    found = {record.trace: record for record in store.all(key_of(matmul, units=1))}
    expected = [trace_to_json(schedule.trace) for schedule in candidates[:4]]
    assert list(found) == expected
    assert [found[trace].seconds for trace in expected] == [0.5, None, None, 0.125]
    assert [found[trace].failure for trace in expected] == [None, "lost", "lost", None]
    assert found[expected[0]].repeats == 2


def test_only_one_device_and_units_at_a_time(
    store: Store, matmul: tvm.IRModule, traces: list[str], tmp_path: Path
) -> None:
    fill(store, matmul, traces, units=2)
    fill(store, matmul, traces[:3], units=1)
    with pytest.raises(UserError, match=r"2 kinds .*with 1 units.*with 2 units.*--units"):
        tvm_database.export_tvm(store, tmp_path / "out")
    with pytest.raises(UserError, match=f"no records match; the store has: {DEVICE} with 1 units"):
        tvm_database.export_tvm(store, tmp_path / "out", units=7)
    assert not (tmp_path / "out").exists()
    assert tvm_database.export_tvm(store, tmp_path / "out", units=1).records == 1
    (line,) = (tmp_path / "out" / "database_tuning_record.json").read_text().splitlines()
    assert json.loads(line)[1][2]["num-cores"] == 1
    with pytest.raises(UserError, match="exists; choose another folder or pass --force"):
        tvm_database.export_tvm(store, tmp_path / "out", units=2)
    full = tvm_database.export_tvm(store, tmp_path / "out", units=2, overwrite=True)
    assert full.records == len(traces) - 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "database_tuning_record.json",
        "database_workload.json",
    ]


def test_tasks_without_a_module_are_counted(
    store: Store, traces: list[str], tmp_path: Path
) -> None:
    store.add([Record(RecordKey("5", DEVICE, 2, TEXT, "0.27"), traces[0], 0.1)])
    assert tvm_database.export_tvm(store, tmp_path).skipped == 1


def test_a_folder_that_cannot_be_made(
    store: Store, matmul: tvm.IRModule, traces: list[str], tmp_path: Path
) -> None:
    fill(store, matmul, traces)
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"cannot write to .*; choose another folder"):
        tvm_database.export_tvm(store, tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "line", "text"),
    [
        ("database_workload.json", "{", "database_workload.json:2: no JSON"),
        ("database_workload.json", '["1","AAAA"]', "database_workload.json:2: no workload of TVM"),
        ("database_workload.json", "7", "database_workload.json:2: no workload of TVM"),
        ("database_tuning_record.json", "[", "database_tuning_record.json:4: no JSON"),
        ("database_tuning_record.json", "[9,[[[],[]],[1],{},[]]]", "no tuning record of TVM"),
        ("database_tuning_record.json", "[-1,[[[],[]],[1],{},[]]]", "no tuning record of TVM"),
        ("database_tuning_record.json", "[0,3]", "no tuning record of TVM"),
        ("database_tuning_record.json", None, "cannot read"),
        ("database_workload.json", None, "cannot read"),
    ],
)
def test_files_that_are_none_of_tvms(
    store: Store,
    matmul: tvm.IRModule,
    traces: list[str],
    tmp_path: Path,
    name: str,
    line: str | None,
    text: str,
) -> None:
    fill(store, matmul, traces[:5])
    tvm_database.export_tvm(store, tmp_path / "out")
    path = tmp_path / "out" / name
    if line is None:
        path.unlink()
    else:
        path.write_text(path.read_text() + line + "\n")
    with Store(tmp_path / "second") as second:
        with pytest.raises(UserError) as error:
            tvm_database.import_tvm(second, tmp_path / "out", DEVICE, 2)
        assert text in str(error.value)
        assert "\n" not in str(error.value)
        assert second.counts() == []
        assert second.task(task_hash(matmul)) is None


def test_lines_that_cannot_be_used_are_counted(
    store: Store, matmul: tvm.IRModule, traces: list[str], tmp_path: Path
) -> None:
    fill(store, matmul, traces)
    tvm_database.export_tvm(store, tmp_path)
    path = tmp_path / "database_tuning_record.json"
    index, (trace, run_secs, target, args) = json.loads(path.read_text().splitlines()[0])
    bad = [
        [index, [[trace[0], [[len(trace[0]), 1]]], run_secs, target, args]],
        [index, [trace, run_secs, {"kind": "abacus"}, args]],
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in bad))
    with Store(tmp_path / "second") as second:
        moved = tvm_database.import_tvm(second, tmp_path, DEVICE, 2)
        assert (moved.records, moved.skipped) == (0, 2)


def test_records_of_another_kind_of_device(
    store: Store, matmul: tvm.IRModule, traces: list[str], tmp_path: Path
) -> None:
    fill(store, matmul, traces)
    tvm_database.export_tvm(store, tmp_path)
    with Store(tmp_path / "second") as second:
        with pytest.raises(UserError, match="measured on llvm, but the device is cuda/H200"):
            tvm_database.import_tvm(second, tmp_path, "cuda/H200/sm_90a", 32)
        assert second.counts() == []


def test_the_version_that_wrote_the_files_is_part_of_the_key(
    store: Store, matmul: tvm.IRModule, traces: list[str], tmp_path: Path
) -> None:
    fill(store, matmul, traces[:3])
    tvm_database.export_tvm(store, tmp_path, tvm_version=str(tvm.__version__))
    path = tmp_path / "database_workload.json"
    name, module = json.loads(path.read_text())
    now = str(tvm.__version__).encode()
    old = now[:-1] + b"x"  # of the same length, which TVM's base64 text begins with
    module = base64.b64encode(base64.b64decode(module).replace(now, old)).decode()
    path.write_text(json.dumps([name, module]) + "\n")
    with Store(tmp_path / "second") as second:
        tvm_database.import_tvm(second, tmp_path, DEVICE, 2)
        assert second.known(replace(key_of(matmul), tvm=old.decode())) == 1
        assert second.known(key_of(matmul)) == 0
        tvm_database.import_tvm(second, tmp_path, DEVICE, 2, tvm_version="9")
        assert second.known(replace(key_of(matmul), tvm="9")) == 1


# -- on the command line ----------------------------------------------------------------------


def run(*args: str | Path) -> str:
    result = CliRunner().invoke(records_command, [str(arg) for arg in args])
    if isinstance(result.exception, TuneError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_export_and_import_commands(
    store: Store, matmul: tvm.IRModule, traces: list[str], tmp_path: Path
) -> None:
    fill(store, matmul, traces)
    store.close()
    out, second = tmp_path / "out", tmp_path / "second"
    count = len(traces) - 2
    assert run("export", out, "--db", tmp_path / "db") == f"{count} records of 1 tasks -> {out}\n"
    with pytest.raises(UserError, match="--force"):
        run("export", out, "--db", tmp_path / "db", "--units", "2")
    run("export", out, "--db", tmp_path / "db", "--device", DEVICE, "--force")
    text = run("import", out, "--device", "llvm/other", "--units", "3", "--db", second)
    assert text == (
        f"{count} records and 0 failures of 1 tasks, taken as measured on llvm/other"
        f" with 3 units -> {second}\n"
    )
    with Store(second, readonly=True) as reader:
        (counts,) = reader.counts()
        assert (counts.key.device, counts.key.units, counts.trials) == ("llvm/other", 3, count)
    with pytest.raises(UserError, match="give --units too"):
        run("import", out, "--device", "llvm/other", "--db", second)


def test_import_takes_this_machine_by_default(
    store: Store, matmul: tvm.IRModule, traces: list[str], tmp_path: Path
) -> None:
    from gpu_aware_tune.partition import find_device

    here, _note = find_device("llvm", 0, None)
    fill(store, matmul, traces)
    tvm_database.export_tvm(store, tmp_path / "out")
    run("import", tmp_path / "out", "--db", tmp_path / "second", "--target", "llvm")
    with Store(tmp_path / "second", readonly=True) as reader:
        (counts,) = reader.counts()
        assert (counts.key.device, counts.key.units) == (here.key, here.units_total)
