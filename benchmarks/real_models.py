"""Models that users would meet, each through the whole command, one after another in one store.

    python -m benchmarks.real_models FOLDER [FOLDER...]    # every .onnx file in them
    python -m benchmarks.real_models FOLDER --order reversed --again
    python -m benchmarks.real_models FOLDER --again --only gpt2 unet    # these once more

The files are not part of the repository: `benchmarks.export_models` writes them, and packages ship
others. Each row says whether the command ended with a verified library,
how long it took to the first measurement and in all, the records that it added to the store, the peak
memory of its processes, and the error.
With `--again` the store of an earlier call is used, in which nothing should be left to search, and rows
of other models stay in the results file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, environment, stamp, write_results
from gpu_aware_tune.records.store import Store

STORE = ROOT / "build" / "real-models"
FIRST = "measuring the baseline schedules"  # the line that is printed before the first measurement


def main() -> None:
    """Tune every model that the results file does not have yet, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--time", help="of each run, such as 60s")
    parser.add_argument("--limit", type=float, default=600, help="seconds of one model")
    parser.add_argument("--order", choices=("smallest", "sorted", "reversed"), default="smallest")
    parser.add_argument("--again", action="store_true", help="use the store of the call before")
    parser.add_argument("--missing", action="store_true", help="only those without a row")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the models")
    parser.add_argument("--results", type=Path, default=RESULTS / "real-models.json")
    args = parser.parse_args()
    models = sorted({path for folder in args.folders for path in folder.glob("*.onnx")})
    if args.order == "smallest":
        models.sort(key=lambda path: path.stat().st_size)
    if args.only:
        models = [path for path in models if path.stem in args.only]
    if args.order == "reversed":
        models.reverse()
    if not args.again and STORE.exists():
        raise SystemExit(f"{STORE} exists: remove it, or give --again")
    about, rows = environment(), {}
    if args.again and args.results.exists():
        rows = json.loads(args.results.read_text())["models"]
    for path in models:
        if args.missing and path.stem in rows:
            continue
        rows[path.stem] = {
            **tuned(path, args.trials, args.time, args.limit),
            "measured": stamp(about),
        }
        show(path.stem, rows[path.stem])
        write_results(
            args.results, about, {"trials": args.trials, "time": args.time, "models": rows}
        )
    good = sum(row["verified"] for row in rows.values())
    print(f"{good} of {len(rows)} models verified")


def tuned(path: Path, trials: int, time_given: str | None, limit_s: float) -> dict[str, Any]:
    """The whole command on one model, in the common store."""
    command = [sys.executable, "cli.py", str(path), "--target", "llvm", "--json"]
    command += [
        "--trials",
        str(trials),
        "--db",
        str(STORE),
        "-o",
        str(STORE / f"{path.stem}.tuned"),
    ]
    command += ["--time", time_given] if time_given else []
    newest = last_record()
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
        )
        first_s, lines = None, []
        assert process.stderr is not None
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        for line in process.stderr:
            lines.append(line.strip())
            if line.startswith(FIRST):
                first_s = time.monotonic() - begun
        timer.cancel()
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        answer = out.read()
    row: dict[str, Any] = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - begun,
        "first_measurement_s": first_s,
        "peak_mb": usage.ru_maxrss / 1024,
        "model_mb": path.stat().st_size / 2**20,
        "new_records": last_record() - newest,
        "warnings": [line for line in lines if line.startswith("warning")],
        "verified": False,
        "error": next((line for line in reversed(lines) if line.startswith("error")), None),
    }
    if row["exit_code"] == 0:
        found = json.loads(answer)
        share = found["shares"][0]
        row |= {
            "verified": share["verified"],
            "max_error": share["max_error"],
            "trials": found["trials"],
            "stopped_by": found["stopped_by"],
            "untuned_ms": 1e3 * share["untuned_s"],
            "tuned_ms": 1e3 * share["tuned_s"],
        }
    return row


def last_record() -> int:
    """The newest record's number in the common store."""
    if not STORE.exists():
        return 0
    with Store(STORE, readonly=True) as store:
        return store.last_id()


def show(name: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    if row["verified"]:
        text = f"verified, error {row['max_error']:.1e}, {row['tuned_ms']:.2f} ms,"
        text += f" {row['new_records']} new records"
    else:
        text = row["error"] or f"exit code {row['exit_code']}"
    first = f"{row['first_measurement_s']:.1f}" if row["first_measurement_s"] else "-"
    print(f"{name:28} {row['seconds']:6.1f} s (first {first} s) {row['peak_mb']:6.0f} MB  {text}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
