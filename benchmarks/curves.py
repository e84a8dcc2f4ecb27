"""Libraries for several shares: size, load time, switching; and whether two profiles agree.

    python -m benchmarks.curves                                   # about five minutes
    python -m benchmarks.curves --models squeezenet --rounds 2 --seconds 0.1 --switches 200
    python -m benchmarks.curves --slim version-slim-320.onnx      # a model of few weights too

sizes      bytes of a folder with 1, 2 and 4 shares (the baseline schedules for 1 to 4 cores) that
           were compiled together, equal kernels once; of 4 shares with a library each; and of 4
           shares of which no kernel is equal (by adding up)
load       seconds of `load` in a fresh process, TVM's import left out, with and without preload
switching  seconds of `Library.use` once the libraries are open; and calls answered, wrong and
           failed while a thread switches shares all the time
repeat     two runs of `tune profile`: relative difference of each point's latency and throughput

The figures go to benchmarks/results/curves.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, ROOT, environment, write_results
from benchmarks.model_latency import SLIM, SLIM_NAME, default_traces, model_file
from benchmarks.scaffold import host_target, parser

RESULTS_FILE = RESULTS / "curves.json"
SHARES = (1, 2, 4)

# In a process of its own; the model's first call is not part of loading.
LOAD = """
import json, sys, time
from gpu_aware_tune.library import load
folder, units, preload = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
start = time.perf_counter()
load(folder, units, preload=preload)
print(json.dumps(time.perf_counter() - start))
"""


def main() -> None:
    """Measure every model, print a line for each, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--models", default="squeezenet,shufflenet,resnet50")
    command.add_argument("--slim", type=Path, default=SLIM, help="a model of few weights, if there")
    command.add_argument("--repeat-model", default="squeezenet", help="the one profiled twice")
    command.add_argument("--rounds", type=int, default=9, help="of each profile")
    command.add_argument("--seconds", type=float, default=0.5, help="of each slice")
    command.add_argument("--loads", type=int, default=5, help="processes that load each folder")
    command.add_argument("--switches", type=int, default=10_000)
    args = command.parse_args()
    about = environment()
    models: dict[str, Any] = {}
    profiles = None
    with tempfile.TemporaryDirectory() as scratch:
        for name in [*args.models.split(","), *([SLIM_NAME] if args.slim.is_file() else [])]:
            folders = make_folders(name, args.slim, Path(scratch))
            models[name] = {
                "sizes": sizes(folders),
                "load_s": load_times(folders, args.loads),
                "switching": switching(folders["4"], args.switches),
            }
            print(f"{name}: {json.dumps(models[name])}", flush=True)
            if name == args.repeat_model:
                profiles = repeat(folders["4"], args.rounds, args.seconds)
                print(f"two profiles of {name}: {json.dumps(profiles['difference'])}", flush=True)
    facts = {"rounds": args.rounds, "seconds": args.seconds, "models": models, "repeat": profiles}
    write_results(args.results, about, facts)
    print(f"written to {args.results}")


def make_folders(name: str, slim: Path, scratch: Path) -> dict[str, Path]:
    """Export a model with 1, 2 and 4 shares in one library, and with 4 in libraries of their own."""

    from gpu_aware_tune.codegen.compile import compile_model, compile_shares
    from gpu_aware_tune.library import RunFacts, export, link
    from gpu_aware_tune.model.importer import load_model

    path = model_file(name, slim, scratch)
    targets = {units: host_target(units) for units in range(1, max(SHARES) + 1)}
    model = load_model(path, targets[1])
    shares = {units: (target, default_traces(model, target)) for units, target in targets.items()}
    facts = RunFacts(device=f"llvm/benchmark/{targets[1].attrs['mcpu']}")
    folders = {}
    for count in SHARES:
        made = {units: shares[units] for units in range(1, count + 1)}
        link(compile_shares(model.module, made), scratch / f"{name}-{count}.so")
        paths = dict.fromkeys(made, scratch / f"{name}-{count}.so")
        folder = scratch / f"{name}-{count}.tuned"
        folders[str(count)] = export(folder, model, paths, facts, entry="main_{units}")
    paths = {units: scratch / f"{name}-apart-{units}.so" for units in shares}
    for units, (target, traces) in shares.items():
        link(compile_model(model, target, traces), paths[units])
    folders["4 apart"] = export(scratch / f"{name}-apart.tuned", model, paths, facts)
    return folders


