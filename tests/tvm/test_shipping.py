"""Compiling every share's library at once, in build workers."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_library import default_traces, target, target_json, write_onnx

from gpu_aware_tune.codegen.build_pool import BuildPool
from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.finalize import library_build
from gpu_aware_tune.finalize.library_build import (
    CompiledLibraries,
    LibrarySpec,
    compile_all,
    compile_together,
    run_on,
)
from gpu_aware_tune.finalize.oracle import make_reference
from gpu_aware_tune.library import open_vm, save_weights
from gpu_aware_tune.model.draws import SPECIAL
from gpu_aware_tune.model.importer import Model, load_model, random_inputs
from gpu_aware_tune.partition import Partition, find_device, open_partitions, share_of
from gpu_aware_tune.workers import WorkerHost


@pytest.fixture(scope="module")
def builders() -> Iterator[BuildPool]:
    with WorkerHost() as host:
        pool = BuildPool(host, target_json(), 2, 60.0, 2 << 30)
        yield pool
        pool.close()


@pytest.fixture
def partition() -> Iterator[Partition]:
    device, _ = find_device("llvm", 0, None)
    (opened,) = open_partitions([share_of(device, 100, "cores")], device, "cores")
    with opened:
        yield opened


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(write_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx"), target())


def test_one_library_for_all_shares_computes_what_theirs_do(
    builders: BuildPool, model: Model, tmp_path: Path
) -> None:
    wanted = [
        LibrarySpec(model, "tuned", 1, target_json(1), {}),
        LibrarySpec(model, "tuned", 2, target_json(2), default_traces(model)),
    ]
    apart = compile_all(wanted, builders, CompiledLibraries(tmp_path))
    assert set(apart) == {("tiny", "tuned", 1), ("tiny", "tuned", 2)}
    together = compile_together(wanted, builders, tmp_path)["tiny"]
    sizes = [path.stat().st_size for path in apart.values()]
    assert max(sizes) < together.stat().st_size < sum(sizes)
    weights = tmp_path / "weights.bin"
    save_weights(model.weights, weights)
    inputs = list(random_inputs(model.inputs, 0).values())
    for (_, _, units), path in apart.items():
        one = open_vm(path, weights)
        all_of_them = open_vm(together, weights, entry=f"main_{units}")
        pairs = zip(one(one.place(inputs)), all_of_them(all_of_them.place(inputs)), strict=True)
        for wanted_array, array in pairs:
            np.testing.assert_array_equal(array, wanted_array)


def test_a_library_runs_in_a_worker_inside_its_share(
    builders: BuildPool, model: Model, partition: Partition, tmp_path: Path
) -> None:
    wanted = [LibrarySpec(model, "tuned", 2, target_json(2), default_traces(model))]
    (path,) = compile_all(wanted, builders, CompiledLibraries(tmp_path)).values()
    weights = tmp_path / "weights.bin"
    save_weights(model.weights, weights)
    reference = make_reference(model.source, {}, 0, None, None)
    with WorkerHost() as host:
        got = run_on(host, partition, path, "main", weights, reference)
    assert len(got) == len(reference.draws) > 1
    for draw, outputs in zip(reference.draws, got, strict=True):
        if draw.kind not in SPECIAL:
            for array, wanted_array in zip(outputs, draw.outputs, strict=True):
                np.testing.assert_allclose(array, wanted_array, rtol=1e-4, atol=1e-4)


def test_no_library_is_compiled_twice(builders: BuildPool, model: Model, tmp_path: Path) -> None:
    compiled = CompiledLibraries(tmp_path)
    one = LibrarySpec(model, "tuned", 2, target_json(2), default_traces(model))
    other = LibrarySpec(model, "untuned", 2, target_json(2), {})
    paths = compile_all([one, other], builders, compiled)
    assert len(set(paths.values())) == 2
    written = {path: path.stat().st_mtime_ns for path in paths.values()}
    again = compile_all([dataclasses.replace(one, name="again"), other], builders, compiled)
    assert set(again.values()) == set(paths.values())
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_what_does_not_compile_is_told(builders: BuildPool, model: Model, tmp_path: Path) -> None:
    broken = dict.fromkeys(default_traces(model), "no trace")
    wanted = [
        LibrarySpec(model, "tuned", 1, target_json(1), {}),
        LibrarySpec(model, "tuned", 2, target_json(2), broken),
    ]
    with pytest.raises(TuneError, match="tiny: the library of all shares did not compile: "):
        compile_together(wanted, builders, tmp_path)
    with pytest.raises(TuneError, match="the tuned library for 2 units did not compile: "):
        compile_all(wanted, builders, CompiledLibraries(tmp_path))


@pytest.mark.parametrize(
    ("function", "argument", "why"),
    [(os._exit, 7, "exit code 7"), (time.sleep, 60, "no answer in 0 s")],
)
def test_a_worker_that_dies_or_hangs_is_one_line(
    partition: Partition,
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[[int], None],
    argument: int,
    why: str,
) -> None:
    if argument == 60:
        monkeypatch.setattr(library_build, "_LIMIT_S", 0.3)
    with WorkerHost() as host, pytest.raises(TuneError, match=f"timing the library .*{why}"):
        library_build._inside(host, partition, function, (argument,), "timing")
