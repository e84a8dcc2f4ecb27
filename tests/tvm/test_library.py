"""Compiling, verifying, exporting, loading and running a library."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tvm
import tvm_ffi
from manifests import change, write_json
from tiny_library import compared, default_traces, target, target_json, write_library, write_onnx

from gpu_aware_tune.codegen.compile import (
    compile_model,
    compile_shares,
    is_scheduled,
    merge_shares,
    schedule_module,
)
from gpu_aware_tune.errors import SetupError, TuneError, UserError
from gpu_aware_tune.finalize import kernel_check
from gpu_aware_tune.finalize.kernel_check import difference, kernel_inputs, verify_kernel
from gpu_aware_tune.kernels.packing import PACKING
from gpu_aware_tune.kernels.traces import TraceError, apply_trace, trace_to_json
from gpu_aware_tune.library import (
    Library,
    Program,
    RunFacts,
    export,
    link,
    load,
    open_vm,
    save_weights,
)
from gpu_aware_tune.library import folder as folder_module
from gpu_aware_tune.library import loaded as loaded_module
from gpu_aware_tune.library.checks import nearest
from gpu_aware_tune.library.folder import _exchange
from gpu_aware_tune.library.threads import CoreThread
from gpu_aware_tune.model.importer import Model, load_model, random_inputs
from gpu_aware_tune.model.tasks import extract
from gpu_aware_tune.partition.thread_pool import thread_pools
from gpu_aware_tune.partition.topology import usable_cores

FACTS = RunFacts(device="llvm/test/cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    return write_library(tmp_path_factory.mktemp("library"))


@pytest.fixture
def copy(tiny: tuple[Model, Path], tmp_path: Path) -> Path:
    """A folder that the test may damage."""
    return Path(shutil.copytree(tiny[1], tmp_path / "copy.tuned"))


def reference(model: Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.source, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in model.outputs]
    return dict(zip(names, session.run(names, inputs), strict=True))


# -- compile ---------------------------------------------------------------------------------------


def test_the_chosen_schedules_are_the_ones_in_the_library(tiny: tuple[Model, Path]) -> None:
    model, _ = tiny
    traces = default_traces(model)
    scheduled = schedule_module(model.module, target(), traces)
    wanted = {
        tvm_ffi.structural_hash(apply_trace(traces[task.hash], task.module).mod["main"].body)
        for task in extract(model, target())
        if task.hash in traces
    }
    found = {
        tvm_ffi.structural_hash(function.body)
        for function in scheduled.functions.values()
        if is_scheduled(function)
    }
    assert found
    assert found <= wanted
    plain = schedule_module(model.module, target(), {})
    assert not any(is_scheduled(function) for function in plain.functions.values())


def test_scheduled_kernels_run_and_make_the_model_fast(tmp_path: Path) -> None:
    """The proof that later passes keep the schedules: plain loops take 10 times as long."""
    model = load_model(write_onnx(tmp_path / "wide.onnx", width=112, channels=64), target())
    weights = tmp_path / "weights.bin"
    save_weights(model.weights, weights)
    inputs = random_inputs(model.inputs, 0)
    best_s = {}
    for name, traces in (("plain", {}), ("scheduled", default_traces(model))):
        compile_model(model, target(), traces).export_library(str(tmp_path / f"{name}.so"))
        timer = open_vm(tmp_path / f"{name}.so", weights).timer(inputs)
        best_s[name] = min(timer(0.3))
    assert best_s["plain"] / best_s["scheduled"] > 3


def test_a_trace_of_another_kernel_is_refused(tiny: tuple[Model, Path]) -> None:
    model, _ = tiny
    traces = default_traces(model)
    first, second = sorted(traces, key=lambda name: -len(traces[name]))[:2]
    with pytest.raises(TraceError, match=second):
        compile_model(model, target(), {second: traces[first]})


def test_shares_compiled_together_hold_equal_kernels_once(
    tiny: tuple[Model, Path], tmp_path: Path
) -> None:
    model, folder = tiny
    traces = default_traces(model)
    first = dict(list(traces.items())[:1])
    shares = {1: (target(1), {}), 2: (target(2), traces), 3: (target(3), first)}
    apart = {units: schedule_module(model.module, *share) for units, share in shares.items()}
    merged = merge_shares(apart)
    kernels = [f for f in merged.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
    hashes = {tvm_ffi.structural_hash(kernel) for kernel in kernels}
    assert len(kernels) == len(hashes)
    every = {
        tvm_ffi.structural_hash(function)
        for module in apart.values()
        for function in module.functions.values()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    count = sum(isinstance(f, tvm.tirx.PrimFunc) for f in apart[1].functions.values())
    assert hashes == every
    assert len(kernels) == count + len(traces) < 3 * count  # plain ones once, scheduled ones once
    names = {variable.name_hint for variable in merged.functions}
    assert {"main_1", "main_2", "main_3"} <= names
    assert "main" not in names

    link(compile_shares(model.module, shares), tmp_path / "shares.so")
    paths = dict.fromkeys(shares, tmp_path / "shares.so")
    made = export(tmp_path / "tiny.tuned", model, paths, FACTS, entry="main_{units}")
    assert [path.name for path in made.glob("lib*")] == ["lib-1-2-3.so"]
    inputs = random_inputs(model.inputs, 5)
    together = load(made, preload=True)
    for units in (1, 2):
        wanted = load(folder, units)(inputs)
        for loaded in (load(made, units), together.use(units)):
            assert loaded.units == units
            for name, array in loaded(inputs).items():
                np.testing.assert_array_equal(array, wanted[name])
    program = together.use(2)._lane.program
    assert program is not together.use(1)._lane.program


def test_a_kernel_with_the_name_of_a_share_is_told(tiny: tuple[Model, Path]) -> None:
    from tvm import relax

    kernels = relax.BlockBuilder()
    function = next(
        f for f in tiny[0].module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)
    )
    kernels.add_func(function, "main_2")
    with pytest.raises(TuneError, match="kernel named main_2"):
        merge_shares({1: kernels.get(), 2: tiny[0].module})


# -- verify ----------------------------------------------------------------------------------------


def test_a_kernel_that_loses_precision_is_found_wrong(tiny: tuple[Model, Path]) -> None:
    model, _ = tiny
    task = max(extract(model, target()), key=lambda task: task.flops)
    schedule = tvm.s_tir.Schedule(task.module)
    block = schedule.get_sblock("block1")
    good = verify_kernel(task.module, trace_to_json(schedule.trace), target(), seed=0)
    assert good.ok
    cache = schedule.cache_read(block, 0, "global")
    schedule.unsafe_set_dtype(cache, 0, "float16")
    wrong = verify_kernel(task.module, trace_to_json(schedule.trace), target(), seed=0)
    assert not wrong.ok
    assert wrong.max_error > wrong.allowed


def test_a_float16_kernel_may_differ_by_rounding_but_not_by_a_term() -> None:
    from test_schedules import kernels
    from tvm.relax import op

    half = [((32, 64), "float16"), ((64, 48), "float16")]
    (module,) = kernels(lambda _, a, b: op.matmul(a, b), *half)
    schedule = tvm.s_tir.Schedule(module)
    block = schedule.get_sblock("matmul")
    outer, _ = schedule.split(schedule.get_loops(block)[-1], [None, 4])
    schedule.rfactor(outer, 0)
    reordered = verify_kernel(module, trace_to_json(schedule.trace), target(), seed=0)
    assert reordered.ok
    assert 0 < reordered.max_error < reordered.allowed / 4, "room, for tensor cores round otherwise"

    a, b, c = kernel_inputs(module, 0)
    wanted = kernel_check._run(module, target(), tvm.cpu(), [a, b, c])[2]
    missing = wanted - np.outer(a[:, 0], b[0])
    assert difference(missing, wanted) > reordered.allowed, "one term of 64 is left out"

    truncated = tvm.s_tir.Schedule(module)
    cache = truncated.cache_read(truncated.get_sblock("matmul"), 0, "global")
    truncated.unsafe_set_dtype(cache, 0, "int8")
    wrong = verify_kernel(module, trace_to_json(truncated.trace), target(), seed=0)
    assert not wrong.ok
    assert wrong.max_error > wrong.allowed == reordered.allowed


def test_difference_sees_shapes_nan_and_single_wrong_elements() -> None:
    wanted = np.array([1.0, -4.0, 2.0], "float32")
    assert difference(wanted, wanted) == 0
    assert difference(wanted + np.array([0, 0, 0.04], "float32"), wanted) == pytest.approx(
        0.01, 1e-3
    )
    assert difference(wanted[:2], wanted) == np.inf
    assert difference(np.array([1, np.nan, 2], "float32"), wanted) == np.inf
    assert difference(wanted, np.array([1, np.nan, 2], "float32")) == np.inf
    holes = np.array([np.nan, np.inf, 2], "float32")
    assert difference(holes.copy(), holes) == 0
    assert difference(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])) == 0.25
    assert difference(np.zeros(2), np.zeros(2)) == 0


def test_indices_stay_inside_what_they_index() -> None:
    from test_schedules import f32, kernels
    from tvm.relax import op

    def gather(e: object, x: object, i: object) -> object:
        return op.take(x, i, axis=0)

    (two,) = kernels(gather, f32(2, 8), ((1, 64), "int64"))
    assert set(np.unique(kernel_inputs(two, 0)[1])) == {0, 1}
    (one,) = kernels(gather, f32(1, 8), ((1, 64), "int64"))
    assert set(np.unique(kernel_inputs(one, 0)[1])) == {0}


def test_a_library_is_compared_with_onnxruntime(tiny: tuple[Model, Path]) -> None:
    model, folder = tiny
    loaded = load(folder)
    for subject in (loaded, folder / "lib-2.so"):
        report = compared(model, subject, seed=3)
        assert report.ok and report.max_error < 1e-5
        assert len(report.draws) == 7

    def broken(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = loaded(inputs)
        outputs["scores"][0, 3] *= 1.01
        return outputs

    report = compared(model, broken, seed=3)
    assert not report.ok
    assert report.max_error > next(o.allowed for o in report.outputs if o.name == "scores")


# -- export ----------------------------------------------------------------------------------------


def test_the_folder_holds_libraries_weights_once_and_a_manifest(tiny: tuple[Model, Path]) -> None:
    model, folder = tiny
    assert {p.name for p in folder.iterdir()} == {
        "lib-1.so", "lib-2.so", "threads.so", "weights.bin", "manifest.json",
    }  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"] == {"name": "tiny", "hash": model.hash}
    assert [entry["units"] for entry in manifest["libraries"]] == [1, 2]
    assert manifest["inputs"][0] == {"name": "image", "shape": [1, 3, 12, 12], "dtype": "float32"}
    assert [spec["name"] for spec in manifest["outputs"]] == ["scores", "features"]
    assert manifest["versions"]["tvm"] == tvm.__version__
    assert manifest["device"] == "llvm/test/cpu"


def test_equal_libraries_are_one_file(tmp_path: Path) -> None:
    model, folder = write_library(tmp_path, alike=True)
    names = {path.name for path in folder.iterdir()}
    assert names == {"lib-1-2.so", "threads.so", "weights.bin", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["units"] for entry in manifest["libraries"]] == [1, 2]
    assert {entry["file"] for entry in manifest["libraries"]} == {"lib-1-2.so"}
    inputs = random_inputs(model.inputs, 5)
    one, two = load(folder, units=1), load(folder, units=2)
    assert (one.units, two.units) == (1, 2)
    np.testing.assert_array_equal(one(inputs)["scores"], two(inputs)["scores"])
    assert one.use(2).units == 2
    np.testing.assert_array_equal(one(inputs)["scores"], two(inputs)["scores"])


def test_libraries_hold_no_symbols_for_debuggers(tiny: tuple[Model, Path]) -> None:
    for units in (1, 2):
        content = (tiny[1] / f"lib-{units}.so").read_bytes()
        assert b".text" in content
        assert b".debug_info" not in content


def test_export_replaces_an_older_folder_and_nothing_else(
    tiny: tuple[Model, Path], copy: Path
) -> None:
    model, folder = tiny
    export(copy, model, {3: folder / "lib-2.so"}, FACTS)
    names = sorted(path.name for path in copy.iterdir())
    assert names == ["lib-3.so", "manifest.json", "threads.so", "weights.bin"]
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]

    foreign = copy.parent / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no tuned model"):
        export(foreign, model, {2: folder / "lib-2.so"}, FACTS)
    assert (foreign / "thesis.tex").read_text() == "years of work"


def test_folders_are_swapped_in_one_step(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    assert _exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "name").read_text() == "new"
    assert (tmp_path / "new" / "name").read_text() == "old"
    assert not _exchange(tmp_path / "new", tmp_path / "missing")


def test_a_reader_never_misses_the_folder(tiny: tuple[Model, Path], copy: Path) -> None:
    model, folder = tiny
    looks: list[bool] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            looks.append((copy / "manifest.json").exists())

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(5):
        export(copy, model, {2: folder / "lib-2.so"}, FACTS)
    done.set()
    reader.join()
    assert len(looks) > 5
    assert all(looks)


def test_where_folders_cannot_be_swapped_two_renames_do(
    tiny: tuple[Model, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny
    monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)
    export(copy, model, {4: folder / "lib-2.so"}, FACTS)
    assert (copy / "lib-4.so").is_file()
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def test_a_full_disk_leaves_the_old_folder_and_no_remains(
    tiny: tuple[Model, Path], copy: Path
) -> None:
    model, folder = tiny
    before = (copy / "manifest.json").read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow beyond
    try:
        with pytest.raises(SetupError, match="cannot write"):
            export(copy, model, {2: folder / "lib-2.so"}, FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (copy / "manifest.json").read_text() == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]
    load(copy)


def test_an_unwritable_place_is_a_set_up_error(tiny: tuple[Model, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot write"):
        export(tmp_path / "file" / "x.tuned", tiny[0], {2: tiny[1] / "lib-2.so"}, FACTS)


def test_remains_of_a_killed_export_are_removed(tiny: tuple[Model, Path], copy: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    remains = copy.with_name(f".{copy.name}.{dead.pid}.partial")
    remains.mkdir()
    alive = copy.with_name(f".{copy.name}.{os.getppid()}.partial")
    alive.mkdir()
    export(copy, tiny[0], {2: tiny[1] / "lib-2.so"}, FACTS)
    assert not remains.exists()
    assert alive.exists()


# -- load and run ----------------------------------------------------------------------------------


def test_a_loaded_library_gives_the_models_numbers(tiny: tuple[Model, Path]) -> None:
    model, folder = tiny
    assert len(model.weights) == 2  # large enough to be in the weights file, not in the code
    loaded = load(folder)
    inputs = random_inputs(model.inputs, 5)
    outputs = loaded(inputs)
    assert list(outputs) == ["scores", "features"]
    for name, wanted in reference(model, inputs).items():
        np.testing.assert_allclose(outputs[name], wanted, rtol=1e-4, atol=1e-5)
    again = loaded(random_inputs(model.inputs, 6))
    assert not np.array_equal(again["scores"], outputs["scores"])  # weights and inputs not mixed up


def test_arrays_need_not_be_contiguous(tiny: tuple[Model, Path]) -> None:
    model, folder = tiny
    inputs = random_inputs(model.inputs, 5)
    strided = {**inputs, "image": np.asfortranarray(inputs["image"])}
    loaded = load(folder)
    np.testing.assert_array_equal(loaded(strided)["scores"], loaded(inputs)["scores"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "input 'bias' is missing: the inputs are image, bias"),
        ({"extra": np.zeros(1)}, "unknown input 'extra'"),
        ({"bias": np.zeros((1, 21), "float32")}, "'bias' has shape 1x21: it must be 1x20"),
        ({"bias": np.zeros(20, "float32")}, "'bias' has shape 20: it must be 1x20"),
        ({"bias": np.zeros((1, 20))}, "'bias' has type float64: it must be float32"),
    ],
)
def test_wrong_inputs_give_one_clear_line(
    tiny: tuple[Model, Path], change: dict[str, np.ndarray | None], message: str
) -> None:
    model, folder = tiny
    inputs = {**random_inputs(model.inputs, 0), **change}
    loaded = load(folder)
    with pytest.raises(UserError) as caught:
        loaded({name: array for name, array in inputs.items() if array is not None})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_library_runs_on_cores_of_its_own_number(tiny: tuple[Model, Path]) -> None:
    cores = usable_cores()
    if len(cores) < 2:
        pytest.skip("needs two cores")
    before = os.sched_getaffinity(0)
    one, two = load(tiny[1], units=1), load(tiny[1], units=2)
    inputs = random_inputs(one.inputs, 0)
    wanted = one(inputs)["features"]
    for loaded in (two, one, two, one, two):
        np.testing.assert_allclose(loaded(inputs)["features"], wanted, rtol=1e-4, atol=1e-5)
        run = loaded._lane.thread.run
        assert run(lambda: os.sched_getaffinity(0)) == {cores[0]}
        assert _bound(loaded) == list(cores[: loaded.units])
        # A parallel loop has as many parts as there are threads at work.
        assert run(partial(_parts, loaded.units)) == loaded.units
    assert os.sched_getaffinity(0) == before


def _bound(library: Library) -> list[int]:
    """The cores of the threads that the kernels in use run on."""
    ids = library._lane.thread.run(thread_pools().threads)
    return [core for thread in ids for core in os.sched_getaffinity(thread)]


def _parts(wanted: int) -> int:
    """How many threads take part in parallel loops, of which so many are expected."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loops.so"
        tvm.tirx.build(_counting(), target=target()).export_library(str(path))
        loops = tvm.runtime.load_module(str(path))
        thread_pools().adopt(path)
    counts = tvm.runtime.tensor(np.zeros(64, "int32"))
    seen: set[int] = set()
    # A part that its thread has not begun is done by the caller, on a busy machine for a while.
    end = time.monotonic() + 60.0
    runs = 0
    while runs < 500 or (len(seen) < wanted and time.monotonic() < end):
        loops["main"](counts)
        seen |= set(counts.numpy().tolist())
        runs += 1
    return len(seen)


