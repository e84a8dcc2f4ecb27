"""Cells of a benchmark: each is run in a process of its own, and may be kept in a results file.

A cell is an object of plain JSON values that says what to run. A process of its own starts from
nothing, whatever ran before it, and takes its workers and its memory with it when it ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.children import die_with_parent, tell, told  # noqa: E402
from benchmarks.environment import environment, stamp, write_results  # noqa: E402

FLAG = "--cell"  # of a script that runs one cell; it hands the text to `answer`

Cell = dict[str, Any]


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
