"""Seconds from the command to the first measurement, of this tree and of others, in turns.

    python -m benchmarks.first_measurement MODEL.onnx ... --side before=/path/of/another/checkout
    python -m benchmarks.first_measurement rec.onnx --input rec=x:1x3x48x320

Each run has an empty record store; it is ended when it prints that the baseline schedules are measured.
Until then the model has been imported, its schedules drafted, and a library of them compared with the
original file. Another checkout is run with this environment's Python. Results go to
benchmarks/results/first-measurement.json.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.environment import RESULTS, ROOT, environment, write_results
from benchmarks.real_models import FIRST
from benchmarks.scaffold import parser

RESULTS_FILE = RESULTS / "first-measurement.json"
PAUSE_S = 1.0


def main() -> None:
    """Time every model on every side, in turns; print a table; write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("models", nargs="+", type=Path)
    command.add_argument("--side", action="append", default=[], metavar="NAME=FOLDER")
    command.add_argument("--input", action="append", default=[], metavar="MODEL=NAME:SHAPE")
    command.add_argument("--rounds", type=int, default=2)
    args = command.parse_args()
    sides = {"here": ROOT, **{name: Path(at) for name, at in map(_pair, args.side)}}
    inputs: dict[str, list[str]] = {}
    for model, given in map(_pair, args.input):
        inputs.setdefault(model, []).extend(["--input", given])
    about, rows = environment(), []
    for model in args.models:
        seconds: dict[str, list[float | None]] = {name: [] for name in sides}
        for number in range(args.rounds):
            for name in list(sides)[:: -1 if number % 2 else 1]:
                seconds[name].append(one_run(sides[name], model, inputs.get(model.stem, [])))
        rows.append({"model": model.stem, "seconds": seconds})
        told = {
            name: [each and round(each, 1) for each in taken] for name, taken in seconds.items()
        }
        ratios = {name: ratio(seconds["here"], taken) for name, taken in seconds.items()}
        print(f"{model.stem:24} {told}  {ratios}", flush=True)
        write_results(args.results, about, {"sides": list(sides), "rows": rows})


def one_run(checkout: Path, model: Path, inputs: list[str]) -> float | None:
    """Seconds until the line; None where the run ended before it."""
    with tempfile.TemporaryDirectory(prefix="first-") as folder:
        flags = ["--target", "llvm", "--effort", "quick", "--trials", "1", *inputs]
        places = ["--db", f"{folder}/db", "-o", f"{folder}/out"]
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, str(checkout / "cli.py"), str(model.absolute()), *flags, *places],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "TMPDIR": folder},
        )
        assert process.stderr is not None
        reached = any(FIRST in line for line in process.stderr)
        taken = time.monotonic() - begun
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(PAUSE_S)
        return taken if reached else None


def ratio(here: list[float | None], there: list[float | None]) -> float | None:
    """This tree's median over another's; None where one has none."""
    known = [[each for each in side if each is not None] for side in (here, there)]
    if not all(known):
        return None
    return round(statistics.median(known[0]) / statistics.median(known[1]), 2)


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


if __name__ == "__main__":
    main()
