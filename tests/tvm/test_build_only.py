"""Machines that search and build for a device that they do not have, without Ray around them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gpu_aware_tune.workers.warm import load_tvm

load_tvm()

import tvm  # noqa: E402
from mock_gpu.devices import fake_gpu  # noqa: E402
from tvm import te  # noqa: E402

from gpu_aware_tune import __version__  # noqa: E402
from gpu_aware_tune.cluster.messages import (  # noqa: E402
    Ask,
    Begin,
    DraftRequest,
    Gone,
    Made,
    Measure,
    Measured,
    NodeSetup,
    Numbered,
    Ready,
    Work,
)
from gpu_aware_tune.cluster.node import Node, settings_here  # noqa: E402
from gpu_aware_tune.codegen import cuda_toolchain  # noqa: E402
from gpu_aware_tune.errors import SetupError  # noqa: E402
from gpu_aware_tune.kernels.schedules import baseline_schedules  # noqa: E402
from gpu_aware_tune.kernels.traces import module_to_json, task_hash, trace_to_json  # noqa: E402
from gpu_aware_tune.measure import SEARCH  # noqa: E402
from gpu_aware_tune.partition import Device, Share, find_device, share_of  # noqa: E402
from gpu_aware_tune.search.candidates import NewTask, SearchSettings  # noqa: E402
from gpu_aware_tune.search.pipeline import TaskSpec  # noqa: E402
from gpu_aware_tune.search.pools import PoolSettings  # noqa: E402

SIZE = 64


def matmul() -> Any:
    a, b = (te.placeholder((SIZE, SIZE), name=name) for name in "ab")
    k = te.reduce_axis((0, SIZE), name="k")
    product = te.compute((SIZE, SIZE), lambda i, j: te.sum(a[i, k] * b[k, j], k), name="c")
    function = te.create_prim_func([a, b, product]).with_attr("global_symbol", "main")
    return tvm.IRModule({"main": function})


MODULE = matmul()
TASK = task_hash(MODULE)
BUFFER = ((SIZE, SIZE), "float32")


def setup_for(share: Share, backend: str) -> NodeSetup:
    units = share.units if share.device.kind == "cuda" else 0
    pools = PoolSettings(
        device=share.device,
        backend=backend,
        slices=((share,),),
        target=share.device.target(share.units),
        search=SearchSettings(16, 1, 4, 0, units=units),
        build_timeout_s=60.0,
        run_timeout_s=10.0,
        memory_bytes=2 << 30,
    )
    tasks = {TASK: TaskSpec((BUFFER,) * 3, (share.units,))}
    modules = {TASK: module_to_json(MODULE)}
    return NodeSetup(pools, tasks, modules, None, (__version__, tvm.__version__))


def default_trace(device: Device, units: int) -> str:
    schedules = baseline_schedules(MODULE, tvm.target.Target(device.target(units)))
    return next(trace_to_json(schedule.trace) for schedule in schedules)


def candidate(trace: str, number: int) -> Numbered:
    return Numbered(TASK, trace, "default", id=number)


@pytest.fixture
def start() -> Iterator[Callable[[NodeSetup, int | None], Node]]:
    """Starts nodes, each with a run under way; ends them."""
    nodes: list[Node] = []

    def start_node(setup: NodeSetup, gpu: int | None) -> Node:
        nodes.append(Node(setup, gpu))
        nodes[-1].post([Begin(1, SEARCH, False)])
        return nodes[-1]

    yield start_node
    for node in nodes:
        node.close(20)


def wait_for(node: Node, kind: type, count: int = 1) -> list[Any]:
    """The next messages of a kind."""
    found: list[Any] = []
    end = time.monotonic() + 60
    while len(found) < count and time.monotonic() < end:
        for message in node.poll(0.5).messages:
            assert isinstance(message, kind) or not isinstance(message, Gone), message
            found += [message] if isinstance(message, kind) else []
    assert len(found) == count
    return found


def test_a_machine_without_a_gpu_searches_and_builds_cubins(start: Any) -> None:
    try:
        cuda_toolchain.find_toolchain()
    except SetupError as error:
        pytest.skip(str(error))
    share = share_of(fake_gpu(), 30, "green")
    node = start(setup_for(share, "green"), None)
    (ready,) = wait_for(node, Ready)
    assert ready.lacks == "it has no NVIDIA H200 to measure on"
    assert "partition" not in ready.text
    node.post([Work(candidate(default_trace(share.device, share.units), 7), {})])
    (made,) = wait_for(node, Made)
    assert made.id == 7 and made.artifact.digest
    data = made.artifact.data
    assert data.startswith(b"\x7fELF") and b"\x7fELF" in data[1:], "no cubin inside"
    assert b"__global__" not in data
    node.post([Ask(TASK, NewTask(TASK, module_to_json(MODULE)))])
    (draft,) = wait_for(node, DraftRequest)
    assert draft.task == TASK and draft.candidates
    drafted = draft.candidates[0]
    node.post([Work(Numbered(TASK, drafted.trace, "search", drafted.number, id=8), {})])
    (made,) = wait_for(node, Made)
    assert made.id == 8 and b"\x7fELF" in made.artifact.data[1:]


def test_an_artifact_is_measured_where_the_device_is(start: Any) -> None:
    device, _ = find_device("llvm", 0, None)
    share = share_of(device, 1)
    setup = setup_for(share, "cores")
    builder, measurer = start(setup, None), start(setup, 0)
    trace = default_trace(device, share.units)
    builder.post([Work(candidate("no trace", 1), {}), Work(candidate(trace, 2), {})])
    (failed,) = wait_for(builder, Measured)
    assert failed.id == 1 and failed.measurements[share.units].failure.kind == "build"
    (made,) = wait_for(builder, Made)
    assert made.id == 2
    measurer.post([Measure(candidate(trace, number), made.artifact, {}) for number in (11, 12)])
    first, twin = wait_for(measurer, Measured, 2)
    assert [first.id, twin.id] == [11, 12]
    assert 0 < first.measurements[share.units].seconds < 1e-2
    assert twin.measurements == first.measurements, "the same machine code is measured once"
    assert measurer.poll(0.5).status.builds == 0


def test_what_a_machine_can_do_for_a_run() -> None:
    device, _ = find_device("llvm", 0, None)
    setup = setup_for(share_of(device, 100), "cores")
    own, lacks = settings_here(setup, 0)
    assert own.slices and not lacks

    def with_device(**changes: Any) -> NodeSetup:
        other = dataclasses.replace(device, **changes)
        share = Share(100, other.units_total, other)
        pools = dataclasses.replace(setup.pools, device=other, slices=((share,),))
        return dataclasses.replace(setup, pools=pools)

    own, lacks = settings_here(with_device(name="Other", arch="znver1"), 0)
    assert own.slices == () and own.device.name == "Other"
    assert lacks == f"it has {device.name} ({device.arch}), not Other (znver1)"
    own, lacks = settings_here(with_device(units_total=10_000), 0)
    assert own.slices == () and lacks.endswith("the run's shares need 10000")
    foreign = dataclasses.replace(with_device(name="Other"), platform="linux-other")
    with pytest.raises(SetupError, match="cannot build for linux-other"):
        settings_here(foreign, 0)
    gpu = setup_for(share_of(fake_gpu(), 30, "green"), "green")
    assert settings_here(gpu, None)[0].slices == ()
    with pytest.raises(SetupError):
        settings_here(gpu, 0)  # its GPU is not the run's, or there is none: it gives it back
