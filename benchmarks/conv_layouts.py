"""What the layout of a convolution's tensors costs on this machine's cores.

    python -m benchmarks.conv_layouts            # about three minutes

Each convolution of resnet50 that is repeated, batch 1, with an input that is padded already:

    plain      NCHW, as the product computes it, with the ReLU that follows: the fastest of its
               baseline schedules
    blocked    NCHW16c: input, weights and result in blocks of as many channels as a vector has
               lanes; the fastest of a few register tiles written by hand
    reduced    the same, with the sum over one block of input channels at a time, so that a block of
               weights stays in the nearest cache while it is used for the whole image

The candidates of a convolution take turns with ONNX Runtime's product of two large matrices, the
yardstick of what these cores do. The figures go to benchmarks/results/conv-layouts.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tvm
from tvm import te, topi
from tvm.s_tir import Schedule

from benchmarks.environment import RESULTS, environment, write_results
from benchmarks.model_latency import (
    PAUSE_S,
    SIDE,
    matmul,
    matrices,
    onnxruntime_timer,
)
from benchmarks.scaffold import Timer, host_target, parser, take_turns
from gpu_aware_tune.kernels.packing import LAYOUT_FREE, without_packing
from gpu_aware_tune.kernels.schedules import baseline_schedules
from gpu_aware_tune.kernels.schedules.cpu import machine_of
from gpu_aware_tune.library.threads import CoreThread

RESULTS_FILE = RESULTS / "conv-layouts.json"
COLUMNS, BLOCKS = (7, 14, 28), (1, 2, 4)  # of a register tile: pixels of a row, vectors of channels
FEWEST, MOST = 12, 28  # vectors of results


class Convolution(NamedTuple):
    """Channels in and out, the side of the result, the side of the filter."""

    inputs: int
    outputs: int
    side: int
    filter: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.inputs * self.outputs * self.side**2 * self.filter**2


RESNET50 = [
    Convolution(64, 64, 56, 3),
    Convolution(128, 128, 28, 3),
    Convolution(256, 256, 14, 3),
    Convolution(512, 512, 7, 3),
    Convolution(64, 256, 56, 1),
    Convolution(128, 512, 28, 1),
    Convolution(256, 1024, 14, 1),
    Convolution(1024, 256, 14, 1),
    Convolution(512, 2048, 7, 1),
]


def main() -> None:
    """Time every convolution in both layouts, print a line for each, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    command.add_argument("--rounds", type=int, default=3, help="turns of each candidate")
    command.add_argument("--seconds", type=float, default=0.05, help="of each turn")
    args = command.parse_args()
    about, rows = environment(), []
    target = host_target(args.threads)
    cores = CoreThread(args.threads)
    reference, _ = onnxruntime_timer(matmul(), matrices(), args.threads)
    for convolution in RESNET50:
        rows.append(measure(convolution, target, cores, reference, args))
        print(line(rows[-1]), flush=True)
    cores.stop()
    write_results(args.results, about, {"threads": args.threads, "convolutions": rows})
    print(f"written to {args.results}")


