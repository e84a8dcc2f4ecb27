"""Shares of cores with TVM's real thread pool: who runs, where, and one worker for them all.

Each case runs in a child process: a thread pool and a binding belong to their process for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from gpu_aware_tune.partition import usable_cores

CORES = usable_cores()

two_cores = pytest.mark.skipif(len(CORES) < 2, reason="shares of a CPU need two cores")

# A kernel of 64 parallel rows, and what each thread of this process spent on it.
PRELUDE = """
import os, sys, tempfile, threading, time
import numpy as np
import tvm
from tvm import te

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition import Device, open_partitions, share_of
from gpu_aware_tune.partition.thread_pool import thread_pools

a = te.placeholder((64, 16384), name="a")
k = te.reduce_axis((0, 24), name="k")
b = te.compute((64, 16384), lambda i, j: te.sum(a[i, j] * 0.5 + k, k), name="b")
schedule = tvm.s_tir.Schedule(te.create_prim_func([a, b]))
schedule.parallel(schedule.get_loops(schedule.get_sblock("b"))[0])
library = os.path.join(tempfile.mkdtemp(), "kernel.so")
tvm.compile(schedule.mod, target="llvm").export_library(library)
kernel = tvm.runtime.load_module(library)["main"]
thread_pools().adopt(library)
args = [tvm.runtime.tensor(np.zeros((64, 16384), "float32")) for _ in range(2)]

def ticks():
    found = {}
    for task in os.listdir("/proc/self/task"):
        fields = open(f"/proc/self/task/{task}/stat").read().rpartition(")")[2].split()
        found[int(task)] = int(fields[11]) + int(fields[12])
    return found

def workers(expected=1):
    "Threads that took part in launches of the kernel, with what they are bound to."
    # What a thread has not begun, the caller does: beside busy processes for seconds.
    for _ in range(20):
        found = once()
        if len(found) >= expected:
            break
    return found

def once(seconds=0.3):
    kernel(*args)
    for _ in range(50):  # idle pool threads spin for a while, on a busy machine a long one
        spinning = sum(ticks().values())
        time.sleep(0.1)
        if sum(ticks().values()) - spinning < 2:
            break
    before, end = ticks(), time.monotonic() + seconds
    while time.monotonic() < end:
        kernel(*args)
    spent = {task: now - before.get(task, 0) for task, now in ticks().items()}
    busiest = max(spent.values())
    return {task: os.sched_getaffinity(task) for task, n in spent.items() if n > busiest / 4}

TOTAL = len(os.sched_getaffinity(0))
device = Device("llvm", 0, "CPU", "generic", 2, "core")
"""


def child(body: str, **env: str) -> str:
    """Run a program in a fresh process and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@two_cores
def test_one_worker_switches_between_shares() -> None:
    """Which threads run, and where, follows the share; the switch costs microseconds."""
    child(
        """
        small, large = open_partitions([share_of(device, p, "cores") for p in (50, 100)], device)
        for part in (small, large):
            part.enter_worker()
            part.verify()
        me = threading.get_native_id()
        for _ in range(2):
            with large.timing_context():
                found = workers(2)
                assert len(found) == 2, found
                assert found[me] == {large.cores[0]}, found
                assert set(map(tuple, found.values())) == {(c,) for c in large.cores}, found
            with small.timing_context():
                assert workers() == {me: {small.cores[0]}}
        times = []
        for turn in range(100):
            start = time.perf_counter()
            with (small, large)[turn % 2].timing_context():
                times.append(time.perf_counter() - start)
        assert sorted(times)[50] < 500e-6, sorted(times)[50]
        for part in (small, large):
            part.close()
        assert len(os.sched_getaffinity(0)) == TOTAL
        """
    )


@two_cores
def test_an_idle_pool_thread_soon_sleeps() -> None:
    """With TVM's default it spins for 0.15 s, on a core that builds could use."""
    body = """
        (part,) = open_partitions([share_of(device, 100, "cores")], device)
        part.enter_worker()
        kernel(*args)
        start = time.process_time()
        time.sleep(0.4)
        print(time.process_time() - start)
    """
    assert float(child(body)) < 0.06


@two_cores
def test_tvms_own_pool_does_not_matter_and_each_thread_has_a_pool() -> None:
    child(
        """
        tvm.get_global_func("runtime.config_threadpool")(-2, 2, ["0", "1"])
        kernel(*args)
        (part,) = open_partitions([share_of(device, 100, "cores")], device)
        def inside():
            part.enter_worker()
            part.verify()
            me = threading.get_native_id()
            found = workers(2)
            assert len(found) == 2 and me in found and os.getpid() not in found, found
            part.close()
            return found
        part.enter_worker()
        mine = workers(2)
        assert len(mine) == 2 and os.getpid() in mine, mine
        results = []
        thread = threading.Thread(target=lambda: results.append(inside()))
        thread.start()
        thread.join()
        assert results and not set(results[0]) & set(mine), (results, mine)
        time.sleep(0.2)
        assert set(results[0]) & set(ticks()) == set()  # they ended with their caller's share
        """
    )


@two_cores
def test_a_fork_of_a_process_that_ran_kernels_has_a_pool_of_its_own() -> None:
    child(
        """
        (part,) = open_partitions([share_of(device, 100, "cores")], device)
        part.enter_worker()
        kernel(*args)
        part.close()
        thread_pools().use(part.cores)
        kernel(*args)
        pid = os.fork()
        if pid == 0:
            assert thread_pools().threads() == []
            part.enter_worker()
            part.verify()
            kernel(*args)
            os._exit(0)
        deadline = time.monotonic() + 10
        done, status = 0, 0
        while not done and time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        if not done:
            os.kill(pid, 9)
        assert done and os.waitstatus_to_exitcode(status) == 0, (done, status)
        """
    )


@two_cores
def test_a_fork_before_any_kernel_works() -> None:
    """How the worker host does it: fork after the import, set the environment, enter."""
    child(
        """
        parts = open_partitions([share_of(device, p, "cores") for p in (50, 100)], device)
        pid = os.fork()
        if pid == 0:
            os.environ.update(parts[1].env())
            for part in parts:
                part.enter_worker()
                part.verify()
            with parts[1].timing_context():
                both = len(workers(2))
            with parts[0].timing_context():
                os._exit(10 * both + len(workers()))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 21
        """
    )


def test_one_core_needs_no_pool() -> None:
    child(
        """
        device = Device("llvm", 0, "CPU", "generic", 1, "core")
        (part,) = open_partitions([share_of(device, 100, "cores")], device)
        part.enter_worker()
        part.verify()
        assert workers() == {threading.get_native_id(): {part.cores[0]}}
        """
    )
