"""What the benchmark scripts share: command lines, turns, and processes of their own.

None of these processes outlives its parent, and what a hung one told counts. A cell is an object of
plain JSON values that says what to run. A process of its own starts from nothing, whatever ran before
it, and takes its workers and its memory with it when it ends; what came of it may be kept in a results
file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import (
    NO_GPU,
    RESULTS,
    ROOT,
    environment,
    gpu_results,
    stamp,
    write_results,
)

FLAG = "--cell"  # of a script that runs one cell; it hands the text to `answer`

Cell = dict[str, Any]
Timer = Callable[[float], list[float]]  # seconds to run for -> seconds of each run
_PR_SET_PDEATHSIG = 1
_MARK = "ANSWER "


def die_with_parent() -> None:
    """Let the kernel end this process when its parent ends: it would keep the device busy."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_orderly() -> None:
    """Let SIGTERM, which `timeout` sends, end this process as `sys.exit` does: what it opened is closed."""

    def stop(*_: object) -> None:
        raise SystemExit(124)

    signal.signal(signal.SIGTERM, stop)


def tell(found: dict[str, Any]) -> None:
    """In a child: say what is known so far; the last one counts."""
    print(_MARK + json.dumps(found), flush=True)


def told(output: str) -> dict[str, Any] | None:
    """What a child said last, None where it said nothing."""
    for line in reversed(output.splitlines()):
        if line.startswith(_MARK):
            return dict(json.loads(line[len(_MARK) :]))
    return None


def asked(
    arguments: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None
) -> tuple[dict[str, Any] | None, str]:
    """Run `python ARGUMENTS` for at most so long.

    Returns:
        What it told last, and why it did not come to its end; "" where it did.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=ROOT,
            start_new_session=True,
        )
        why = ""
        try:
            if (code := child.wait(limit_s)) != 0:
                why = f"exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"not done in {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it started
            child.wait()
        out.seek(0)
        err.seek(0)
        lines = [line for line in err.read().splitlines() if line.strip()]
        tail = f": {lines[-1][:300]}" if why and lines else ""
        return told(out.read()), why + tail


class CellFailed(SystemExit):
    """A cell's process gave no answer; not caught, it ends the script with what was printed."""

    def __init__(self, cell: Cell, stdout: str, stderr: str) -> None:
        super().__init__(f"{cell} failed:\n{stdout[-2000:]}\n{stderr[-4000:]}")
        self.stderr = stderr


def run_apart(module: str, cell: Cell) -> dict[str, Any]:
    """Run one cell in a process of its own: `python -m MODULE --cell CELL`.

    Raises:
        CellFailed: it ended without an answer.
    """
    command = [sys.executable, "-m", module, FLAG, json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    found = told(done.stdout)
    if found is None:
        raise CellFailed(cell, done.stdout, done.stderr)
    return found


def answer(text: str, run: Callable[..., dict[str, Any]]) -> None:
    """Run the cell in `text` and print what comes of it for `run_apart` (in the process)."""
    die_with_parent()
    tell(run(**json.loads(text)))


def resumed(
    path: Path, cells: Sequence[Cell], run: Callable[[Cell], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Run the cells that a results file does not have yet, and keep each as soon as it is through.

    Returns:
        What the file then has of these cells; "cell" in each tells which it is of.
    """
    known = json.loads(path.read_text())["runs"] if path.exists() else []
    for cell in cells:
        if not any(found["cell"] == cell for found in known):
            print(f"running {cell} ...", flush=True)
            about = environment()
            known.append({"cell": cell, **run(cell), "measured": stamp(about)})
            write_results(path, about, {"runs": known})
    return [found for found in known if found["cell"] in cells]


def parser(doc: str | None, results: Path) -> argparse.ArgumentParser:
    """A command line whose help is the script's docstring, with its `--results`."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--results", type=Path, default=results)
    return made


def gpu_parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a GPU benchmark: its models, `--null`, and the folder of its results."""
    from benchmarks.gpu.models import MODELS

    made = parser(doc, RESULTS)
    made.add_argument("--models", default=",".join(MODELS))
    made.add_argument("--null", action="store_true", help="without a GPU: tries the code")
    return made


class GpuBenchmark:
    """One run of a GPU benchmark: its models' files in a scratch folder, and its results file."""

    def __init__(self, name: str, args: argparse.Namespace, scratch: Path) -> None:
        self.scratch = scratch
        self._args = args
        self._about = environment("llvm" if args.null else "cuda")
        folder = Path(tempfile.mkdtemp()) if args.null else args.results
        self._path = gpu_results(name, folder, args.null)

    def models(self) -> Iterator[tuple[str, Path]]:
        """Name and file of each model."""
        from benchmarks.gpu.models import write_model

        for name in self._args.models.split(","):
            yield name, write_model(name, self.scratch, tiny=self._args.null)

    def write(self, **facts: Any) -> None:
        """Write the results file; again after each further figure."""
        write_results(self._path, self._about, facts)

    def close(self) -> None:
        """Say where the figures are."""
        print(f"written to {self._path}")


@contextlib.contextmanager
def gpu_benchmark(name: str, args: argparse.Namespace) -> Iterator[GpuBenchmark]:
    """Begin a GPU benchmark; without a GPU, and `--null`, one line says so and the script ends."""
    from gpu_aware_tune.partition.gpu_query import query_gpus

    found, reason = query_gpus()
    if not args.null and not found:
        print(f"skipped: this benchmark needs an NVIDIA GPU ({reason}); --null tries it without")
        sys.exit(NO_GPU)
    stop_orderly()
    with tempfile.TemporaryDirectory() as folder:
        run = GpuBenchmark(name, args, Path(folder))
        yield run
        run.close()


def host_target(units: int) -> Any:
    """TVM's target for so many cores of this machine."""
    import tvm

    cpu = str(tvm.target.codegen.llvm_get_system_cpu())
    return tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": units})


def sampled(
    run: Callable[[], object], seconds: float, wait: Callable[[], object] | None = None
) -> list[float]:
    """Run again and again for so long, once at least; seconds of each run, waited for."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        if wait is not None:
            wait()
        samples.append(time.perf_counter() - begun)
    return samples


def take_turns(
    timers: Mapping[str, Timer], rounds: int, seconds: float, pause_s: float = 0.0
) -> dict[str, list[float]]:
    """Let contestants run in turn, so that drift meets all alike, each for so long in a round.

    With a pause between them the first run after it does not count.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            time.sleep(pause_s)
            found = timer(seconds)
            samples[name].extend((found[1:] or found) if pause_s else found)
    return samples
