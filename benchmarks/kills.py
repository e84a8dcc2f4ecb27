"""kill -9 in mid-run, again and again: is anything lost, is anything left behind?

    python benchmarks/kills.py --times 10

Runs `tune` on a light model and kills the parent at a random moment, each time on the same record
store. What the run had reported (its `-v` lines name every record on disk) must be there afterwards,
no process and no temporary file may be left, and the last run must go on from all of it to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.light_models import light_models  # noqa: E402

GRACE_S = 10.0
SESSION = ".ses"  # a file of ONNX Runtime's own, which it also leaves after a normal end
MEMORY = Path("/dev/shm")
OTHERS = set(MEMORY.glob("gpu-aware-tune-*"))  # of runs that have nothing to do with this


def main() -> None:
    """Kill, check, and finish once."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moment = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        known = 0
        for number in range(args.times):
            process = start(folder)
            time.sleep(moment.uniform(1, 25))
            before = count(folder)
            process.kill()
            process.wait()
            left = wait_until_gone(folder)
            after = count(folder)
            ok = after >= before >= known and not left
            print(
                f"kill {number + 1}: {before} records seen, {after} kept, left behind: {left or 'nothing'}"
            )
            if not ok:
                raise SystemExit("FAILED: a record was lost or something was left behind")
            known = after
        process = start(folder, "--trials", str(max(1, searched(folder)) + 8), "--json")
        output, _ = process.communicate()
        finished = json.loads(output)
        print(f"last run: exit code {process.returncode}, {finished['trials']} trials in all,")
        print(f"          {count(folder)} records, verified: {finished['shares'][0]['verified']}")
        if process.returncode or count(folder) < known:
            raise SystemExit("FAILED: the last run did not go on from the records")


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
    """Processes that carry the run's TMPDIR, and files in the temporary folders."""
    mark = f"TMPDIR={folder / 'tmp'}\0".encode()
    found = [str(path) for path in (folder / "tmp").iterdir() if path.name != SESSION]
    found += [str(path) for path in MEMORY.glob("gpu-aware-tune-*") if path not in OTHERS]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes():
                    found.append(f"process {entry.name}")
            except OSError:
                continue  # it ended meanwhile
    return found


if __name__ == "__main__":
    main()
