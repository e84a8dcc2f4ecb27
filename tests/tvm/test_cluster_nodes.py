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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402
from test_tuning import network, records, settings, wait_for_records  # noqa: E402, F401

from gpu_aware_tune.cluster.ledger import PendingCandidates  # noqa: E402
from gpu_aware_tune.events import Event, Finished, Note, Trial  # noqa: E402
from gpu_aware_tune.partition import usable_cores  # noqa: E402
from gpu_aware_tune.search.budget import StopRequest  # noqa: E402
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

    stop = StopRequest()
    script = Script(
        ("", lambda: cluster.add_node(num_cpus=1)),
        ("works for this run", lambda: os.kill(raylet(first), signal.SIGKILL)),
        ("work goes elsewhere", lambda: None),
        ("", kill_actor),  # of the only machine that is left
        ("work goes elsewhere", lambda: None),
        ("works for this run", lambda: None),
        ("", stop.request),
    )
    events: list[Event] = []
    wanted = settings(tmp_path, ray=cluster.address, trials=4000)
    for event in tune_events(network, wanted, stop):
        events.append(event)
        script.see(event)
    assert not script.steps, f"still waiting for: {[name for name, _ in script.steps]}"
    done = events[-1]
    assert isinstance(done, Finished) and done.interrupted and done.shares[0].verified
    trials = sum(isinstance(event, Trial) for event in events)
    assert len(records(tmp_path)) == trials, "nothing is lost, nothing is there twice"
    assert wait_until_gone(*WORKERS) == {}
    assert folders and not any(folder.exists() for folder in folders)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """What is started inside runs on one core."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


@pytest.mark.skipif(len(usable_cores()) < 2, reason="a smaller machine needs two cores here")
def test_a_machine_that_is_too_small_builds_for_one_that_is_not(
    cluster: Any,
    network: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[str] = []
    passed_on: dict[int, str] = {}
    measured: list[str] = []
    keep, pass_on, finish = (
        PendingCandidates.keep,
        PendingCandidates.pass_on,
        PendingCandidates.finish,
    )

    def see_kept(ledger: PendingCandidates, number: int, artifact: Any) -> None:
        built.append(ledger._given[number].candidate.trace)
        assert artifact.data.startswith(b"\x7fELF")
        keep(ledger, number, artifact)

    def see_passed_on(ledger: PendingCandidates, node: str, count: int) -> Any:
        given = pass_on(ledger, node, count)
        passed_on.update((number, candidate.trace) for number, candidate, _ in given)
        return given

    def see_finished(ledger: PendingCandidates, number: int) -> Any:
        measured.extend([passed_on[number]] if number in passed_on else [])
        return finish(ledger, number)

    monkeypatch.setattr(PendingCandidates, "keep", see_kept)
    monkeypatch.setattr(PendingCandidates, "pass_on", see_passed_on)
    monkeypatch.setattr(PendingCandidates, "finish", see_finished)
    with one_core():
        small = cluster.add_node(num_cpus=1)
    events = list(tune_events(network, settings(tmp_path, ray=cluster.address, trials=12)))
    cluster.remove_node(small)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("builds for this run: it has 1 core, the run's shares need" in t for t in notes)
    assert any("works for this run" in text for text in notes)
    assert len(built) > 3 and sorted(measured) == sorted(built)
    trials = [event for event in events if isinstance(event, Trial)]
    assert len(trials) == len(records(tmp_path)) > len(built), "the other machine builds too"
    assert sum(trial.failure is None for trial in trials) >= len(built)
    done = events[-1]
    assert isinstance(done, Finished) and done.shares[0].verified and not done.interrupted


def test_a_gpu_is_asked_for_in_part_and_left_when_it_is_not_the_runs(cluster: Any) -> None:
    """Half of the GPU is another's, as with Ray Serve; there is none in truth, so it only builds."""
    from mock_gpu.devices import fake_gpu
    from test_build_only import setup_for

    from gpu_aware_tune.cluster.members import Members
    from gpu_aware_tune.cluster.messages import Gone
    from gpu_aware_tune.partition import share_of

    class Holder:
        def held(self) -> Any:
            return ray.get_runtime_context().get_accelerator_ids()["GPU"]

    setup = setup_for(share_of(fake_gpu(), 30, "green"), "green")
    ray.init(cluster.address, log_to_driver=False)
    node = cluster.add_node(num_cpus=2, num_gpus=1)
    members = Members(setup)
    try:
        pin = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False)}
        serve = ray.remote(num_gpus=0.5, num_cpus=0, **pin)(Holder).remote()
        assert ray.get(serve.held.remote(), timeout=30) == ["0"]
        members.refresh(at_once=True)
        gone: list[str] = []
        end = time.monotonic() + 60
        while not gone and time.monotonic() < end:
            for member, news in members.receive(0.5):
                if isinstance(news, Gone) and "GPU 0" in member.name:
                    gone.append(news.text)
                    assert news.can_build
        assert gone and "no answer" not in gone[0], gone
        here: list[Any] = []
        while not here and time.monotonic() < end:
            members.refresh(at_once=True)
            for member, _ in members.receive(0.5):
                if member.ready is not None and member.key == node.node_id:
                    here.append(member.ready.lacks)
        assert here and here[0] == "it has no NVIDIA H200 to measure on"
        assert not [member for member in members.active if member.measures]
    finally:
        members.close()
        ray.shutdown()
        cluster.remove_node(node)


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
