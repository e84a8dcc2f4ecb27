"""Candidates that crash, hang or eat memory while they are measured, and workers that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_aware_tune.measure import Job, Measurer
from gpu_aware_tune.measure.timing import SEARCH
from gpu_aware_tune.partition import CoresPartition, find_device, open_partitions, share_of
from gpu_aware_tune.workers import WorkerHost

_BODIES = {
    "good": "return 0;",
    "crash": "*(volatile int *)0 = 1; return 0;",
    "loop": "for (;;) ; return 0;",
    "eat": "for (;;) { char *p = malloc(1 << 24); if (p) memset(p, 1, 1 << 24); } return 0;",
}
_ARGS = (((4,), "float32"),)


@pytest.fixture(scope="module")
def host() -> Iterator[WorkerHost]:
    with WorkerHost() as made:
        yield made


@pytest.fixture(scope="module")
def measurer(host: WorkerHost) -> Iterator[Measurer]:
    device, _ = find_device("llvm", 0, None)
    (partition,) = open_partitions([share_of(device, 1)], device)
    assert isinstance(partition, CoresPartition)
    made = Measurer(host, partition, timeout_s=1.5, memory_bytes=512 << 20)
    yield made
    made.close()


def artifact(folder: Path, name: str) -> str:
    """A shared library whose function "main" does what `_BODIES` says, as TVM's own would export it."""
    source, library = folder / f"{name}.c", folder / f"{name}.so"
    source.write_text(
        "#include <stdlib.h>\n#include <string.h>\n#include <stdint.h>\n"
        "int __tvm_ffi_main(void *self, void *args, int32_t count, void *result) {"
        + _BODIES[name]
        + "}\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-O0", "-o", library, source], check=True)
    return str(library)


def job(path: str) -> Job:
    return Job(path, _ARGS, "task", None, SEARCH)


@pytest.mark.parametrize(
    ("name", "kind"), [("crash", "crash"), ("loop", "timeout"), ("eat", "memory")]
)
def test_a_bad_candidate_is_a_failure_and_the_next_one_is_measured(
    measurer: Measurer, tmp_path: Path, name: str, kind: str
) -> None:
    failed = measurer.measure(job(artifact(tmp_path, name)))
    assert failed.failure is not None
    assert failed.failure.kind == kind
    after = measurer.measure(job(artifact(tmp_path, "good")))
    assert after.failure is None
    assert after.seconds is not None and after.seconds < 1e-3


def test_a_crash_names_the_signal(measurer: Measurer, tmp_path: Path) -> None:
    failed = measurer.measure(job(artifact(tmp_path, "crash")))
    assert failed.failure is not None
    assert "SIGSEGV" in failed.failure.text


def test_what_is_no_library_fails_to_load(measurer: Measurer, tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("no library")
    failed = measurer.measure(job(str(path)))
    assert failed.failure is not None
    assert failed.failure.kind == "load"


def test_workers_and_scratch_go_when_the_parent_is_killed(tmp_path: Path) -> None:
    """kill -9 of the parent: stopped, looping and waiting workers all end, the scratch folder too.

    The kernel hangs up on a group with a stopped process when the group's parent ends: the host must
    outlive that, and a worker must not be of the host's group.
    """
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys, time\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from test_faults_loop import loop\n"
        "from gpu_aware_tune.workers import WorkerHost\n"
        "host = WorkerHost()\n"
        "wait = host.spawn(time.sleep)\n"  # fails at once: sleep takes no connection
        "loops = [host.spawn(loop) for _ in range(2)]\n"
        "assert os.getpgid(loops[1].pid) == loops[1].pid\n"
        "loops[0].pause()\n"
        "os.kill(host._process.pid, signal.SIGHUP)\n"
        "print(host._process.pid, loops[0].pid, loops[1].pid, host.scratch, flush=True)\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "test_faults_loop.py").write_text("def loop(connection):\n    while True: pass\n")
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    parent = subprocess.Popen(
        [sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    *pids, scratch = parent.stdout.readline().split()
    assert Path(scratch).is_dir()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 10
    while time.monotonic() < end and (any(map(alive, pids)) or Path(scratch).exists()):
        time.sleep(0.05)
    assert not [pid for pid in pids if alive(pid)]
    assert not Path(scratch).exists()


def alive(pid: str) -> bool:
    """Whether a process runs (a zombie that its new parent has not reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
