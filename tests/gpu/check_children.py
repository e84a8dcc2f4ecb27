"""The parts of the checks that need a process of their own."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import numpy as np

from benchmarks.scaffold import tell
from gpu_aware_tune.errors import TuneError


def sm_sets(lab: Any, groups: int, size: int) -> dict[str, Any]:
    """The SMs of equal groups."""
    with lab.split([size] * groups) as lanes:
        return {"sets": [list(lane.sm_ids()) for lane in lanes]}


def pair(lab: Any, size: int, seconds: float) -> dict[str, Any]:
    """How much longer two loads take together than the longer one alone."""
    with lab.split([size, size]) as lanes:
        rounds = lanes[0].rounds_for("compute", seconds)
        alone = [_wall(lane, rounds) for lane in lanes]
        spent = [0.0, 0.0]
        barrier = threading.Barrier(2)

        def run(number: int) -> None:
            enter_thread(lanes[number])
            barrier.wait()
            spent[number] = _wall(lanes[number], rounds)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = time.perf_counter() - begun
    return {"alone": alone, "together": together, "stretch": max(spent) / max(alone)}


def spin_green(lab: Any, size: int, seconds: float, start_at: float) -> dict[str, Any]:
    """Many short launches in a green context, begun at a given time; how long they took."""
    with lab.split([size]) as (lane,):
        rounds = lane.rounds_for("compute", 0.005)
        time.sleep(max(0.0, start_at - time.time()))
        begun = time.perf_counter()
        for _ in range(max(1, round(seconds / 0.005))):
            lane.launch("compute", rounds)
        lane.wait()
        return {"seconds": time.perf_counter() - begun, "late": time.time() - start_at}


def relax_graph(lab: Any, graph: bool, size: int) -> dict[str, Any]:
    """A chain of matrix products in TVM's virtual machine: time on few SMs over time on all."""
    import tempfile
    from pathlib import Path

    from gpu_aware_tune.workers.warm import load_tvm

    load_tvm()
    import tvm
    from tvm import relax

    from gpu_aware_tune.codegen.compile import compile_module
    from gpu_aware_tune.codegen.cuda_toolchain import environment, link, packer
    from gpu_aware_tune.library.program import wait

    extent = 64 if lab.mock else 1024
    target = tvm.target.Target(lab.device.target(lab.sms))
    os.environ.update(environment())
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": graph}):
        executable = compile_module(products(extent), target, {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.so"
        executable.export_library(str(path), fcompile=link, fpack_imports=packer(lab.device.arch))
        module = tvm.runtime.load_module(str(path))
    seconds = {}
    for units in (lab.sms, size):
        with lab.split([units], disjoint=False) as (lane,), lane.partition.timing_context():
            device = tvm.device(lane.partition.tvm_device, lane.partition.ordinal)
            machine = relax.VirtualMachine(module, device)
            args = [tvm.runtime.tensor(np.full((extent, extent), 0.01, "float32"), device)] * 2
            device.sync()
            for _ in range(3):
                machine["main"](*args)
            wait(device)
            begun = time.perf_counter()
            for _ in range(10):
                machine["main"](*args)
            wait(device)
            device.sync()
            seconds[units] = (time.perf_counter() - begun) / 10
            del machine
    captured = "cuda_graph.run_or_capture" in executable.as_text()
    return {"seconds": seconds, "gain": seconds[size] / seconds[lab.sms], "captured": captured}


def mps_client(lab: Any, percent: int) -> dict[str, Any]:
    """What a process that was started as an MPS client sees and runs on."""
    from gpu_aware_tune.partition.driver import mps_is_on, started_driver, visible_sms

    driver = started_driver()
    seen = {"mps": mps_is_on(driver, 0), "sms": visible_sms(driver, 0), "percent": percent}
    with lab.whole() as lane:
        return {**seen, "sms_seen": len(lane.sm_ids())}


def gemm(lab: Any, sizes: list[int], green: int) -> dict[str, Any]:
    """float16 products by TVM, and by cuBLAS where torch is there, against float64 on the CPU."""
    from gpu.products import errors_of

    if green:
        with lab.split([green]) as (lane,):
            return errors_of(lab, lane, sizes)
    with lab.whole() as lane:
        return errors_of(lab, lane, sizes)


def client(lab: Any, fault: bool) -> dict[str, Any]:
    """Launch until told to stop on stdin; with `fault` the first line lets it do what is illegal."""
    steps = 0
    try:
        with lab.whole() as lane:
            print("READY", flush=True)
            order = sys.stdin.readline().strip() if fault else ""
            if order == "fault":
                lane.illegal()
                lane.wait()
            end = time.monotonic() + 5
            while time.monotonic() < end:
                lane.launch("compute", 1000)
                lane.wait()
                steps += 1
    except TuneError as error:
        return {"steps": steps, "failed": str(error)}
    return {"steps": steps, "failed": None}


def green_fault(lab: Any, size: int) -> dict[str, Any]:
    """What an illegal access on one green partition does to the other one of its process."""
    found: dict[str, Any] = {}
    with lab.split([size, size]) as lanes:
        for name, lane in zip(("faulty", "other"), lanes, strict=True):
            try:
                lane.illegal() if name == "faulty" else lane.launch("compute", 100)
                lane.wait()
                found[name] = None
            except TuneError as error:
                found[name] = str(error)
        tell(found)  # nothing can be given back after a fault
        os._exit(0)


def enter_thread(lane: Any) -> None:
    """Make the lane's context current in this thread too."""
    from gpu_aware_tune.partition.driver import call, started_driver

    driver = started_driver()
    device = call(driver.cuDeviceGet, lane.partition.ordinal)
    call(driver.cuCtxSetCurrent, call(driver.cuDevicePrimaryCtxRetain, device))


def _wall(lane: Any, rounds: int) -> float:
    begun = time.perf_counter()
    lane.launch("compute", rounds)
    lane.wait()
    return time.perf_counter() - begun


def products(extent: int) -> Any:
    """main(x, w) = w to the tenth power, plus x.

    All but the sum depends on the weight alone: only that does TVM put into a graph.
    """
    import tvm
    from tvm.script import relax as R
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import relax as builder

    with IRBuilder() as made, builder.function():
        R.func_name("main")
        R.func_attr({"num_input": 1})  # what follows the first argument is the same in each call
        x = R.arg("x", R.Tensor((extent, extent), "float32"))
        w = R.arg("w", R.Tensor((extent, extent), "float32"))
        value = w
        for _ in range(9):
            value = R.emit(R.matmul(value, w))
        R.func_ret_value(R.emit(R.add(value, x)))
    return tvm.relax.transform.LegalizeOps()(tvm.IRModule({"main": made.get()}))


CHILDREN = {
    each.__name__: each
    for each in (sm_sets, pair, spin_green, relax_graph, mps_client, gemm, client, green_fault)
}
