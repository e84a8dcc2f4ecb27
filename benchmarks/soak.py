"""Long use of a tuned model: do memory, threads and descriptors stay as they are?

    python -m benchmarks.soak                       # about ten minutes
    python -m benchmarks.soak --calls 1000 --cycles 20 --model MODEL.onnx

Each in a process of its own, on a folder with code for one core and for two:

    calls       100,000 calls of one library; every hundredth changes the share, and is compared
    cycles      1,000 times load, call, close
    threads     64 threads that call one library at once
    processes   20 processes that load and call at once

At ten moments, evenly spaced, the resident memory, the threads and the open descriptors of the process
are written down; the first of them is after a tenth of the work, when all that is made once has been made.
What is compared must be the first answer on that share, bit by bit. Results go to
benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.environment import RESULTS, ROOT, environment, write_results
from benchmarks.light_models import write_seeded
from benchmarks.scaffold import FLAG, answer, asked, parser, run_apart

RESULTS_FILE = RESULTS / "soak.json"
MODULE = "benchmarks.soak"
MOMENTS = 10
# From the first three moments to the last three: what allocators keep, not what is lost.
GROWTH_MB = 8.0
LIMIT_S = 600.0


def main() -> None:
    """Make the folder, run each kind of use, say what grew, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--model", type=Path, help="an ONNX file (default: a light model)")
    command.add_argument("--calls", type=int, default=100_000)
    command.add_argument("--cycles", type=int, default=1000)
    command.add_argument("--threads", type=int, default=64)
    command.add_argument("--processes", type=int, default=20)
    command.add_argument(FLAG, help=argparse.SUPPRESS)
    args = command.parse_args()
    if args.cell is not None:
        answer(args.cell, run_cell)
        return
    about = environment()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        path = args.model or write_seeded("shufflenet", folder)
        output = folder / "model.tuned"
        command_line = [
            "-m", "gpu_aware_tune", str(path), "--target", "llvm", "--gpu-pct", "50,100", "-q",
            "--trials", "8", "--db", str(folder / "db"), "-o", str(output),
        ]  # fmt: skip
        _, why = asked(command_line, LIMIT_S)
        if why:
            raise SystemExit(f"tuning failed: {why}")
        found = {}
        for kind in KINDS:
            begun = time.monotonic()
            cell = {"kind": kind, "folder": str(output), "count": getattr(args, kind)}
            found[kind] = run_apart(MODULE, cell) | {"seconds": round(time.monotonic() - begun, 1)}
            print(f"{kind:10} {json.dumps(found[kind])}", flush=True)
            write_results(args.results, about, {"model": path.name, **found})
    bad = [kind for kind, facts in found.items() if not facts["ok"]]
    if bad:
        raise SystemExit(f"FAILED: {', '.join(bad)}")


# -- in the process of a cell ----------------------------------------------------------------------


def run_cell(kind: str, folder: str, count: int) -> dict[str, Any]:
    """Run one kind of use so many times; what the process held at each moment, and whether it is flat."""
    use = KINDS[kind]
    wrong, moments = 0, []
    every = max(count // MOMENTS, 1)
    for number, is_right in enumerate(use(folder, count), 1):
        wrong += not is_right
        if number % every == 0:
            moments.append(held())
    early, late = (
        median([moment["mb"] for moment in part]) for part in (moments[:3], moments[-3:])
    )
    same = all(moments[-1][name] <= moments[0][name] for name in ("threads", "descriptors"))
    done = {"count": count, "wrong": wrong, "grown_mb": round(late - early, 1)}
    return {**done, "ok": late - early <= GROWTH_MB and same and not wrong, "moments": moments}


def held() -> dict[str, float]:
    """Resident megabytes, threads and open descriptors of this process."""
    gc.collect()
    process = psutil.Process()
    return {
        "mb": round(process.memory_info().rss / 1e6, 1),
        "threads": process.num_threads(),
        "descriptors": process.num_fds(),
    }


class Subject:
    """An open library, its inputs, and the answers that each share must give again."""

    def __init__(self, folder: str) -> None:
        from gpu_aware_tune import load
        from gpu_aware_tune.model.importer import random_inputs

        self.library = load(folder, preload=True)
        self.inputs = random_inputs(self.library.inputs, 0)
        self.shares = self.library.about.units
        self._wanted: dict[int, bytes] = {}
        for units in self.shares:  # each has kernels of its own, which may sum in another order
            self.library.use(units)
            self._wanted[units] = self.content()

    def content(self) -> bytes:
        """The outputs of a call, as bytes."""
        return b"".join(array.tobytes() for array in self.library(self.inputs).values())

    def is_right(self) -> bool:
        """Whether a call gives what the first one on this share gave."""
        return self.content() == self._wanted[self.library.units]


def calls(folder: str, count: int) -> Iterator[bool]:
    """One library, called again and again."""
    subject = Subject(folder)
    for number in range(count):
        if number % 100:
            subject.library(subject.inputs)
            yield True
            continue
        subject.library.use(subject.shares[number // 100 % len(subject.shares)])
        yield subject.is_right()


def cycles(folder: str, count: int) -> Iterator[bool]:
    """Open, call, close."""
    for _ in range(count):
        subject = Subject(folder)
        right = subject.is_right()
        subject.library.close()
        del subject
        yield right


def threads(folder: str, count: int) -> Iterator[bool]:
    """So many threads at once, again and again; the answer of each time is of all of them."""
    subject = Subject(folder)
    for _ in range(MOMENTS):
        results: list[bool] = []

        def work(results: list[bool] = results) -> None:
            results.extend(subject.is_right() for _ in range(20))

        started = [threading.Thread(target=work) for _ in range(count)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        right = len(results) == 20 * count and all(results)
        yield from (right for _ in range(max(count // MOMENTS, 1)))


def processes(folder: str, count: int) -> Iterator[bool]:
    """So many processes at once, each with a library of its own."""
    cell = json.dumps({"kind": "cycles", "folder": folder, "count": 20})
    command = [sys.executable, "-m", MODULE, FLAG, cell]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for process in started:
        output, _ = process.communicate()
        yield process.returncode == 0 and '"wrong": 0' in output


KINDS: dict[str, Callable[[str, int], Iterator[bool]]] = {
    "calls": calls,
    "cycles": cycles,
    "threads": threads,
    "processes": processes,
}


if __name__ == "__main__":
    main()
