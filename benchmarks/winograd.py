"""3x3 convolutions in Winograd's form against direct ones, kernel by kernel, on this machine's cores.

    python -m benchmarks.winograd resnet18.onnx yolov8n.onnx

Every convolution of the models that could be transformed, whether the importer would do so or not
(`model/winograd.py`), with all that is fused to it: the fastest of three baseline schedules each way,
in turns, and how far Winograd's is from the direct kernel computed without schedule. The figures go to
benchmarks/results/winograd.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from benchmarks.environment import RESULTS, environment, write_results
from benchmarks.scaffold import Timer, host_target, parser, sampled, take_turns
from gpu_aware_tune.finalize.kernel_check import difference
from gpu_aware_tune.kernels.packing import without_packing
from gpu_aware_tune.kernels.schedules import baseline_schedules
from gpu_aware_tune.kernels.schedules.cpu import machine_of
from gpu_aware_tune.kernels.winograd import Convolution, convolution_of, transformed, with_winograd
from gpu_aware_tune.model import winograd
from gpu_aware_tune.model.importer import load_model

RESULTS_FILE = RESULTS / "winograd.json"
DIRECT, TRANSFORMED = "direct", "winograd"


def main() -> None:
    """Time every kernel, print a line for each, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("models", nargs="+", type=Path)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--rounds", type=int, default=15)
    command.add_argument("--seconds", type=float, default=0.02, help="of each turn")
    args = command.parse_args()
    target = host_target(args.threads)
    rows: list[dict[str, Any]] = []
    for path in args.models:
        for name, kernel, convolution in convolutions(path, target):
            row = {"model": path.stem, "kernel": name}
            row |= measured(kernel, convolution, target, args.rounds, args.seconds)
            rows.append(row)
            print(line(row), flush=True)
            write_results(args.results, environment(), {"threads": args.threads, "kernels": rows})


def convolutions(path: Path, target: Any) -> list[tuple[str, Any, Convolution]]:
    """The direct kernels of a model that could be transformed."""
    pays, winograd.pays = winograd.pays, lambda *_: False
    try:
        model = load_model(path, target)
    finally:
        winograd.pays = pays
    found = []
    for variable, function in model.module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc):
            convolution = convolution_of(function)
            if convolution is not None:
                kernel = function.with_attr("global_symbol", "main")
                found.append((str(variable.name_hint), kernel, convolution))
    return found


def measured(
    kernel: Any, convolution: Convolution, target: Any, rounds: int, seconds: float
) -> dict[str, Any]:
    """Milliseconds of both ways, their ratio, and the error of Winograd's form."""
    generator = np.random.default_rng(0)
    given = [
        generator.standard_normal([int(e) for e in p.shape], dtype=np.float32)
        for p in kernel.params
    ]
    given[convolution.parameter] /= np.float32(np.sqrt(9 * convolution.inputs))
    changed = list(given)
    changed[convolution.parameter] = transformed(given[convolution.parameter])
    plain = tvm.IRModule({"main": kernel})
    unscheduled = [tvm.runtime.tensor(array) for array in given]
    expected = run(tvm.tirx.build(plain, target=target), unscheduled)
    timers: dict[str, Timer] = {}
    error = 0.0
    ways = {DIRECT: (kernel, given), TRANSFORMED: (with_winograd(kernel, convolution), changed)}
    for way, (function, arrays) in ways.items():
        schedules = baseline_schedules(tvm.IRModule({"main": function}), target)
        for number, schedule in enumerate(schedules):
            built = tvm.tirx.build(without_packing(schedule.mod), target=target)
            buffers = [tvm.runtime.tensor(array) for array in arrays]
            if way == TRANSFORMED:
                error = max(error, difference(run(built, buffers), expected))
            timers[f"{way} {number}"] = partial(sampled, partial(built, *buffers))
    samples = take_turns(timers, rounds, seconds)
    best = {
        way: min(statistics.median(s) for name, s in samples.items() if name.startswith(way))
        for way in ways
    }
    batch, _, height, width, _ = (int(extent) for extent in convolution.result.shape)
    return {
        "image": [batch, height, width],
        "channels": [convolution.inputs, convolution.outputs],
        "chosen": winograd.pays(convolution, machine_of(target)),
        "ms": {way: 1e3 * seconds for way, seconds in best.items()},
        "ratio": best[TRANSFORMED] / best[DIRECT],
        "error": error,
    }


def run(built: Callable[..., None], buffers: list[Any]) -> np.ndarray:
    """What a kernel writes to its last buffer."""
    built(*buffers)
    return np.asarray(buffers[-1].numpy())


def line(row: dict[str, Any]) -> str:
    """One kernel for people."""
    batch, height, width = row["image"]
    inputs, outputs = row["channels"]
    ms = row["ms"]
    return (
        f"{row['model']:14} {batch}x{height}x{width} {inputs:4} -> {outputs:4}  direct {ms[DIRECT]:7.3f} ms"
        f"  winograd {ms[TRANSFORMED]:7.3f}  ratio {row['ratio']:.2f}  error {row['error']:.0e}"
        f"  {'chosen' if row['chosen'] else 'left direct'}"
    )


if __name__ == "__main__":
    main()
