"""Kills and stops in every stage of a run, again and again: is anything lost, is anything left behind?

    python -m benchmarks.kills --times 10
    python -m benchmarks.kills --times 10 --how kill --stages retime,swap --model MODEL.onnx

Runs `tune` on a light model, waits for a stage, and some random time later

    kill     ends the parent with SIGKILL,
    stop     stops it with SIGSTOP for three seconds, as Ctrl-Z does, and lets it go on,
    freeze   does so with all of its processes, as the end of a container's CPU time does,

each time on the same record store and output folder. After a kill, what was on disk before (and every
record that the run had reported) must be there, no process and no temporary file may be left, and the
output folder must be the old one or the new one: it is loaded and run. After a stop, the run must end
with a verified library. At last a run must go on from all records to its end, and nothing may lie beside
the output folder. What was seen goes to benchmarks/results/kills.json, whether it was as it should be or
not, after each blow.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, environment, write_results
from benchmarks.light_models import light_models
from benchmarks.scaffold import parser

RESULTS_FILE = RESULTS / "kills.json"

GRACE_S = 10.0
STOP_S = 3.0
SESSION = ".ses"  # a file of ONNX Runtime's own, which it also leaves after a normal end
MEMORY = Path("/dev/shm")
OTHERS = set(MEMORY.glob("gpu-aware-tune-*"))  # there before
HOW = ("kill", "stop", "freeze")

# What a run prints when a stage begins, and how long after it the blow may fall, in seconds.
STAGES = {
    "start": ("", 2.0),
    "import": ("importing", 1.0),
    "workers": ("build workers", 0.5),
    "check": ("checking the imported model", 1.0),
    "search": ("measuring the baseline", 5.0),
    "retime": ("measuring the best again, alone", 2.0),
    "compile": ("compiling and timing", 4.0),
    "verify": ("checking the library's numbers", 0.5),
    "swap": ("", 0.05),  # from when the new folder lies beside the old one
}


def main() -> None:
    """Kill, stop, check, and finish once."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--times", type=int, default=10)
    command.add_argument("--how", default=",".join(HOW))
    command.add_argument("--stages", default=",".join(STAGES))
    command.add_argument("--model", type=Path, default=light_models()["squeezenet"])
    command.add_argument("--seed", type=int, default=0)
    args = command.parse_args()
    moment = random.Random(args.seed)
    about = environment()
    blows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        place = Place(Path(name), args.model)
        first = place.finished_run()
        facts = {"model": args.model.name, "seed": args.seed, "first_run": first, "blows": blows}
        for number in range(args.times):  # whoever cuts it short has seen as much of each stage
            for how, stage in itertools.product(args.how.split(","), args.stages.split(",")):
                blow = place.blow(how, stage, moment.uniform(0, STAGES[stage][1]))
                blows.append({"how": how, "stage": stage, **blow})
                print(f"{how} {stage} {number + 1}: {blow}", flush=True)
                write_results(args.results, about, facts)
        last = place.finished_run()
    write_results(args.results, about, {**facts, "last_run": last})
    bad = [blow for blow in blows if not blow["ok"]]
    missed = sum(blow["ended_before"] for blow in blows)
    print(f"{len(blows)} blows, {missed} after the end, {len(bad)} not as they should be; {last}")
    if bad or not last["ok"]:
        raise SystemExit("FAILED: something was lost or left behind, or a run did not go on")


