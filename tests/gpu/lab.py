"""What the checks do with a GPU: lanes (streams of given SMs), loads on them, child processes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import ROOT
from benchmarks.scaffold import told
from gpu_aware_tune.partition import FullPartition, Share, find_device
from gpu_aware_tune.partition import probe as sm_probe
from gpu_aware_tune.partition.driver import call
from gpu_aware_tune.partition.gpu_partition import GpuPartition
from gpu_aware_tune.partition.green import plan_partitions

CHILD_TIMEOUT_S = 60.0
LOADS = ("compute", "l2", "dram")

_SOURCE = r"""
extern "C" __global__ void compute(float *data, unsigned int rounds) {
  float sum = threadIdx.x;
  for (unsigned int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int j = 0; j < 32; ++j) sum = sum * 0.999f + 0.001f;
  }
  if (sum == -1.0f) data[0] = sum;
}
extern "C" __global__ void sweep(float4 *data, unsigned int words, unsigned int rounds) {
  unsigned int step = gridDim.x * blockDim.x;
  for (unsigned int i = 0; i < rounds; ++i)
    for (unsigned int at = blockIdx.x * blockDim.x + threadIdx.x; at < words; at += step) {
      float4 value = data[at];
      value.x += 1.0f;
      data[at] = value;
    }
}
extern "C" __global__ void illegal(float *data) { *(volatile float *)16 = data[0]; }
"""
_BYTES = {"l2": 24 << 20, "dram": 1 << 30}


class Lane:
    """One partition of a GPU, entered, with loads to put on it."""

    def __init__(self, partition: GpuPartition) -> None:
        self.partition = partition
        self.units = partition.share.units
        self._stack = contextlib.ExitStack()
        partition.enter_worker()
        self._stack.callback(partition.close)
        self._driver = partition._driver
        module = call(self._driver.cuModuleLoadData, loads_cubin(partition.share.device.arch))
        names = ("compute", "sweep", "illegal")
        self._kernels = {
            name: call(self._driver.cuModuleGetFunction, module, name.encode()) for name in names
        }
        self._stack.callback(call, self._driver.cuModuleUnload, module)
        self._buffers: dict[str, Any] = {}

    def sm_ids(self) -> tuple[int, ...]:
        """The SMs that kernels on this lane run on."""
        total = self.partition.share.device.units_total
        return sm_probe.sm_ids(self._driver, self.partition.stream or 0, total)

    def launch(self, load: str, rounds: int) -> None:
        """Start a load: multiply-adds, or reading and writing 24 MiB (L2) or 1 GiB (DRAM)."""
        total = self.partition.share.device.units_total
        if load == "compute":
            values = (self._buffer("l2"), rounds), (ctypes.c_void_p, ctypes.c_uint)
            return self._start("compute", 16 * total, 256, values)
        words = _BYTES[load] // 16
        kinds = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._start("sweep", 4 * self.units, 512, ((self._buffer(load), words, rounds), kinds))

    def illegal(self) -> None:
        """Start a kernel that writes where it must not."""
        values = (self._buffer("l2"),), (ctypes.c_void_p,)
        self._start("illegal", 1, 1, values)

    def wait(self) -> None:
        """Wait for what was started; raises what it left behind."""
        self.partition.sync()

    def timed(self, load: str, rounds: int, repeat: int = 1) -> list[float]:
        """Seconds of a load on the GPU."""
        timer = self.partition.launch_timer(lambda: self.launch(load, rounds))
        try:
            return timer(1, repeat)
        finally:
            timer.close()

    def rounds_for(self, load: str, seconds: float) -> int:
        """How many rounds of a load take about so long here."""
        few = 16 if load == "compute" else 1
        return max(1, round(few * seconds / min(self.timed(load, few, 3))))

    def close(self) -> None:
        """Give the lane back."""
        self._stack.close()

    def _start(self, name: str, blocks: int, threads: int, values: Any) -> None:
        stream = self.partition.stream
        call(self._driver.cuLaunchKernel, self._kernels[name], blocks, 1, 1, threads, 1, 1, 0,
             stream, values, 0)  # fmt: skip

    def _buffer(self, load: str) -> int:
        if load not in self._buffers:
            self._buffers[load] = call(self._driver.cuMemAlloc, _BYTES[load])
            self._stack.callback(call, self._driver.cuMemFree, self._buffers[load])
        return int(self._buffers[load])


class Lab:
    """A GPU to experiment on."""

    def __init__(self) -> None:
        self.device, _ = find_device("cuda", 0, None)
        # The mock GPU is slow: its checks try the code on less work, and its times say nothing.
        self.mock = self.device.name == "NVIDIA Fake"

    @property
    def sms(self) -> int:
        """SMs of the whole device."""
        return self.device.units_total

    @contextlib.contextmanager
    def split(self, sizes: Sequence[int], disjoint: bool = True) -> Iterator[list[Lane]]:
        """Lanes of so many SMs each, as green contexts of one split."""
        shares = [Share(max(1, 100 * n // self.sms), n, self.device) for n in sizes]
        with contextlib.ExitStack() as stack:
            lanes = [Lane(part) for part in plan_partitions(shares, disjoint)]
            for lane in lanes:
                stack.callback(lane.close)
            yield lanes

    @contextlib.contextmanager
    def whole(self) -> Iterator[Lane]:
        """A lane of all SMs, without a green context; under MPS all that this process sees."""
        with contextlib.closing(Lane(FullPartition(Share(100, self.sms, self.device)))) as lane:
            yield lane

    def start_child(
        self, name: str, env: dict[str, str] | None = None, **args: Any
    ) -> subprocess.Popen[str]:
        """Start `check_process.py NAME` with arguments; `answer` waits for it."""
        path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            [sys.executable, "-m", "gpu.check_process", name, json.dumps(args)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )

    def child(self, name: str, env: dict[str, str] | None = None, **args: Any) -> dict[str, Any]:
        """Run a child to its end and give its answer."""
        return answer(self.start_child(name, env, **args))


class TvmKernel:
    """A kernel of TVM's (x / 2 + 1) as a build worker makes it, loaded for one lane."""

    def __init__(self, lane: Lane, elements: int) -> None:
        from gpu_aware_tune.workers.warm import load_tvm

        load_tvm()
        import tvm

        self._lane = lane
        partition = lane.partition
        self.device = tvm.device(partition.tvm_device, partition.ordinal)
        self._module = _halving(elements, partition.share.device.arch)
        host = np.arange(elements, dtype="float32") % 1024
        self.input = tvm.runtime.tensor(host, self.device)
        self.output = tvm.runtime.tensor(np.zeros_like(host), self.device)
        self.device.sync()
        self.wanted = host * np.float32(0.5) + np.float32(1)
        self._main = self._module["main"]

    def launch(self) -> None:
        """Launch once on the stream in use."""
        self._main(self.input, self.output)

    def error(self) -> float:
        """Run once on the lane and compare."""
        with self._lane.partition.timing_context():
            self.launch()
        self._lane.partition.sync()
        return float(np.abs(self.output.numpy() - self.wanted).max())

    def evaluator(self, number: int, repeat: int) -> list[float]:
        """TVM's own timer on the lane."""
        timer = self._module.time_evaluator("main", self.device, number=number, repeat=repeat)
        with self._lane.partition.timing_context():
            results = [float(value) for value in timer(self.input, self.output).results]
        self._lane.partition.sync()
        return results


