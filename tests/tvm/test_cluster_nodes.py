"""A real Ray cluster of several nodes on this machine: joins, losses, kills; nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402
from test_tuning import network, records, settings, wait_for_records  # noqa: E402, F401

from gpu_aware_tune.events import Event, Finished, Note, Trial  # noqa: E402
from gpu_aware_tune.tuning import tune_events  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MARK = f"GPU_AWARE_TUNE_TEST={os.getpid()}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that only the driver uses, and a node that measures; marked by a variable."""
    name, _, value = MARK.partition("=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        nodes.add_node(num_cpus=1)
        yield nodes
        nodes.shutdown()


def marked(*names: str) -> dict[int, str]:
    """Processes of the cluster by process id whose command line has one of the names."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{MARK}\0".encode() in (entry / "environ").read_bytes():
                line = (entry / "cmdline").read_text().replace("\0", " ")
                if int(entry.name) != os.getpid() and any(name in line for name in names):
                    found[int(entry.name)] = line
    return found


def wait_until_gone(*names: str) -> dict[int, str]:
    end = time.monotonic() + 20
    while (left := marked(*names)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


WORKERS = ("NodeActor", "gpu_aware_tune.workers.host")


def scratch_folders() -> set[Path]:
    """The folders in which the cluster's workers keep artifacts now."""
    lines = marked("gpu_aware_tune.workers.host").values()
    return {Path(line.split()[-1]) for line in lines if line.split()[-1].startswith("/")}


def raylet(node: Any) -> int:
    """The process id of a node's raylet."""
    return int(node.all_processes["raylet"][0].process.pid)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Script:
    """Follows a run: when the awaited note has come, or four more trials (""), does the next thing."""

    def __init__(self, *steps: tuple[str, Callable[[], object]]) -> None:
        self.steps = list(steps)
        self.trials = 0

    def see(self, event: Event) -> None:
        self.trials += isinstance(event, Trial) and event.origin == "search"
        if not self.steps:
            return
        awaited, action = self.steps[0]
        if (isinstance(event, Note) and awaited in event.text) if awaited else self.trials >= 4:
            self.steps.pop(0)
            action()
            self.trials = 0


def test_machines_join_and_die_and_the_run_goes_on(
    cluster: Any,
    network: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (first,) = cluster.worker_nodes
    folders: set[Path] = set()

    def kill_actor() -> None:
        (actor,) = (pid for pid in marked("NodeActor") if parent(pid) != raylet(first))
        folders.update(scratch_folders())
        os.kill(actor, signal.SIGKILL)

    script = Script(
        ("", lambda: cluster.add_node(num_cpus=1)),
        ("works for this run", lambda: os.kill(raylet(first), signal.SIGKILL)),
        ("work goes elsewhere", lambda: None),
        ("", kill_actor),  # of the only machine that is left
        ("work goes elsewhere", lambda: None),
        ("works for this run", lambda: None),
        ("", lambda: signal.raise_signal(signal.SIGINT)),
    )
    events: list[Event] = []
    for event in tune_events(network, settings(tmp_path, ray=cluster.address, trials=4000)):
        events.append(event)
        script.see(event)
    assert not script.steps, f"still waiting for: {[name for name, _ in script.steps]}"
    done = events[-1]
    assert isinstance(done, Finished) and done.interrupted and done.shares[0].verified
    trials = sum(isinstance(event, Trial) for event in events)
    assert len(records(tmp_path)) == trials, "nothing is lost, nothing is there twice"
    assert wait_until_gone(*WORKERS) == {}
    assert folders and not any(folder.exists() for folder in folders)


def test_a_killed_driver_leaves_its_records_and_no_process(
    cluster: Any,
    network: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), str(network), "--target", "llvm", "-q"]
    places = ["--db", str(tmp_path / "db"), "-o", str(tmp_path / "out"), "--trials", "4000"]
    process = subprocess.Popen(
        [*command, *places, "--ray", cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_records(tmp_path, 25)
    assert marked("NodeActor")
    folders = scratch_folders()
    reported = len(records(tmp_path))
    process.kill()
    output, _ = process.communicate()
    assert output == "", "-q is quiet, in workers too"
    assert wait_until_gone(*WORKERS) == {}
    assert folders and not any(folder.exists() for folder in folders)
    assert len(records(tmp_path)) >= reported