class Place:
    """The record store, the output folder and the temporary folder of all runs."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.output = folder / "made" / "out"
        self.output.parent.mkdir()
        (folder / "tmp").mkdir()

    def blow(self, how: str, stage: str, after_s: float) -> dict[str, Any]:
        """Start a run, strike it in a stage, and tell what is left of it."""
        before, beside = count(self.folder), self._beside()
        process = self.start("--trials", str(searched(self.folder) + 6))
        watch = _Watch(process)
        if stage == "swap":
            reached = self._until(process, lambda: not self._beside() <= beside)
        else:
            reached = self._until(process, lambda: watch.has(STAGES[stage][0]))
        time.sleep(after_s)
        seen = count(self.folder)
        ended = not reached or process.poll() is not None
        told: dict[str, Any] = {"after_s": round(after_s, 3), "ended_before": ended}
        if how == "kill":
            process.kill()
            process.wait()
            ok = True
        else:
            self._stopped(process, everything=how == "freeze")
            told["exit_code"] = process.wait()
            told["verified"] = watch.has("verified, largest error")
            ok = told["exit_code"] == 0 and told["verified"]
        told["left_behind"] = wait_until_gone(self.folder)
        told["records"] = [before, seen, count(self.folder)]
        told["output_runs"] = not self.output.exists() or self.output_runs()
        kept = count(self.folder) >= seen >= before
        return {**told, "ok": ok and kept and not told["left_behind"] and told["output_runs"]}

    def finished_run(self) -> dict[str, Any]:
        """Let a run go on from the records to its end."""
        known = count(self.folder)
        process = self.start("--trials", str(searched(self.folder) + 8), "--json")
        output, errors = process.communicate()
        finished: dict[str, Any] = json.loads(output) if process.returncode == 0 else {}
        verified = bool(finished) and finished["shares"][0]["verified"]
        beside = sorted(name for name, _ in self._beside())
        kept = count(self.folder)
        return {
            "exit_code": process.returncode,
            "trials": finished.get("trials"),
            "verified": verified,
            "records": [known, kept],
            "beside_output": beside,
            "ok": verified and kept >= known and not beside,
            **({} if finished else {"error": errors[-500:]}),
        }

    def output_runs(self) -> bool:
        """Whether the output folder can be loaded and called."""
        command = [sys.executable, str(ROOT / "cli.py"), "run", str(self.output), "--repeat", "1"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def start(self, *flags: str) -> subprocess.Popen[str]:
        """Start a run that marks its processes and temporary files with the folder."""
        places = ["--db", str(self.folder / "db"), "-o", str(self.output)]
        settings = ["--target", "llvm", "--effort", "quick"]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), str(self.model), *settings, *places, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.folder / "tmp")},
        )

    def _beside(self) -> set[tuple[str, int]]:
        """What lies beside the output folder, by name and inode."""
        return {(entry.name, entry.inode()) for entry in os.scandir(self.output.parent)} - {
            (self.output.name, self.output.stat().st_ino if self.output.exists() else 0)
        }

    def _until(self, process: subprocess.Popen[str], seen: Callable[[], bool]) -> bool:
        """Wait until something is seen; False where the run ended first."""
        while not seen():
            if process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def _stopped(self, process: subprocess.Popen[str], everything: bool) -> None:
        """Stop a run, or all of its processes, for a while."""
        numbers = [process.pid, *(processes(self.folder) if everything else [])]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in dict.fromkeys(numbers):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            if number == signal.SIGSTOP:
                time.sleep(STOP_S)


def count(folder: Path) -> int:
    """Records on disk."""
    return _query(folder, "SELECT COUNT(*) FROM records")


def searched(folder: Path) -> int:
    """Trials on disk."""
    return _query(folder, "SELECT COUNT(*) FROM records WHERE origin = 'search'")


def wait_until_gone(folder: Path) -> list[str]:
    """What is still there of a run after a grace period: processes, temporary files."""
    end = time.monotonic() + GRACE_S
    while (left := _leftovers(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _query(folder: Path, sql: str) -> int:
    """One number from the record store; 0 while there is none."""
    file = folder / "db" / "records.sqlite"
    if not file.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10) as db:
            return int(db.execute(sql).fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # killed while the tables were made


def processes(folder: Path) -> list[int]:
    """Processes that carry the run's TMPDIR."""
    mark = f"TMPDIR={folder / 'tmp'}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def _leftovers(folder: Path) -> list[str]:
    """Processes of runs, and files in the temporary folders.

    A folder in memory that some process was started with is another run's.
    """
    ours = [f"process {pid}" for pid in processes(folder)]
    files = [path for path in (folder / "tmp").iterdir() if path.name != SESSION]
    commands = b""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands += entry.read_bytes() + b"\0"
        except OSError:
            continue
    memory = [
        path
        for path in MEMORY.glob("gpu-aware-tune-*")
        if path not in OTHERS and str(path).encode() not in commands
    ]
    return [*ours, *map(str, [*files, *memory])]


class _Watch:
    """Reads what a run prints, so that it is never held up by a full pipe."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._text = ""
        for stream in (process.stdout, process.stderr):
            threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def has(self, text: str) -> bool:
        return text in self._text

    def _read(self, stream: Any) -> None:
        for line in stream:
            self._text += line


if __name__ == "__main__":
    main()
