"""Latency on CPU cores against what users would take instead: ONNX Runtime, and OpenVINO if it is there.

    python -m benchmarks.peers_cpu                               # the light models, 2 threads
    python -m benchmarks.peers_cpu bert.onnx yolo.onnx --threads 1
    python -m benchmarks.peers_cpu bert.onnx --tune 600          # tunes each for so many seconds first
    python -m benchmarks.peers_cpu bert.onnx --tuned bert=bert.tuned
    python -m benchmarks.peers_cpu bert.onnx --busy 1            # beside a busy process on each core

untuned    ours with the baseline schedules, nothing searched
tuned      a library of ours, from --tuned or --tune
ort        ONNX Runtime on the file as it is
openvino   OpenVINO in float32, where `pip install openvino` has been done

Each has a process of its own, with as many threads, all on the same cores. They take turns, with a
pause between, because the waiting threads of one would take cores from the next. A ratio is that of
the medians of one round; the table has the median over the rounds and how far they spread. Outputs
are compared with ONNX Runtime's. Beside the time that passed, the processor time of each is compared:
with one thread it hardly changes beside busy neighbours; with several it includes waiting. With --busy
each round is measured twice, alone and beside processes that loop on the same cores; a growth is the
second median over the first. The figures go to benchmarks/results/peers-cpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, ROOT, environment, stamp, version, write_results
from benchmarks.light_models import light_models, write_seeded
from benchmarks.model_latency import compiled, onnxruntime_timer, summary
from benchmarks.scaffold import FLAG, Timer, die_with_parent, parser, sampled, tell, told

RESULTS_FILE = RESULTS / "peers-cpu.json"
MODULE = "benchmarks.peers_cpu"
OURS, PEERS = ("untuned", "tuned"), ("ort", "openvino")
PAUSE_S = 0.3  # for threads that wait for more work

Inputs = dict[str, np.ndarray]
Turn = dict[str, list[float]]  # a figure of each contestant's inferences in one round


def main() -> None:
    """Measure every model that is asked for, print a table, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("models", nargs="*", help="ONNX files or light models [default: light]")
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--rounds", type=int, default=7, help="turns of each")
    command.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    command.add_argument("--tuned", action="append", default=[], metavar="NAME=FOLDER")
    command.add_argument("--tune", type=float, metavar="SECONDS", help="tune without --tuned")
    command.add_argument("--busy", type=int, default=0, help="busy processes on each core")
    command.add_argument("--shape", action="append", default=[], metavar="INPUT=1,3,224,224")
    command.add_argument(FLAG, help=argparse.SUPPRESS)
    args = command.parse_args()
    if args.cell is not None:
        serve(**json.loads(args.cell))
        return
    about = {**environment(), "openvino": version("openvino")}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for given in args.models or light_models():
            is_light = given in light_models()
            path = write_seeded(given, scratch) if is_light else Path(given).resolve()
            try:
                row = measure(path, args, scratch)
            except ContestantFailed as error:
                row = {"error": str(error)}
            rows[path.stem] = {**row, "measured": stamp(about), "load": os.getloadavg()[0]}
            print(line(path.stem, rows[path.stem]), flush=True)
            write_results(args.results, about, {"threads": args.threads, "models": rows})
    for pair, value in means(rows).items():
        in_cpu = means(rows, "cpu_ratios")[pair]
        print(f"geometric mean of {pair}: {value:.3f}, of their processor time {in_cpu:.3f}")
    print(f"written to {args.results}")


class ContestantFailed(Exception):
    """A contestant's process ended; with the last line that it wrote."""


class Contestant:
    """A process that runs one model in one way whenever it is asked to."""

    def __init__(self, cell: Mapping[str, Any], log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, FLAG, json.dumps(cell)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
            )
        self._answer()  # once it is loaded

    def run(self, seconds: float) -> tuple[list[float], float]:
        """Run for so long; seconds of each inference, and processor seconds of one."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        answer = self._answer()
        return list(answer["seconds"]), float(answer["cpu_s"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if (found := told(text)) is not None:
                return found
        lines = [text for text in self._log.read_text().splitlines() if text.strip()]
        raise ContestantFailed(lines[-1] if lines else f"exit code {self._process.wait()}")


def measure(path: Path, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Milliseconds of one inference for each contestant, ratios by rounds, and errors."""
    folders = dict(pair.split("=", 1) for pair in args.tuned)
    folder = folders.get(path.stem)
    if folder is None and args.tune:
        folder = str(tuned(path, args, scratch))
    kinds = ["untuned", *(["tuned"] if folder else []), "ort"]
    kinds += ["openvino"] if importlib.util.find_spec("openvino") else []
    running: dict[str, Contestant] = {}
    try:
        for kind in kinds:
            cell = {"kind": kind, "path": str(path), "threads": args.threads, "folder": folder,
                    "shapes": shapes(args.shape), "scratch": str(scratch)}  # fmt: skip
            running[kind] = Contestant(cell, scratch / f"{kind}.log")
        rounds: list[Turn] = []
        cpu: list[Turn] = []
        beside: list[Turn] = []
        for _ in range(args.rounds):
            samples, seconds = one_round(running, args.seconds)
            rounds.append(samples)
            cpu.append(seconds)
            if args.busy:
                with busy(args.busy, args.threads):
                    beside.append(one_round(running, args.seconds)[0])
    finally:
        for contestant in running.values():
            contestant.close()
    return {
        "ms": {kind: summary([s for turn in rounds for s in turn[kind]]) for kind in kinds},
        "ratios": ratios(rounds),
        "cpu_ms": {kind: 1e3 * statistics.median(turn[kind][0] for turn in cpu) for kind in kinds},
        "cpu_ratios": ratios(cpu),
        "errors": errors(kinds, scratch),
        **(growths(rounds, beside, kinds) if beside else {}),
    }


