"""Several batch sizes in one folder: what they cost to tune, to store and to load, and what they bring.

    python -m benchmarks.batch_sizes MODEL.onnx                # its first dimension must be dynamic
    python -m benchmarks.batch_sizes MODEL.onnx --sizes 1,4 --trials 64

The model is tuned for the smallest size alone and for all sizes, each with a record store of its own.
Told are the seconds of the whole command, and of its search: what passes between the line that the
search begins and the end of measuring the best again, which is what more batch sizes are to share.
Then inferences a second through `library(...)` and through ONNX Runtime, in turns, each in a process
of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, environment, write_results
from benchmarks.scaffold import FLAG, parser, tell, told

RESULTS_FILE = RESULTS / "batch-sizes.json"
MODULE = "benchmarks.batch_sizes"
ROWS = (1, 2, 3, 4, 8, 11, 16)
BEGINS, ENDS = "measuring the baseline schedules", "compiling and timing"


def main() -> None:
    """Tune both ways, time both sides, print a table, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("model", type=Path)
    command.add_argument("--sizes", default="1,2,4,8")
    command.add_argument("--trials", type=int, default=64)
    command.add_argument("--effort", default="quick")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument(FLAG, help=argparse.SUPPRESS)
    args = command.parse_args()
    if args.cell is not None:
        tell(inferences(**json.loads(args.cell)))
        return
    first = args.sizes.split(",")[0]
    with tempfile.TemporaryDirectory(prefix="batch-sizes-") as name:
        folder = Path(name)
        one = tuned(args, first, folder / "one")
        several = tuned(args, args.sizes, folder / "several")
        for key in ("search_s", "whole_s", "bytes", "load_s"):
            ratio = several[key] / one[key]
            print(f"{key:10} {one[key]:12.4g} {several[key]:12.4g}   {ratio:.2f}x")
        rates = turns(args.model, folder / "several", args.rounds)
    print("rows       " + "".join(f"{rows:>8}" for rows in ROWS))
    for side, by_rows in rates.items():
        medians = (statistics.median(by_rows[rows]) for rows in ROWS)
        print(f"{side:11}" + "".join(f"{rate:8.0f}" for rate in medians))
    facts = {"sizes": args.sizes, "trials": args.trials, "effort": args.effort}
    write_results(
        args.results, environment(), {**facts, "one": one, "several": several, "rates": rates}
    )


def tuned(args: argparse.Namespace, sizes: str, folder: Path) -> dict[str, Any]:
    """Run the command; its seconds, those of its search, the folder's size and time to load."""
    output = folder / "model.tuned"
    command = [
        sys.executable, "-m", "gpu_aware_tune", str(args.model.resolve()), "--target", "llvm",
        "--batch", sizes, "--trials", str(args.trials), "--effort", args.effort,
        "--db", str(folder / "db"), "-o", str(output),
    ]  # fmt: skip
    begun = time.monotonic()
    search_s, since = 0.0, None
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(BEGINS):
            since = time.monotonic()
        elif line.startswith(ENDS) and since is not None:
            search_s, since = search_s + time.monotonic() - since, None
    if process.wait():
        raise SystemExit(f"tuning for {sizes} ended with {process.returncode}")
    whole_s = time.monotonic() - begun
    size = sum(f.stat().st_size for f in {f.stat().st_ino: f for f in files(output)}.values())
    return {"search_s": search_s, "whole_s": whole_s, "bytes": size, "load_s": load_s(output)}


def files(folder: Path) -> list[Path]:
    """Every file of a folder and of those inside it."""
    return [path for path in folder.rglob("*") if path.is_file()]


def load_s(folder: Path) -> float:
    """Seconds to load a folder, the median of several processes' own."""
    program = (
        "import sys, time; from gpu_aware_tune import load; load(sys.argv[1]).close()\n"
        "begun = time.perf_counter(); load(sys.argv[1]); print(time.perf_counter() - begun)"
    )
    command = [sys.executable, "-c", program, str(folder)]
    found = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    return statistics.median(found)


def turns(model: Path, folder: Path, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Inferences a second of both sides, by rows, one measurement a round."""
    subject = {"ours": str(folder / "model.tuned"), "ort": str(model.resolve())}
    rates: dict[str, dict[int, list[float]]] = {side: {n: [] for n in ROWS} for side in subject}
    for number in range(rounds):
        for side in subject if number % 2 == 0 else reversed(subject):
            cell = json.dumps({"side": side, "path": subject[side]})
            command = [sys.executable, "-m", MODULE, str(model), FLAG, cell]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            answer = told(done.stdout)
            if answer is None:
                raise SystemExit(f"{side} said nothing: {done.stderr[-300:]}")
            for rows, rate in answer["rates"].items():
                rates[side][int(rows)].append(rate)
    return rates


def inferences(side: str, path: str) -> dict[str, Any]:
    """In a process of its own: inferences a second for each number of rows."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    if side == "ours":
        from gpu_aware_tune import load

        library = load(path, preload=True)
        (spec,) = library.inputs
        name, shape = spec.name, spec.shape[1:]

        def run(x: Any) -> Any:
            return library({name: x})
    else:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (info,) = session.get_inputs()
        shape = tuple(info.shape[1:])

        def run(x: Any) -> Any:
            return session.run(None, {info.name: x})

    found = {}
    for rows in ROWS:
        x = np.random.default_rng(0).standard_normal((rows, *shape)).astype("float32")
        run(x)
        seconds = []
        until = time.perf_counter() + 1.0
        while time.perf_counter() < until:
            begun = time.perf_counter()
            run(x)
            seconds.append(time.perf_counter() - begun)
        found[str(rows)] = rows / statistics.median(seconds)
    return {"rates": found}


if __name__ == "__main__":
    main()
