"""The pool of threads that runs the parallel loops of kernels, called as kernels call it."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition import thread_pool
from gpu_aware_tune.partition.thread_pool import ThreadPools, pools_code

CORE = min(os.sched_getaffinity(0))


class Group(ctypes.Structure):
    _fields_ = (("sync_handle", ctypes.c_void_p), ("num_task", ctypes.c_int32))


LAMBDA = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(Group), ctypes.c_void_p)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "threads.so"
    path.write_bytes(pools_code())
    return path


class Pool:
    """A pool of so many threads, all on one core: nothing here depends on how many there are."""

    def __init__(self, file: Path, threads: int) -> None:
        self.pools = ThreadPools(file)
        self.pools.use([CORE] * threads)
        self._launch = ctypes.CDLL(str(file)).tune_pool_launch

    def launch(self, function: Callable[[int, int], int], tasks: int = 0) -> int:
        def call(task: int, group: ctypes._Pointer[Group], _: int | None) -> int:
            return function(task, group.contents.num_task)

        return int(self._launch(LAMBDA(call), None, tasks))


@pytest.fixture
def pool(file: Path) -> Iterator[Pool]:
    before = os.sched_getaffinity(0)
    made = Pool(file, 3)
    yield made
    made.pools.close()
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("tasks", [0, 1, 2, 3, 4, 7])
def test_every_task_is_done_once(pool: Pool, tasks: int) -> None:
    for turn in range(300):
        pool.pools.spin((0, 1e-6, 1e-3)[turn % 3])
        done: Counter[int] = Counter()
        told: set[int] = set()

        def note(task: int, count: int, done: Counter[int] = done, told: set[int] = told) -> int:
            done[task] += 1
            told.add(count)
            return 0

        assert pool.launch(note, tasks) == 0
        assert done == Counter(range(tasks or 3))
        assert told == {tasks or 3}
    pool.pools.spin(2e-4)


def test_the_threads_share_the_work_and_sleep_between(pool: Pool) -> None:
    seen: set[int] = set()

    def wait_for_others(_task: int, _count: int) -> int:
        seen.add(threading.get_native_id())
        end = time.monotonic() + 10
        while len(seen) < 3 and time.monotonic() < end:
            time.sleep(0.001)
        return 0

    for _ in range(2):
        seen.clear()
        time.sleep(0.05)  # they are asleep
        assert pool.launch(wait_for_others) == 0
        assert seen == set(pool.pools.threads())
    assert pool.pools.threads()[0] == threading.get_native_id()


def test_the_caller_does_what_no_thread_has_begun(pool: Pool) -> None:
    """The threads are on the caller's core, and come after it there."""
    me, mine = threading.get_native_id(), 0
    for thread in pool.pools.threads()[1:]:
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))

    def spin(_task: int, _count: int) -> int:
        nonlocal mine
        mine += threading.get_native_id() == me
        return 0

    launches = 300
    for _ in range(launches):
        assert pool.launch(spin) == 0
    assert mine > launches  # more than its own


def test_a_task_that_fails_fails_the_launch(pool: Pool) -> None:
    for bad in range(3):
        assert pool.launch(lambda task, _, bad=bad: -1 if task == bad else 0) == -1  # type: ignore[misc]
    assert pool.launch(lambda *_: 0) == 0


def test_a_parallel_loop_in_a_task_is_done_by_its_thread(pool: Pool) -> None:
    done: list[tuple[int, int]] = []

    def outer(_task: int, _count: int) -> int:
        me = threading.get_native_id()
        inner: list[int] = []

        def note(task: int, _: int) -> int:
            assert threading.get_native_id() == me
            inner.append(task)
            return 0

        result = pool.launch(note, 4)
        done.append((result, len(inner)))
        return result

    assert pool.launch(outer) == 0
    assert done == [(0, 4)] * 3


def test_the_pool_grows_and_shrinks(pool: Pool) -> None:
    for count in (1, 5, 2, 3):
        pool.pools.use([CORE] * count)
        assert len(pool.pools.threads()) == count
        done: Counter[int] = Counter()
        assert pool.launch(lambda task, _, done=done: done.update([task]) or 0) == 0  # type: ignore[misc]
        assert done == Counter(range(count))


def test_each_caller_has_a_pool_that_ends_with_it(pool: Pool, file: Path) -> None:
    own: list[int] = []

    def call() -> None:
        mine = Pool(file, 3)
        own.extend(mine.pools.threads())
        mine.launch(lambda *_: 0)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(set(own)) == 3
    assert not set(own) & set(pool.pools.threads())
    end = time.monotonic() + 10
    while (left := set(own) & set(map(int, os.listdir("/proc/self/task")))) and (
        time.monotonic() < end
    ):
        time.sleep(0.01)
    assert not left


def test_a_forked_child_has_no_pool_and_may_make_one(pool: Pool) -> None:
    assert pool.launch(lambda *_: 0) == 0
    pid = os.fork()
    if pid == 0:
        alone = pool.pools.threads() == [] and pool.launch(lambda *_: 0, 2) == 0
        pool.pools.use([CORE] * 2)
        os._exit(0 if alone and pool.launch(lambda *_: 0) == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_core_that_is_not_there_is_told(pool: Pool) -> None:
    with pytest.raises(SetupError, match=r"cannot bind a thread to one of cores \[1000\]: Invalid"):
        pool.pools.use([1000])
    pool.pools.use([CORE] * 3)
    assert pool.launch(lambda *_: 0) == 0


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(thread_pool, "_opened", None)
    monkeypatch.delenv("GPU_AWARE_TUNE_THREADS", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(thread_pool, "pools_code", pools_code.__wrapped__)
    with pytest.raises(SetupError, match="no C compiler"):
        thread_pool.thread_pools()
    assert thread_pool.pools_at_hand() is None
    (tmp_path / "g++").write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    with pytest.raises(SetupError, match=r"g\+\+ cannot compile the thread pool: no such header"):
        thread_pool.thread_pools()


def test_compiling_and_loading_leave_no_file_even_for_a_moment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(thread_pool, "_opened", None)
    monkeypatch.delenv("GPU_AWARE_TUNE_THREADS", raising=False)
    # The compiler takes another folder, Python would fail.
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(thread_pool, "pools_code", pools_code.__wrapped__)
    assert thread_pool.thread_pools().threads() == []


def test_a_file_that_was_opened_serves_children_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path
) -> None:
    monkeypatch.setattr(thread_pool, "_opened", None)
    monkeypatch.setenv("GPU_AWARE_TUNE_THREADS", "")
    bad = tmp_path / "bad.so"
    bad.write_bytes(b"no library")
    thread_pool.open_pools(bad)
    thread_pool.open_pools(tmp_path / "missing.so")
    assert thread_pool._opened is None
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(file, folder / "threads.so")
    thread_pool.open_pools(folder / "threads.so")
    assert os.environ["GPU_AWARE_TUNE_THREADS"] == str(folder / "threads.so")
    monkeypatch.setattr(thread_pool, "_opened", None)
    monkeypatch.setattr(thread_pool, "pools_code", None)  # not called
    assert thread_pool.thread_pools() is thread_pool.pools_at_hand()
