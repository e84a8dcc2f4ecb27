"""3x3 convolutions in Winograd's form: which are, that the numbers stay right, in every schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from test_layouts import AVX2, AVX512, CONV3, Node, compared, load
from tiny_library import default_traces, target

from gpu_aware_tune.finalize.kernel_check import verify_kernel
from gpu_aware_tune.kernels.schedules import MOST_BASELINES
from gpu_aware_tune.kernels.schedules.cpu import cpu_schedules, machine_of
from gpu_aware_tune.kernels.schedules.winograd import Division, Problem, divisions
from gpu_aware_tune.kernels.traces import apply_trace, trace_to_json
from gpu_aware_tune.kernels.winograd import Role, convolution_of, roles_of, transformed
from gpu_aware_tune.model.importer import Model
from gpu_aware_tune.model.tasks import extract
from gpu_aware_tune.search.candidates import NewTask, SearchSettings, _Search

FIRST: Node = ("Conv", ["x", "first"], "a", CONV3)  # so that images are in blocks on both sides
LAST: Node = ("Conv", ["y", "last"], "z", {})
FIRST_FILTERS = {"first": (32, 16, 3, 3), "last": (16, 32, 1, 1)}


def network(
    nodes: Sequence[Node], path: Path, size: Sequence[int] = (1, 12, 12), **more: Any
) -> Model:
    """Nodes that make `y` of `a`, between two convolutions; of `size` images, rows and columns."""
    batch, *pixels = size
    filters = {**FIRST_FILTERS, **more.pop("filters", {"w": (32, 32, 3, 3)})}
    shape = (batch, 16, *pixels)
    return load(path / "network.onnx", [FIRST, *nodes, LAST], filters, shape, **more)


def transformed_kernels(model: Model) -> list[str]:
    return sorted(v.name_hint for v in model.module.functions if v.name_hint.endswith("_winograd"))


def conv(source: str = "a", result: str = "y", **attributes: Any) -> Node:
    return ("Conv", [source, "w"], result, {**CONV3, **attributes})


NETWORKS: dict[str, tuple[list[Node], tuple[int, ...]]] = {
    "alone": ([conv()], (1, 12, 12)),
    "odd images": ([conv()], (1, 13, 11)),
    "a batch": ([conv()], (3, 9, 12)),
    "without padding": ([conv(pads=[0, 0, 0, 0])], (1, 15, 14)),
    "padded more on one side": ([conv(pads=[0, 1, 2, 1])], (1, 12, 12)),
    "a costly reader of a result that is read twice": (
        [conv(result="b"), ("Sigmoid", ["b"], "c", {}), ("Mul", ["b", "c"], "y", {})],
        (1, 12, 12),
    ),
    "a sum with another image": (
        [conv(result="b"), ("Add", ["a", "b"], "c", {}), ("Relu", ["c"], "y", {})],
        (1, 12, 12),
    ),
    "a pool behind it": (
        [conv(result="b"), ("MaxPool", ["b"], "y", {"kernel_shape": [2, 2], "strides": [2, 2]})],
        (1, 12, 12),
    ),
}


@pytest.mark.parametrize("cpu", [AVX2, AVX512], ids=["8 lanes", "16 lanes"])
@pytest.mark.parametrize("name", NETWORKS)
def test_results_are_those_of_the_original(
    name: str, cpu: tvm.target.Target, tmp_path: Path
) -> None:
    nodes, size = NETWORKS[name]
    model = network(nodes, tmp_path, size, cpu=cpu)
    assert len(transformed_kernels(model)) == 1
    report = compared(model, default_traces(model), tmp_path)
    assert report.ok, report
    assert report.max_error < 1e-5


@pytest.mark.parametrize("name", ["odd images", "a costly reader of a result that is read twice"])
def test_every_schedule_replays_and_computes_the_same(name: str, tmp_path: Path) -> None:
    nodes, size = NETWORKS[name]
    model = network(nodes, tmp_path, size, cpu=AVX2)
    machine = machine_of(AVX2)
    for task in extract(model, AVX2):
        if not task.name.endswith("_winograd"):
            continue
        schedules = [*islice(cpu_schedules(task.module, machine, 40), 40)]
        kinds = {"T.parallel" in text for text in (s.mod.script() for s in schedules)}
        assert len(schedules) > 6 and kinds == {True}
        for schedule in schedules[::3]:
            trace = trace_to_json(schedule.trace)
            replayed = apply_trace(trace, task.module).mod
            assert tvm_ffi.structural_equal(replayed, schedule.mod)
            assert verify_kernel(task.module, trace, target(), seed=1).ok


def test_a_search_tries_every_division_and_nothing_else(tmp_path: Path) -> None:
    model = network([conv()], tmp_path, cpu=AVX2)
    (task,) = (t for t in extract(model, AVX2) if t.name.endswith("_winograd"))
    search = _Search(AVX2, SearchSettings(population=8, generations=1, per_draft=8, seed=3), 0)
    search.add(NewTask(task.hash, task.module_json))
    drafted: list[str] = []
    while found := search.draft(task.hash):
        drafted += [candidate.trace for candidate in found]
        search.learn([(task.hash, candidate.number, 1e-3) for candidate in found])
    every = [trace_to_json(s.trace) for s in cpu_schedules(task.module, machine_of(AVX2), 96)]
    assert drafted == every[MOST_BASELINES:]


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (conv(strides=[2, 2]), (32, 32, 3, 3)),
        (conv(dilations=[2, 2], pads=[2, 2, 2, 2]), (32, 32, 3, 3)),
        (conv(group=2), (32, 16, 3, 3)),
        (conv(group=32), (32, 1, 3, 3)),
        (conv(pads=[2, 2, 2, 2]), (32, 32, 5, 5)),
        (conv(pads=[0, 1, 0, 1]), (32, 32, 1, 3)),
    ],
    ids=["strides", "dilations", "groups", "depthwise", "5x5", "1x3"],
)
def test_other_convolutions_stay(node: Node, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = network([node], tmp_path, filters={"w": shape}, cpu=AVX2)
    assert not transformed_kernels(model)


def test_few_channels_or_pixels_stay(tmp_path: Path) -> None:
    narrow = network(
        [conv()],
        tmp_path,
        filters={"first": (16, 16, 3, 3), "w": (32, 16, 3, 3)},
        cpu=AVX2,
    )
    assert not transformed_kernels(narrow)
    small = network([conv()], tmp_path, (1, 6, 6), cpu=AVX2)
    assert not transformed_kernels(small)


def test_tiles_that_registers_cannot_share_stay(tmp_path: Path) -> None:
    model = network([conv()], tmp_path, (1, 6, 38), cpu=AVX2)  # 3 rows of 19 tiles
    assert not transformed_kernels(model)


def test_a_filter_that_something_else_reads_stays(tmp_path: Path) -> None:
    nodes: list[Node] = [
        conv(result="b"),
        ("ReduceMean", ["x"], "m", {"keepdims": 0}),
        ("Mul", ["w", "m"], "v", {}),
        ("ReduceSum", ["v"], "s", {"keepdims": 0}),
        ("Mul", ["b", "s"], "y", {}),
    ]
    model = network(nodes, tmp_path, cpu=AVX2)
    assert not transformed_kernels(model)
    report = compared(model, default_traces(model), tmp_path)
    assert report.ok, report


def test_one_filter_of_two_convolutions(tmp_path: Path) -> None:
    nodes: list[Node] = [conv(result="b"), ("Relu", ["b"], "c", {}), conv("c")]
    model = network(nodes, tmp_path, cpu=AVX2)
    assert len(transformed_kernels(model)) == 2
    report = compared(model, default_traces(model), tmp_path)
    assert report.ok, report


def test_one_filter_with_and_without_steps_stays(tmp_path: Path) -> None:
    nodes: list[Node] = [conv(result="b"), ("Relu", ["b"], "c", {}), conv("c", strides=[2, 2])]
    model = network(nodes, tmp_path, cpu=AVX2)
    assert not transformed_kernels(model)
    report = compared(model, default_traces(model), tmp_path)
    assert report.ok, report


def test_the_kernel_says_what_its_blocks_are(tmp_path: Path) -> None:
    model = network([conv()], tmp_path, cpu=AVX2)
    (first, *_) = transformed_kernels(model)
    assert set(roles_of(model.module[first])) == set(Role)
    assert convolution_of(model.module[first]) is None


def test_a_filter_is_transformed_as_the_paper_says() -> None:
    taps = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3, 1, 1)
    rows = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    expected = rows @ np.arange(9.0).reshape(3, 3) @ rows.T
    assert transformed(taps).shape == (4, 4, 1, 1, 1, 1)
    np.testing.assert_array_equal(transformed(taps)[:, :, 0, 0, 0, 0], expected)


def test_both_ways_to_share_out_are_tried_first() -> None:
    problem = Problem(batch=1, down=28, across=28, inputs=8, outputs=8, lanes=8)
    first, second, *others = divisions(problem, machine_of(AVX2))
    assert {bool(first.rows), bool(second.rows)} == {True, False}
    assert first.cycles <= second.cycles and first.cycles <= min(d.cycles for d in others)
    assert all(isinstance(d, Division) and 28 % d.down == 28 % d.across == 0 for d in others)