def measure(
    convolution: Convolution,
    target: tvm.target.Target,
    cores: CoreThread,
    reference: Timer,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The rate of the best candidate of each kind, in FLOP/s; which it was; and the yardstick's."""
    timers: dict[str, Timer] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, module in candidates(convolution, target):
            path = Path(scratch) / f"{len(timers)}.so"
            tvm.compile(module, target=target).export_library(str(path))
            timers[name] = timer(path, module, cores)
    timers["matmul"] = reference
    samples = take_turns(timers, args.rounds, args.seconds, PAUSE_S)
    medians = {name: statistics.median(found) for name, found in samples.items()}
    rate = 2 * SIDE**3 / medians.pop("matmul")
    best = {}
    for kind in ("plain", "blocked", "reduced"):
        name = min((name for name in medians if name.split()[0] == kind), key=medians.__getitem__)
        best[kind] = {"candidate": name, "flops_per_s": convolution.flops / medians[name]}
    return {
        "convolution": convolution._asdict(),
        "best": best,
        "ms": {name: 1e3 * median for name, median in medians.items()},
        "matmul_flops_per_s": rate,
    }


def candidates(
    convolution: Convolution, target: tvm.target.Target
) -> Iterator[tuple[str, tvm.IRModule]]:
    """Scheduled kernels, each named by its kind first; all take the weights packed already."""
    plain = tvm.IRModule({"main": nchw(convolution).with_attr(LAYOUT_FREE, [1])})
    for number, schedule in enumerate(baseline_schedules(plain, target)):
        yield f"plain {number}", without_packing(schedule.mod)
    lanes = machine_of(target).lanes
    kernel = tvm.IRModule({"main": blocked(convolution, lanes)})
    for columns, blocks in itertools.product(COLUMNS, BLOCKS):
        fits = convolution.side % columns == 0 and convolution.outputs % (blocks * lanes) == 0
        if fits and FEWEST <= columns * blocks <= MOST:
            for kind in ("blocked", "reduced"):
                schedule = tiled(kernel, columns, blocks, by_block=kind == "reduced")
                yield f"{kind} {columns} pixels x {blocks} vectors", schedule.mod


def nchw(convolution: Convolution) -> tvm.tirx.PrimFunc:
    """The convolution with channels before rows and columns."""
    inputs, outputs, side, size = convolution
    x = te.placeholder((1, inputs, side + size - 1, side + size - 1), name="x")
    w = te.placeholder((outputs, inputs, size, size), name="w")
    c, dy, dx = (te.reduce_axis((0, n), m) for n, m in ((inputs, "c"), (size, "dy"), (size, "dx")))
    total = te.compute(
        (1, outputs, side, side),
        lambda n, f, y, z: te.sum(x[n, c, y + dy, z + dx] * w[f, c, dy, dx], axis=[c, dy, dx]),
        name="convolution",
    )
    return te.create_prim_func([x, w, topi.nn.relu(total)]).with_attr("global_symbol", "main")


def blocked(convolution: Convolution, lanes: int) -> tvm.tirx.PrimFunc:
    """The convolution with blocks of channels last."""
    inputs, outputs, side, size = convolution
    x = te.placeholder((inputs // lanes, side + size - 1, side + size - 1, lanes), name="x")
    w = te.placeholder((outputs // lanes, inputs // lanes, size, size, lanes, lanes), name="w")
    extents = ((inputs // lanes, "block"), (size, "dy"), (size, "dx"), (lanes, "c"))
    block, dy, dx, c = axes = [te.reduce_axis((0, extent), name) for extent, name in extents]
    result = te.compute(
        (outputs // lanes, side, side, lanes),
        lambda f, y, z, v: te.sum(
            x[block, y + dy, z + dx, c] * w[f, block, dy, dx, c, v], axis=axes
        ),
        name="convolution",
    )
    return te.create_prim_func([x, w, result]).with_attr("global_symbol", "main")


def tiled(kernel: tvm.IRModule, columns: int, blocks: int, by_block: bool) -> Schedule:
    """A register tile of `columns` pixels by `blocks` vectors, the image's blocks in parallel."""
    schedule = Schedule(kernel)
    body = schedule.get_sblock("convolution")
    outputs, row, column, lane, inputs, *terms = schedule.get_loops(body)
    outer, vectors = schedule.split(outputs, [None, blocks])
    first, pixels = schedule.split(column, [None, columns])
    if by_block:
        schedule.reorder(outer, inputs, row, first, *terms, vectors, pixels, lane)
        schedule.parallel(outer)
    else:
        copy = schedule.cache_write(body, 0, "local")  # the results stay in registers until then
        schedule.reorder(outer, row, first, inputs, *terms, vectors, pixels, lane)
        schedule.parallel(schedule.fuse(outer, row))
        schedule.reverse_compute_at(copy, first)
    schedule.vectorize(lane)
    for loop in (vectors, pixels):
        schedule.unroll(loop)
    start = schedule.decompose_reduction(body, inputs)
    for part in (start,) if by_block else (start, copy):
        *others, last = schedule.get_loops(part)
        schedule.vectorize(last)
        for loop in others[-2:]:
            schedule.unroll(loop)
    return schedule


def timer(path: Path, module: tvm.IRModule, cores: CoreThread) -> Timer:
    """A kernel's timer on the cores that all kernels share."""
    random = np.random.default_rng(0)
    shapes = [[int(extent) for extent in buffer.shape] for buffer in module["main"].params]
    tensors = [tvm.runtime.tensor(random.random(shape, dtype=np.float32)) for shape in shapes]
    kernel = tvm.runtime.load_module(str(path))

    def sample(seconds: float) -> list[float]:
        evaluator = kernel.time_evaluator("main", tvm.cpu(), number=1, repeat=1)
        once = max(evaluator(*tensors).results[0], 1e-6)
        repeat = max(2, int(seconds / once))
        found = kernel.time_evaluator("main", tvm.cpu(), number=1, repeat=repeat)(*tensors).results
        return [float(value) for value in found]

    return lambda seconds: cores.run(lambda: sample(seconds))


def line(row: dict[str, Any]) -> str:
    """One convolution's figures as text."""
    inputs, outputs, side, size = row["convolution"].values()
    rates = ", ".join(
        f"{kind} {found['flops_per_s'] / 1e9:.0f} ({found['candidate'].partition(' ')[2]})"
        for kind, found in row["best"].items()
    )
    shape = f"{inputs} -> {outputs}, {side}x{side}, {size}x{size}"
    return f"{shape}: GFLOP/s {rates}; matrices {row['matmul_flops_per_s'] / 1e9:.0f}"


if __name__ == "__main__":
    main()
