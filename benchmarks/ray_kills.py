"""kill -9 on a Ray cluster, again and again, each kind of process: does the run go on, is all clean?

    python -m benchmarks.ray_kills --times 10

Two nodes of a cluster on this machine tune a light model. At random moments a process of each kind is
killed, and after each kill the records on disk must go on growing with none lost. A raylet that was
killed is replaced by a node that joins; after the driver is killed its workers must be gone within
seconds, and it is started again on the same records. In the end the run is interrupted as by Ctrl-C
and must export a library that is verified, and leave no process. What was seen goes to
benchmarks/results/ray-kills.json, whether it was as it should be or not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from benchmarks.environment import RESULTS, ROOT, environment, write_results
from benchmarks.kills import count, wait_until_gone
from benchmarks.light_models import light_models
from benchmarks.scaffold import parser

RESULTS_FILE = RESULTS / "ray-kills.json"
KINDS = ("actor", "raylet", "host", "measuring worker", "other worker", "driver")
MARK = "GPU_AWARE_TUNE_KILLS"
GOES_ON_S = 180.0
COMES_BACK_S = 60.0  # until a process of a kind is there again after the kill before
GROWTH = 5  # records after a kill that show that the run goes on


def main() -> None:
    """Kill, check, and finish once."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--times", type=int, default=10, help="kills of each kind")
    command.add_argument("--kinds", default=",".join(KINDS))
    command.add_argument(
        "--within", type=float, default=15.0, help="longest wait before a kill (s)"
    )
    command.add_argument("--seed", type=int, default=0)
    args = command.parse_args()
    moment = random.Random(args.seed)
    about = environment()
    seen: dict[str, Any] = {"seed": args.seed, "ok": False, "kills": [], "last_run": None}
    kinds = [kind for kind in args.kinds.split(",") for _ in range(args.times)]
    moment.shuffle(kinds)
    with tempfile.TemporaryDirectory(prefix="ray-kills-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        os.environ[MARK], os.environ["PYTHONPATH"] = name, str(ROOT)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            follow(cluster, folder, kinds, moment, args.within, seen)
        finally:
            cluster.shutdown()
            seen["left_behind"] = wait_until_gone(folder)
            verified = bool(seen["last_run"]) and seen["last_run"]["verified"]
            seen["ok"] = verified and not seen["left_behind"]
            write_results(args.results, about, seen)
        print(f"left behind: {seen['left_behind'] or 'nothing'}")
        if seen["left_behind"]:
            raise SystemExit("FAILED: something was left behind")


def follow(
    cluster: Any,
    folder: Path,
    kinds: list[str],
    moment: random.Random,
    within_s: float,
    seen: dict[str, Any],
) -> None:
    """One run after the other, with kills in between, and a proper end; told in `seen`."""
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    driver = start(cluster, folder)
    grow(folder, driver, GROWTH)
    for number, kind in enumerate(kinds, 1):
        time.sleep(moment.uniform(0, within_s))
        before = count(folder)
        if kind == "driver":
            driver.kill()
            driver.communicate()
            if left := gone(("NodeActor", "workers.host")):
                raise SystemExit(f"FAILED: still there after the driver was killed: {left}")
            driver = start(cluster, folder)
        elif not kill_one(cluster, kind, moment):
            print(f"kill {number}: no {kind} there just now")
            continue
        grew_s = grow(folder, driver, GROWTH)
        seen["kills"].append({"kind": kind, "before": before, "goes_on_after_s": round(grew_s, 1)})
        print(f"kill {number}, {kind}: {before} records before, goes on after {grew_s:.0f} s")
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=600)
    if driver.returncode:
        log = (folder / "driver.log").read_text()[-2000:]
        raise SystemExit(f"FAILED: exit code {driver.returncode}: {log}")
    finished = json.loads(output)
    verified = finished["shares"][0]["verified"]
    seen["last_run"] = {"records": count(folder), "verified": verified}
    print(f"last run: {count(folder)} records, verified: {verified}")


def start(cluster: Any, folder: Path) -> subprocess.Popen[str]:
    """Start a run that never ends by itself."""
    model = str(light_models()["squeezenet"])
    flags = ["--target", "llvm", "--trials", "100000", "--json", "--ray", cluster.address]
    places = ["--db", str(folder / "db"), "-o", str(folder / "out")]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), model, *flags, *places],
        stdout=subprocess.PIPE,
        stderr=(folder / "driver.log").open("a"),
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
    )


def grow(folder: Path, driver: subprocess.Popen[str], more: int) -> float:
    """Wait for so many new records; gives the seconds that took."""
    begun, before = time.monotonic(), count(folder)
    while (now := count(folder)) < before + more:
        log = (folder / "driver.log").read_text()[-2000:]
        if now < before:
            raise SystemExit(f"FAILED: {before - now} records were lost\n{log}")
        if driver.poll() is not None:
            raise SystemExit(f"FAILED: the driver ended with {driver.returncode}\n{log}")
        if time.monotonic() - begun > GOES_ON_S:
            raise SystemExit(f"FAILED: no new records in {GOES_ON_S:.0f} s\n{log}")
        time.sleep(0.2)
    return time.monotonic() - begun


def kill_one(cluster: Any, kind: str, moment: random.Random) -> bool:
    """Kill a random process of a kind, if there is one; a new node takes a raylet's place."""
    end = time.monotonic() + COMES_BACK_S
    while not (found := victims(cluster, kind)):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    victim = moment.choice(found)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    if kind == "raylet":
        dead = next(n for n in cluster.worker_nodes if raylet(n) == victim)
        cluster.remove_node(dead, allow_graceful=False)
        cluster.add_node(num_cpus=1)
    return True


def victims(cluster: Any, kind: str) -> list[int]:
    """The processes of a kind that belong to the cluster's nodes."""
    if kind == "raylet":
        return [raylet(node) for node in cluster.worker_nodes]
    actors = marked("NodeActor")
    if kind == "actor":
        return actors
    hosts = [pid for pid in marked("workers.host") if parent(pid) in actors]
    if kind == "host":
        return hosts
    workers = [pid for pid in marked("workers.host") if parent(pid) in hosts]
    return [pid for pid in workers if measures(pid) == (kind == "measuring worker")]


def raylet(node: Any) -> int:
    """The process id of a node's raylet."""
    return int(node.all_processes["raylet"][0].process.pid)


def measures(pid: int) -> bool:
    """Whether a worker has a thread pool, which only measuring workers make."""
    with contextlib.suppress(OSError):
        return any(
            (task / "comm").read_text().startswith("tune-pool")
            for task in Path(f"/proc/{pid}/task").iterdir()
        )
    return False


def parent(pid: int) -> int:
    """The parent's process id; 0 where the process has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def marked(*names: str) -> list[int]:
    """Processes of this benchmark whose command line has one of the names."""
    mark, found = f"{MARK}={os.environ[MARK]}\0".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                line = (entry / "cmdline").read_text()
                found += [int(entry.name)] if any(name in line for name in names) else []
    return found


def gone(names: tuple[str, ...], grace_s: float = 20.0) -> list[int]:
    """Processes that are still there after a grace period."""
    end = time.monotonic() + grace_s
    while (left := marked(*names)) and time.monotonic() < end:
        time.sleep(0.2)
    return left


if __name__ == "__main__":
    main()