def one_round(running: Mapping[str, Contestant], seconds: float) -> tuple[Turn, Turn]:
    """Each contestant's seconds of an inference, all but the first, and its processor seconds."""
    samples: Turn = {}
    cpu: Turn = {}
    for kind, contestant in running.items():
        time.sleep(PAUSE_S)
        found, cpu_s = contestant.run(seconds)
        samples[kind] = found[1:] or found
        cpu[kind] = [cpu_s]
    return samples, cpu


@contextlib.contextmanager
def busy(each: int, cores: int) -> Iterator[None]:
    """Processes that loop on the first cores, so many on each."""
    processes = []
    try:
        for core in sorted(os.sched_getaffinity(0))[:cores] * each:
            loop = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
            processes.append(subprocess.Popen([sys.executable, "-c", loop]))
        time.sleep(PAUSE_S)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def growths(rounds: Sequence[Turn], beside: Sequence[Turn], kinds: Sequence[str]) -> dict[str, Any]:
    """How much longer each contestant takes beside busy processes, by round."""
    grown = {
        kind: [
            statistics.median(there[kind]) / statistics.median(alone[kind])
            for alone, there in zip(rounds, beside, strict=True)
        ]
        for kind in kinds
    }
    return {
        "busy_ms": {kind: summary([s for turn in beside for s in turn[kind]]) for kind in kinds},
        "busy_ratios": ratios(beside),
        "growth": {kind: spread(values) for kind, values in grown.items()},
    }


def shapes(given: Sequence[str]) -> dict[str, list[int]]:
    """Shapes of inputs with dynamic dimensions, from the command line."""
    parts = (text.split("=", 1) for text in given)
    return {name: [int(extent) for extent in extents.split(",")] for name, extents in parts}