@functools.cache
def _halving(elements: int, arch: str) -> Any:
    import tvm
    from tvm import te

    from gpu_aware_tune.codegen.cuda_toolchain import environment, export_module

    x = te.placeholder((elements,), name="x")
    half, one = te.const(0.5, "float32"), te.const(1, "float32")
    y = te.compute((elements,), lambda i: x[i] * half + one, name="y")
    schedule = tvm.s_tir.Schedule(te.create_prim_func([x, y]))
    outer, inner = schedule.split(schedule.get_loops("y")[0], [None, 256])
    schedule.bind(outer, "blockIdx.x")
    schedule.bind(inner, "threadIdx.x")
    os.environ.update(environment())
    target = tvm.target.Target({"kind": "cuda", "arch": arch, "max_num_threads": 1024})
    built = tvm.tirx.build(schedule.mod, target=target)
    path = Path(tempfile.mkdtemp(prefix="gpu-check-")) / "kernel.so"
    export_module(built, path, arch)
    loaded = tvm.runtime.load_module(str(path))
    path.unlink()
    path.parent.rmdir()
    return loaded


@functools.cache
def loads_cubin(arch: str) -> bytes:
    """The loads, compiled once for all children, which would each spend seconds on it."""
    from gpu_aware_tune.codegen.cuda_toolchain import compile_cubin

    name = hashlib.sha256(f"{arch} {_SOURCE}".encode()).hexdigest()[:16]
    kept = ROOT / "build" / f"gpu-lab-{name}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    cubin = compile_cubin(_SOURCE, arch)
    kept.parent.mkdir(exist_ok=True)
    fresh = kept.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(cubin)
    fresh.replace(kept)
    return cubin


def answer(child: subprocess.Popen[str], timeout_s: float = CHILD_TIMEOUT_S) -> dict[str, Any]:
    """Wait for a child; gives what it answered, or how it ended."""
    try:
        out, err = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # and what it started
        child.communicate()
        return {"error": f"no answer in {timeout_s:.0f} s"}
    if (found := told(out)) is not None:
        return found
    lines = [line for line in err.splitlines() if line.strip()]
    return {"error": f"exit code {child.returncode}: {lines[-1][:300] if lines else 'no output'}"}