def _counting() -> tvm.IRModule:
    """Each iteration of a parallel loop notes the thread it runs in."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def main(out: T.Buffer((64,), "int32")) -> None:  # type: ignore[valid-type]
        for i in T.parallel(64):
            with T.sblock("note"):
                place = T.axis.spatial(64, i)
                out[place] = T.call_extern("int32", "gettid")

    return tvm.IRModule({"main": main})


def test_a_closed_library_says_so(tiny: tuple[Model, Path]) -> None:
    loaded = load(tiny[1])
    loaded.close()
    with pytest.raises(UserError, match="is closed"):
        loaded(random_inputs(loaded.inputs, 0))


def test_a_library_that_is_dropped_ends_its_thread(tiny: tuple[Model, Path]) -> None:
    def library_threads() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name == "tuned-library"}

    before = library_threads()
    loaded = load(tiny[1])
    loaded(random_inputs(loaded.inputs, 0))
    (thread,) = library_threads() - before
    del loaded
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_benchmark_statistics_are_in_order(tiny: tuple[Model, Path]) -> None:
    loaded = load(tiny[1])
    stats = loaded.benchmark(repeat=20)
    assert stats.n == 20
    assert 0 < stats.min_ms <= stats.p10_ms <= stats.median_ms <= stats.p90_ms
    assert loaded.benchmark(seconds=0.1).n > 1


# -- switching -------------------------------------------------------------------------------------


def test_use_switches_code_and_cores(tiny: tuple[Model, Path]) -> None:
    model, folder = tiny
    cores = usable_cores()
    loaded = load(folder, units=1)
    inputs = random_inputs(model.inputs, 5)
    wanted = {units: load(folder, units)(inputs)["scores"] for units in (1, 2)}
    assert not np.array_equal(wanted[1], wanted[2])  # other code, other rounding: told apart below
    for asked, units in ((2, 2), (1, 1), (9, 2), (1, 1), (2, 2)):
        assert loaded.use(asked) is loaded
        assert loaded.units == units
        assert loaded.cores == cores[:asked]
        np.testing.assert_array_equal(loaded(inputs)["scores"], wanted[units])
    visible = min(2, len(cores))
    assert loaded.use(1).use().units == visible
    assert loaded.cores == cores
    with pytest.raises(UserError, match="0 units: a share has at least 1"):
        loaded.use(0)
    loaded.close()
    with pytest.raises(UserError, match="is closed"):
        loaded.use(1)


def test_a_library_for_one_share_runs_on_the_cores_of_another(
    tiny: tuple[Model, Path], copy: Path
) -> None:
    model, folder = tiny
    export(copy, model, {1: folder / "lib-1.so"}, FACTS)
    loaded = load(copy)
    for cores in range(1, len(usable_cores()) + 1):
        assert loaded.use(cores).units == 1
        assert _bound(loaded) == list(loaded.cores)
        assert len(loaded.cores) == cores


def test_use_notices_that_this_process_may_use_other_cores(tiny: tuple[Model, Path]) -> None:
    cores = usable_cores()
    if len(cores) < 2:
        pytest.skip("needs two cores")
    loaded = load(tiny[1])
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores[1]})
    try:
        assert loaded.use().units == 1
        assert loaded.cores == (cores[1],)
        assert loaded._lane.thread.run(lambda: os.sched_getaffinity(0)) == {cores[1]}
    finally:
        os.sched_setaffinity(0, before)
    assert loaded.use().cores == cores


def test_no_call_is_lost_or_wrong_while_shares_change(tiny: tuple[Model, Path]) -> None:
    """Callers never stop while another thread switches; each answer is one library's or the other's."""
    model, folder = tiny
    loaded = load(folder, preload=True)
    inputs = [random_inputs(model.inputs, seed) for seed in range(3)]
    wanted = [
        {load(folder, units)(given)["scores"].tobytes() for units in (1, 2)} for given in inputs
    ]
    switching = threading.Event()
    switching.set()
    counts, wrong, errors = [0, 0, 0], [0, 0, 0], []

    def call(number: int) -> None:
        try:
            while switching.is_set():
                scores = loaded(inputs[number])["scores"]
                counts[number] += 1
                wrong[number] += scores.tobytes() not in wanted[number]
        except Exception as error:
            errors.append(error)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for caller in callers:
        caller.start()
    for turn in range(200):
        loaded.use(1 + turn % 2)
        time.sleep(0.001)
    switching.clear()
    for caller in callers:
        caller.join(30)
    assert not any(caller.is_alive() for caller in callers)
    assert errors == []
    assert wrong == [0, 0, 0]
    assert min(counts) > 0


def test_a_call_under_way_finishes_where_it_began_and_later_ones_do_not_wait(
    tiny: tuple[Model, Path],
) -> None:
    if len(usable_cores()) < 2:
        pytest.skip("needs two cores")
    loaded = load(tiny[1], units=2)
    began, go_on = threading.Event(), threading.Event()
    answers = []

    def slow(program: Program) -> Program:
        began.set()
        assert go_on.wait(30)
        return program

    old = loaded._lane.program
    caller = threading.Thread(target=lambda: answers.append(loaded._run(slow)))
    caller.start()
    assert began.wait(30)
    loaded.use(1)
    assert loaded._run(lambda program: program) is not old  # answered while the other one waits
    assert answers == []
    go_on.set()
    caller.join(30)
    assert answers == [old]


def test_what_is_preloaded_is_not_opened_again(
    tiny: tuple[Model, Path], copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny
    # Which weights the baseline schedules pack depends on the processor: here they pack none.
    traces = {task: trace for task, trace in default_traces(model).items() if PACKING not in trace}
    link(compile_model(model, target(), traces), tmp_path / "two.so")
    export(copy, model, {1: folder / "lib-1.so", 2: tmp_path / "two.so"}, FACTS)
    opened = []
    real = open_vm

    def counting(path: Path, weights: Any, entry: str) -> Program:
        opened.append(path.name)
        return real(path, weights, entry=entry)

    def reading(path: str) -> object:
        read.append(Path(path).name)
        return read_weights(path)

    read: list[str] = []
    read_weights = tvm.runtime.load_param_dict_from_file
    monkeypatch.setattr(tvm.runtime, "load_param_dict_from_file", reading)
    monkeypatch.setattr(loaded_module, "open_vm", counting)
    loaded = load(copy, units=2)
    assert opened == ["lib-2.so"]
    loaded.use(1)
    assert opened == ["lib-2.so", "lib-1.so"]
    one, two = loaded._lane.program, loaded.use(2)._lane.program
    assert one is not None and two is not None
    pairs = zip(one._weights, two._weights, strict=True)
    assert any(first.same_as(second) for first, second in pairs), (
        "unpacked weights are in memory once"
    )
    assert read == ["weights.bin"], "once for both"
    opened.clear()
    loaded = load(copy, units=2, preload=True)
    assert sorted(opened) == ["lib-1.so", "lib-2.so"]
    assert loaded.units == 2
    shutil.rmtree(copy)
    for turn in range(6):
        loaded.use(1 + turn % 2)(random_inputs(loaded.inputs, 0))
    assert len(opened) == 2


def test_a_share_whose_file_is_damaged_is_refused_and_the_old_one_stays(copy: Path) -> None:
    loaded = load(copy, units=2)
    content = (copy / "lib-1.so").read_bytes()
    (copy / "lib-1.so").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"lib-1\.so is damaged"):
        loaded.use(1)
    assert loaded.units == 2
    assert loaded(random_inputs(loaded.inputs, 0))
    with pytest.raises(UserError, match=r"lib-1\.so is damaged"):
        load(copy, units=2, preload=True)


def test_a_call_that_meets_the_end_is_refused_not_left_waiting() -> None:
    thread = CoreThread(1)
    done = []
    thread.run(lambda: done.append(1))
    thread.stop()
    with pytest.raises(UserError, match="is closed"):
        thread.run(lambda: done.append(2))
    assert done == [1]


def test_the_nearest_library_is_taken(tiny: tuple[Model, Path]) -> None:
    assert [nearest([1, 4, 8], n) for n in (1, 2, 3, 5, 6, 7, 100)] == [1, 1, 4, 4, 4, 8, 8]
    visible = min(2, len(usable_cores()))
    assert load(tiny[1]).units == visible
    assert load(tiny[1], units=1).units == 1
    with pytest.raises(UserError, match="0 units: a share has at least 1"):
        load(tiny[1], units=0)
    everywhere = load(tiny[1], units=len(usable_cores()) + 1)
    assert everywhere.units == 2, "the nearest"
    assert everywhere.cores == usable_cores(), "no more than there are"


def test_missing_and_damaged_folders_are_user_errors(copy: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load(copy, units=2)
        assert "\n" not in str(caught.value)

    with pytest.raises(UserError, match="is no folder"):
        load(copy / "missing")
    shared = (copy / "lib-2.so").read_bytes()
    (copy / "lib-2.so").write_bytes(shared[: len(shared) // 2])
    refused("lib-2.so is damaged")
    (copy / "lib-2.so").unlink()
    refused("lib-2.so is missing")
    (copy / "lib-2.so").write_bytes(shared)
    load(copy, units=2)

    text = (copy / "manifest.json").read_text()
    manifest = json.loads(text)
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    refused("manifest.json is damaged")
    (copy / "manifest.json").write_text("[]")
    refused("manifest.json is damaged")
    write_json(copy, {**manifest, "format": 99})
    refused("format 99")
    write_json(copy, {**manifest, "versions": {**manifest["versions"], "tvm": "0.1"}})
    refused("made with TVM 0.1")
    (copy / "manifest.json").unlink()
    refused("no tuned model")


def test_a_library_for_a_better_processor_is_refused(copy: Path) -> None:
    here = str(tvm.target.codegen.llvm_get_system_cpu())
    for cpu, works in (("x86-64", True), ("diamondrapids", False)):
        shares = [{"percent": 100, "units": 2, "target": {**target_json(), "mcpu": cpu}}]
        change(copy, shares=shares)
        if works or here == cpu:
            load(copy, units=2)
        else:
            with pytest.raises(UserError, match=f"compiled for {cpu}; this processor, {here}"):
                load(copy, units=2)
    change(copy, shares=[{"units": 2, "target": {**target_json(), "mcpu": "x"}}])
    with pytest.raises(UserError, match="compiled for x, an unknown processor"):
        load(copy, units=2)


def test_bare_tvm_runs_the_library_as_the_docstring_says(tiny: tuple[Model, Path]) -> None:
    assert Library.__doc__ is not None
    code = Library.__doc__.partition("::\n\n")[2].partition("\n\n")[0]
    program = textwrap.dedent(code).replace("model.tuned", tiny[1].name)
    program = program.replace(
        "y = ", 'b = tvm.runtime.tensor(np.ones((1, 20), "float32"), device)\ny = '
    )
    program = program.replace("(x, ", "(x, b, ")
    program += "\nimport sys; assert 'gpu_aware_tune' not in sys.modules; print(y[0].numpy())"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=tiny[1].parent,
        env={**os.environ, "TVM_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "[[1. 1. 1. 1. 1. 1. 1. " in done.stdout  # an image of zeros leaves the bias