def tuned(path: Path, args: argparse.Namespace, scratch: Path) -> Path:
    """Tune a model for the cores that are measured."""
    percent = max(1, round(100 * args.threads / len(os.sched_getaffinity(0))))
    folder = scratch / f"{path.stem}.tuned"
    command = [sys.executable, "cli.py", str(path), "--target", "llvm", "--gpu-pct", str(percent)]
    command += ["--time", str(args.tune), "--db", str(scratch / "records"), "-o", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return folder


def ratios(rounds: Sequence[Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Ours over each peer, and over the better one of each round: median and spread over rounds."""
    found: dict[str, list[float]] = {}
    for turn in rounds:
        medians = {kind: statistics.median(samples) for kind, samples in turn.items()}
        peers = {kind: medians[kind] for kind in PEERS if kind in medians}
        for ours in (kind for kind in OURS if kind in medians):
            for peer, seconds in {**peers, "best": min(peers.values())}.items():
                found.setdefault(f"{ours}/{peer}", []).append(medians[ours] / seconds)
    return {pair: spread(values) for pair, values in found.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, and the percentiles around it."""
    return {
        "median": statistics.median(values),
        "p10": float(np.percentile(values, 10)),
        "p90": float(np.percentile(values, 90)),
    }


def errors(kinds: Sequence[str], scratch: Path) -> dict[str, float]:
    """How far each contestant's outputs are from ONNX Runtime's."""
    from gpu_aware_tune.finalize.kernel_check import difference

    outputs = {kind: list(np.load(scratch / f"{kind}.npz").values()) for kind in kinds}
    return {
        kind: max(difference(g, w) for g, w in zip(got, outputs["ort"], strict=True))
        for kind, got in outputs.items()
        if kind != "ort"
    }


def means(rows: Mapping[str, Any], of: str = "ratios") -> dict[str, float]:
    """The geometric means over the models of the ratios."""
    logs: dict[str, list[float]] = {}
    for row in rows.values():
        for pair, ratio in row.get(of, {}).items():
            logs.setdefault(pair, []).append(math.log(ratio["median"]))
    return {pair: math.exp(statistics.fmean(values)) for pair, values in logs.items()}


def line(name: str, row: dict[str, Any]) -> str:
    """One model's figures as text."""
    if "error" in row:
        return f"{name:20} failed: {row['error']}"
    times = ", ".join(f"{kind} {ms['median']:.2f}" for kind, ms in row["ms"].items())
    factors = ", ".join(
        f"{pair} {r['median']:.2f} ({r['p10']:.2f} to {r['p90']:.2f})"
        for pair, r in row["ratios"].items()
    )
    if "growth" in row:
        grown = ", ".join(f"{kind} {g['median']:.2f}" for kind, g in row["growth"].items())
        factors += f"; growth beside busy processes: {grown}"
    cpu = row["cpu_ratios"]["untuned/best"]["median"]
    worst = max(row["errors"].values())
    return (
        f"{name:20} ms: {times}; {factors}; processor time {cpu:.2f}; error {worst:.0e}; "
        f"load {row['load']:.1f}"
    )


def serve(
    kind: str,
    path: str,
    threads: int,
    folder: str | None,
    shapes: Mapping[str, Sequence[int]],
    scratch: str,
) -> None:
    """In a contestant's process: load the model, keep its outputs, run whenever asked."""
    die_with_parent()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    make: Callable[..., tuple[Timer, list[np.ndarray]]] = {
        "untuned": _untuned,
        "tuned": _tuned,
        "ort": _onnxruntime,
        "openvino": _openvino,
    }[kind]
    fixed = {name: tuple(extents) for name, extents in shapes.items()}
    timer, outputs = make(Path(path), threads, fixed, folder)
    np.savez(Path(scratch) / f"{kind}.npz", *outputs)
    tell({"ready": True})
    for text in sys.stdin:
        begun = time.process_time()
        samples = timer(float(text))
        tell({"seconds": samples, "cpu_s": (time.process_time() - begun) / len(samples)})


def _untuned(
    path: Path, threads: int, fixed: Mapping[str, tuple[int, ...]], _folder: str | None
) -> tuple[Timer, list[np.ndarray]]:

    from benchmarks.scaffold import host_target
    from gpu_aware_tune.library import save_weights
    from gpu_aware_tune.model.importer import load_model, random_inputs

    target = host_target(threads)
    model = load_model(path, target, fixed)
    with tempfile.TemporaryDirectory() as scratch:
        shared = compiled(model, target, "untuned", Path(scratch) / "model.so")
        weights = Path(scratch) / "weights.bin"
        save_weights(model.weights, weights)
        return _program(shared, weights, random_inputs(model.inputs, seed=0), threads)


def _tuned(
    path: Path, threads: int, fixed: Mapping[str, tuple[int, ...]], folder: str | None
) -> tuple[Timer, list[np.ndarray]]:
    assert folder is not None
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    library = next(e for e in manifest["libraries"] if e["units"] == threads)
    weights = Path(folder) / "weights.bin"
    return _program(Path(folder) / library["file"], weights, _inputs(path, fixed), threads)


def _program(
    shared: Path, weights: Path, inputs: Inputs, threads: int
) -> tuple[Timer, list[np.ndarray]]:
    from gpu_aware_tune.library import open_vm
    from gpu_aware_tune.library.threads import CoreThread

    cores = CoreThread(threads)
    program = open_vm(shared, weights)
    outputs = cores.run(lambda: program(program.place(list(inputs.values()))))
    timer = cores.run(lambda: program.timer(inputs))
    return lambda seconds: list(cores.run(lambda: timer(seconds))), outputs


def _inputs(path: Path, fixed: Mapping[str, tuple[int, ...]]) -> Inputs:
    """Random inputs of an ONNX file, the same that its imported model gets."""
    import onnx

    from gpu_aware_tune.model.importer import TensorSpec, random_inputs

    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    specs = []
    for value in graph.input:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = fixed.get(value.name, tuple(dim.dim_value for dim in tensor.shape.dim))
        if value.name not in constants:
            specs.append(TensorSpec(value.name, shape, dtype))
    return random_inputs(specs, seed=0)


def _onnxruntime(
    path: Path, threads: int, fixed: Mapping[str, tuple[int, ...]], _folder: str | None
) -> tuple[Timer, list[np.ndarray]]:
    return onnxruntime_timer(str(path), _inputs(path, fixed), threads)


def _openvino(
    path: Path, threads: int, fixed: Mapping[str, tuple[int, ...]], _folder: str | None
) -> tuple[Timer, list[np.ndarray]]:
    import openvino

    core = openvino.Core()
    read = core.read_model(path)
    inputs = _inputs(path, fixed)
    read.reshape({name: list(array.shape) for name, array in inputs.items()})
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(read, "CPU", options).create_infer_request()
    outputs = [np.array(value) for value in request.infer(inputs).values()]
    return lambda seconds: sampled(lambda: request.infer(inputs), seconds), outputs


if __name__ == "__main__":
    main()