def sizes(folders: dict[str, Path]) -> dict[str, Any]:
    """Bytes of each folder, against the one with one share."""
    total = {
        name: sum(path.stat().st_size for path in folder.iterdir())
        for name, folder in folders.items()
    }
    code = sum(path.stat().st_size for path in folders["1"].glob("*.so"))
    total["4 without an equal kernel"] = total["1"] + 3 * code
    return {
        "bytes": total,
        "files": {name: len(list(folder.glob("*.so"))) for name, folder in folders.items()},
        "weights_bytes": (folders["1"] / "weights.bin").stat().st_size,
        "ratio": {name: round(size / total["1"], 4) for name, size in total.items()},
    }


def load_times(folders: dict[str, Path], times: int) -> dict[str, dict[str, float]]:
    """Median seconds of loading each folder; the folders take turns."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"load": [], "preload": []} for name in folders
    }
    for _ in range(times):
        for name, folder in folders.items():
            for kind, samples in found[name].items():
                command = [sys.executable, "-c", LOAD, str(folder), "1", str(int(kind != "load"))]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                samples.append(float(json.loads(done.stdout.splitlines()[-1])))
    return {
        name: {kind: statistics.median(samples) for kind, samples in kinds.items()}
        for name, kinds in found.items()
    }


def switching(folder: Path, switches: int) -> dict[str, Any]:
    """Seconds of `use` between open libraries, and what callers see meanwhile."""
    from gpu_aware_tune.library import load
    from gpu_aware_tune.model.importer import random_inputs

    library = load(folder, units=1, preload=True)
    known = (1, 2)
    inputs = random_inputs(library.inputs, 0)
    wanted = {}
    for units in known:
        wanted[units] = list(library.use(units)(inputs).values())
    quiet = timed_switches(library, known, switches)
    stop, counts = threading.Event(), {"answered": 0, "wrong": 0, "failed": 0}

    def call() -> None:
        while not stop.is_set():
            try:
                outputs = list(library(inputs).values())
            except Exception:
                counts["failed"] += 1
                continue
            counts["answered"] += 1
            counts["wrong"] += not any(same(outputs, right) for right in wanted.values())

    caller = threading.Thread(target=call)
    caller.start()
    busy = timed_switches(library, known, max(200, switches // 20), pause_s=0.002)
    stop.set()
    caller.join()
    library.close()
    return {"quiet": quiet, "under_load": busy, "calls": counts}


def same(outputs: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> bool:
    """Whether all outputs are equal bit by bit."""
    return all(np.array_equal(a, b) for a, b in zip(outputs, right, strict=True))


def timed_switches(
    library: Any, known: Sequence[int], times: int, pause_s: float = 0.0
) -> dict[str, float]:
    """Microseconds of `use`, going through the shares in turn."""
    samples = []
    for number in range(times):
        units = known[number % len(known)]
        start = time.perf_counter()
        library.use(units)
        samples.append((time.perf_counter() - start) * 1e6)
        if pause_s:
            time.sleep(pause_s)
    median, p99 = (float(value) for value in np.percentile(samples, (50, 99)))
    return {"median_us": median, "p99_us": p99, "max_us": max(samples), "n": times}


def repeat(folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Two profiles of every core there is, and how far they are apart."""
    from gpu_aware_tune import profile
    from gpu_aware_tune.partition import usable_cores

    units = range(1, len(usable_cores()) + 1)
    curves = [profile(folder, units, seconds=seconds, rounds=rounds) for _ in range(2)]
    differences = {
        what: [
            abs(getattr(a, what) - getattr(b, what)) / getattr(a, what)
            for a, b in zip(curves[0].points, curves[1].points, strict=True)
        ]
        for what in ("latency_ms", "throughput_per_s")
    }
    return {
        "difference": {
            what: {"median": statistics.median(values), "max": max(values)}
            for what, values in differences.items()
        },
        "curves": [curve.as_dict() for curve in curves],
    }


if __name__ == "__main__":
    main()
