"""kill -9 in mid-run, again and again: is anything lost, is anything left behind?

    python -m benchmarks.kills --times 10

Runs `tune` on a light model and kills the parent at a random moment, each time on the same record
store. What the run had reported (its `-v` lines name every record on disk) must be there afterwards,
no process and no temporary file may be left, and the last run must go on from all of it to the end.
What was seen goes to benchmarks/results/kills.json, whether it was as it should be or not.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, environment, write_results
from benchmarks.light_models import light_models
from benchmarks.scaffold import parser

RESULTS_FILE = RESULTS / "kills.json"

GRACE_S = 10.0
SESSION = ".ses"  # a file of ONNX Runtime's own, which it also leaves after a normal end
MEMORY = Path("/dev/shm")
OTHERS = set(MEMORY.glob("gpu-aware-tune-*"))  # there before


def main() -> None:
    """Kill, check, and finish once."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--times", type=int, default=10)
    command.add_argument("--seed", type=int, default=0)
    args = command.parse_args()
    moment = random.Random(args.seed)
    about, last = environment(), None
    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        for number in range(args.times):
            known = kills[-1]["kept"] if kills else 0
            kills.append(kill_one(folder, known, moment.uniform(1, 25)))
            print(f"kill {number + 1}: {kills[-1]}", flush=True)
            if not kills[-1]["ok"]:
                break
        else:
            last = last_run(folder, kills[-1]["kept"] if kills else 0)
            print(f"last run: {last}")
    write_results(args.results, about, {"seed": args.seed, "kills": kills, "last_run": last})
    if last is None:
        raise SystemExit("FAILED: a record was lost or something was left behind")
    if not last["ok"]:
        raise SystemExit("FAILED: the last run did not go on from the records")


def kill_one(folder: Path, known: int, after_s: float) -> dict[str, Any]:
    """Start a run, kill it after a while, and tell what is left of it."""
    process = start(folder)
    time.sleep(after_s)
    seen = count(folder)
    ended = process.poll()  # not None: it came to its end before it could be killed
    process.kill()
    process.wait()
    left = wait_until_gone(folder)
    kept = count(folder)
    return {
        "after_s": round(after_s, 1),
        "ended_before": ended is not None,
        "seen": seen,
        "kept": kept,
        "left_behind": left,
        "ok": kept >= seen >= known and not left,
    }


def last_run(folder: Path, known: int) -> dict[str, Any]:
    """Let a run go on from the records to its end."""
    process = start(folder, "--trials", str(max(1, searched(folder)) + 8), "--json")
    output, _ = process.communicate()
    finished: dict[str, Any] = json.loads(output) if process.returncode == 0 else {}
    verified = bool(finished) and finished["shares"][0]["verified"]
    kept = count(folder)
    return {
        "exit_code": process.returncode,
        "trials": finished.get("trials"),
        "verified": verified,
        "kept": kept,
        "ok": verified and kept >= known,
    }


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Start a run that marks its processes and temporary files with the folder."""
    (folder / "tmp").mkdir(exist_ok=True)
    model = str(light_models()["squeezenet"])
    places = ["--db", str(folder / "db"), "-o", str(folder / "out")]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), model, "--target", "llvm", *places, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
    )


def count(folder: Path) -> int:
    """Records on disk."""
    return query(folder, "SELECT COUNT(*) FROM records")


def searched(folder: Path) -> int:
    """Trials on disk."""
    return query(folder, "SELECT COUNT(*) FROM records WHERE origin = 'search'")


def query(folder: Path, sql: str) -> int:
    """One number from the record store; 0 while there is none."""
    file = folder / "db" / "records.sqlite"
    if not file.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10) as db:
            return int(db.execute(sql).fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # killed while the tables were made


def wait_until_gone(folder: Path) -> list[str]:
    """What is still there of a killed run after a grace period: processes, temporary files."""
    end = time.monotonic() + GRACE_S
    while (left := leftovers(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def leftovers(folder: Path) -> list[str]:
    """Processes that carry the run's TMPDIR, and files in the temporary folders.

    A folder in memory that a process without that TMPDIR was started with is another run's.
    """
    mark = f"TMPDIR={folder / 'tmp'}\0".encode()
    found = [str(path) for path in (folder / "tmp").iterdir() if path.name != SESSION]
    commands = b""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes():
                    found.append(f"process {entry.name}")
                else:
                    commands += (entry / "cmdline").read_bytes() + b"\0"
            except OSError:
                continue  # it ended meanwhile
    ours = (path for path in MEMORY.glob("gpu-aware-tune-*") if str(path).encode() not in commands)
    return found + [str(path) for path in ours if path not in OTHERS]


if __name__ == "__main__":
    main()
