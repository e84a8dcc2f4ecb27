"""A disk of 20 MB for the record store, the output or the scratch files: does a run end as it should?

    python -m benchmarks.small_disks                       # squeezenet and resnet50
    python -m benchmarks.small_disks --mb 20 --free-kb 300 --models squeezenet

Each run of `tune` is in a mount namespace of its own, in which one of its folders is a small disk, as it
is or all but full. It must end with a verified library, or with exit code 3 and one line that says what is
full; records that it has reported must be on disk, and nothing may be left. Needs `unshare` and the right
to use it; results go to benchmarks/results/small-disks.json.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, environment, write_results
from benchmarks.kills import processes
from benchmarks.light_models import light_models
from benchmarks.scaffold import parser

RESULTS_FILE = RESULTS / "small-disks.json"
PLACES = ("store", "output", "scratch")
# $1: MB of the disk, $2: kB that are left free (0: all), then the folders, "--", the command.
INSIDE = """
size=$1; free=$2; shift 2
while [ "$1" != -- ]; do
  mount -t tmpfs -o size=${size}m none "$1" || exit 90
  if [ $free != 0 ]; then head -c $((size * 1048576 - free * 1024)) /dev/zero > "$1/filler" || exit 91; fi
  shift
done
shift
"$@"
status=$?
echo "left in scratch: $(ls -A "$TMPDIR" | grep -v filler | tr '\\n' ' ')"
exit $status
"""


def main() -> None:
    """Run each case, print what it said, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--models", default="squeezenet,resnet50")
    command.add_argument("--mb", type=int, default=20)
    command.add_argument("--free-kb", default="0,300")
    command.add_argument("--trials", type=int, default=4)
    args = command.parse_args()
    about = environment()
    runs = []
    for model in args.models.split(","):
        for free in map(int, args.free_kb.split(",")):
            for place in PLACES:
                facts = one_run(light_models()[model], place, args.mb, free, args.trials)
                runs.append({"model": model, "place": place, "free_kb": free, **facts})
                print(runs[-1], flush=True)
    write_results(args.results, about, {"mb": args.mb, "runs": runs})
    if not all(run["ok"] for run in runs):
        raise SystemExit("FAILED: a run did not end as it should")


def one_run(model: Path, place: str, mb: int, free_kb: int, trials: int) -> dict[str, Any]:
    """One run of `tune` with a small disk in one place."""
    with tempfile.TemporaryDirectory(prefix="small-disks-") as name:
        folder = Path(name)
        folders = {each: folder / each for each in PLACES}
        for path in (*folders.values(), folder / "tmp"):
            path.mkdir()
        small = [folders[place]] if place != "scratch" else [folder / "tmp", Path("/dev/shm")]
        tune = [
            sys.executable, str(ROOT / "cli.py"), str(model), "--target", "llvm", "--effort", "quick",
            "--trials", str(trials), "--db", str(folders["store"] / "db"),
            "-o", str(folders["output"] / "out"),
        ]  # fmt: skip
        begun = time.monotonic()
        done = subprocess.run(
            ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c",
             INSIDE, "-", str(mb), str(free_kb), *map(str, small), "--", *tune],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": str(folder / "tmp")},
            check=False,
        )  # fmt: skip
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        scratch = done.stdout.rpartition("left in scratch:")[2].split()
        left = [each for each in scratch if each != ".ses"]
        verified = "verified, largest error" in done.stdout + done.stderr
        ended = (done.returncode == 0 and verified) or (
            done.returncode == 3 and len(errors) == 1 and "Traceback" not in done.stderr
        )
        return {
            "seconds": round(time.monotonic() - begun, 1),
            "exit_code": done.returncode,
            "said": [
                line.replace(name, "FOLDER") for line in errors or done.stderr.splitlines()[-2:]
            ],
            "left_behind": [*left, *map(str, processes(folder))],
            "ok": ended and not left and not processes(folder),
        }


if __name__ == "__main__":
    if shutil.which("unshare") is None:
        sys.exit("error: unshare (util-linux) is missing")
    main()
