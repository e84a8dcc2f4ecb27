"""Latency of whole models on this machine's cores: plain, untuned, tuned, ONNX Runtime.

    python -m benchmarks.model_latency                               # a few minutes, tunes nothing
    python -m benchmarks.model_latency --tune --trials 512           # tunes each model first
    python -m benchmarks.model_latency --tuned resnet50=r50.tuned    # takes a library that is there
    python -m benchmarks.model_latency --sides nchw,untuned --models all    # what blocks bring

plain      TVM's build without any schedule
nchw       ours with the baseline schedules, every image in the layout that ONNX gives it
untuned    ours with the baseline schedules, nothing searched
tuned      a library of ours, from --tuned or --tune
ort        ONNX Runtime with as many threads, on the same folded graph

They take turns, in blocks of a fraction of a second with a pause between, because the waiting
threads of one would take cores from the next. Weights are seeded, inputs random. Each result is
compared with ONNX Runtime's. In the same turns ONNX Runtime multiplies two large matrices: a yardstick
of what these cores do, and a model's multiplications and additions at that rate its floor, which
direct convolutions hardly go below. The figures go to benchmarks/results/model-latency.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, ROOT, environment, write_results
from benchmarks.light_models import light_models, write_seeded
from benchmarks.scaffold import Timer, host_target, parser, sampled, take_turns

RESULTS_FILE = RESULTS / "model-latency.json"
SLIM = ROOT.parent / "shared" / "models" / "version-slim-320.onnx"
SLIM_NAME = "slim-320"
SIDES = ("plain", "nchw", "untuned")
SIDE = 1024  # of the matrices
PAUSE_S = 0.3  # TVM's threads wait for more work for half of that


def main() -> None:
    """Measure every model that is asked for, print a table, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--models", default="squeezenet,resnet50,slim-320", help="or all")
    command.add_argument("--sides", default=",".join(SIDES), help="beside tuned and ort")
    command.add_argument("--slim", type=Path, default=SLIM, help="path of version-slim-320.onnx")
    command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    command.add_argument("--rounds", type=int, default=8, help="turns of each")
    command.add_argument("--seconds", type=float, default=0.5, help="of each turn")
    command.add_argument("--tuned", action="append", default=[], metavar="NAME=FOLDER")
    command.add_argument(
        "--tune", action="store_true", help="tune the models without --tuned first"
    )
    command.add_argument("--trials", type=int, default=512)
    command.add_argument("--db", type=Path, help="record store for --tune [default: a fresh one]")
    args = command.parse_args()
    folders = {name: Path(folder) for name, _, folder in (t.partition("=") for t in args.tuned)}
    if unknown := set(args.sides.split(",")) - set(SIDES):
        command.error(f"--sides {', '.join(unknown)}: one of {', '.join(SIDES)}")
    rows = {}
    about = environment()
    with tempfile.TemporaryDirectory() as scratch:
        every = ",".join([*light_models(), SLIM_NAME])
        for name in (every if args.models == "all" else args.models).split(","):
            if name == SLIM_NAME and not args.slim.is_file():
                print(f"{name}: left out, {args.slim} is missing (give --slim)")
                continue
            path = model_file(name, args.slim, Path(scratch))
            if args.tune and name not in folders:
                folders[name] = tuned(path, name, args, Path(scratch))
            rows[name] = measure(name, path, folders.get(name), args, Path(scratch))
            print(line(name, rows[name]), flush=True)
    write_results(args.results, about, {"threads": args.threads, "models": rows})
    print(f"written to {args.results}")


def model_file(name: str, slim: Path, scratch: Path) -> Path:
    """The ONNX file of a model; the light ones get seeded weights."""
    return slim if name == SLIM_NAME else write_seeded(name, scratch)


def tuned(path: Path, name: str, args: argparse.Namespace, scratch: Path) -> Path:
    """Tune a model for all cores that are measured."""
    from gpu_aware_tune import tune

    percent = max(1, round(100 * args.threads / len(os.sched_getaffinity(0))))
    db = args.db or scratch / "records"
    folder = scratch / f"{name}.tuned"
    tune(path, target="llvm", gpu_pct=percent, trials=args.trials, output=folder, db=db)
    return folder


def measure(
    name: str, path: Path, folder: Path | None, args: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Milliseconds of one inference for each contestant, ratios, and errors."""

    from gpu_aware_tune.finalize.kernel_check import difference
    from gpu_aware_tune.library import open_vm, save_weights
    from gpu_aware_tune.library.threads import CoreThread
    from gpu_aware_tune.model.importer import load_model, random_inputs
    from gpu_aware_tune.model.tasks import extract

    target = host_target(args.threads)
    cores = CoreThread(args.threads)
    model = load_model(path, target)
    inputs = random_inputs(model.inputs, seed=0)
    timers: dict[str, Timer] = {}
    outputs: dict[str, list[np.ndarray]] = {}
    as_onnx = load_model(path, target, blocks=False)
    for kind in args.sides.split(","):
        source = model if kind == "untuned" else as_onnx
        shared = compiled(source, target, kind, scratch / f"{name}-{kind}.so")
        weights = scratch / f"{name}-{kind}.weights"
        save_weights(source.weights, weights)
        program = open_vm(shared, weights)
        outputs[kind], timers[kind] = contestant(program, inputs, cores)
    if folder is not None:
        manifest = json.loads((folder / "manifest.json").read_text())
        library = next(e for e in manifest["libraries"] if e["units"] == args.threads)
        program = open_vm(folder / library["file"], folder / "weights.bin")
        outputs["tuned"], timers["tuned"] = contestant(program, inputs, cores)
    timers["ort"], reference = onnxruntime_timer(str(path), inputs, args.threads)
    timers["matmul"], _ = onnxruntime_timer(matmul(), matrices(), args.threads)
    samples = take_turns(timers, args.rounds, args.seconds, PAUSE_S)
    cores.stop()
    rate = 2 * SIDE**3 / statistics.median(samples.pop("matmul"))
    flops = sum(task.flops * task.weight for task in extract(model, target))
    medians = {kind: statistics.median(values) * 1e3 for kind, values in samples.items()}
    return {
        "ms": {kind: summary(values) for kind, values in samples.items()},
        "ratios": ratios(medians),
        "flops": flops,
        "matmul_flops_per_s": rate,
        "floor_ms": 1e3 * flops / rate,
        "errors": {
            kind: max(difference(g, w) for g, w in zip(got, reference, strict=True))
            for kind, got in outputs.items()
        },
    }


def contestant(
    program: Any, inputs: dict[str, np.ndarray], cores: Any
) -> tuple[list[np.ndarray], Timer]:
    """A program's outputs, and its timer on the cores that all of ours share."""
    outputs = cores.run(lambda: program(program.place(list(inputs.values()))))
    timer = cores.run(lambda: program.timer(inputs))
    return outputs, lambda seconds: cores.run(lambda: timer(seconds))


def compiled(model: Any, target: Any, kind: str, path: Path) -> Path:
    """Compile a model without schedules or with the default ones."""
    from gpu_aware_tune.codegen.compile import compile_model

    traces = default_traces(model, target) if kind != "plain" else {}
    compile_model(model, target, traces).export_library(str(path))
    return path


def default_traces(model: Any, target: Any) -> dict[str, str]:
    """A model's baseline schedules, by task."""
    from gpu_aware_tune.kernels.schedules import baseline_schedules
    from gpu_aware_tune.kernels.traces import trace_to_json
    from gpu_aware_tune.model.tasks import extract

    traces = {}
    for task in extract(model, target):
        for schedule in baseline_schedules(task.module, target, most=1):
            traces[task.hash] = trace_to_json(schedule.trace)
    return traces


def matmul() -> bytes:
    """An ONNX model that multiplies two square matrices."""
    from onnx import TensorProto, helper

    a, b, c = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (SIDE, SIDE)) for n in "abc")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "g", [a, b], [c])
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def matrices() -> dict[str, np.ndarray]:
    """Its inputs."""
    rng = np.random.default_rng(0)
    return {name: rng.random((SIDE, SIDE), dtype=np.float32) for name in "ab"}


def onnxruntime_timer(
    model: bytes | str, inputs: dict[str, np.ndarray], threads: int
) -> tuple[Timer, list[np.ndarray]]:
    """ONNX Runtime as a contestant, and its outputs; `model` is a file's content or its path."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    outputs = session.run(names, inputs)
    return lambda seconds: sampled(lambda: session.run(names, inputs), seconds), outputs


def summary(seconds: list[float]) -> dict[str, float]:
    """Median with spread, in milliseconds."""
    ms = np.asarray(seconds) * 1e3
    p10, median, p90 = (float(value) for value in np.percentile(ms, (10, 50, 90)))
    return {"median": median, "p10": p10, "p90": p90, "min": float(ms.min()), "runs": len(ms)}


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """How many times as fast one is as another, by medians."""
    pairs = [
        ("plain", "untuned"),
        ("nchw", "untuned"),
        ("untuned", "tuned"),
        ("untuned", "ort"),
        ("tuned", "ort"),
    ]
    return {
        f"{slow}/{fast}": medians[slow] / medians[fast]
        for slow, fast in pairs
        if slow in medians and fast in medians
    }


def line(name: str, row: dict[str, Any]) -> str:
    """One model's figures as text."""
    times = ", ".join(
        f"{kind} {ms['median']:.2f} ms ({ms['p10']:.2f} to {ms['p90']:.2f})"
        for kind, ms in row["ms"].items()
    )
    factors = ", ".join(f"{pair} {value:.2f}" for pair, value in row["ratios"].items())
    errors = ", ".join(f"{kind} {value:.0e}" for kind, value in row["errors"].items())
    floor = f"floor {row['floor_ms']:.2f} ms ({1e-9 * row['matmul_flops_per_s']:.0f} GFLOP/s)"
    return f"{name}: {times}\n    {factors}; {floor}; errors {errors}"


if __name__ == "__main__":
    main()
