"""A share of a CPU: so many cores, bound by affinity, with TVM's thread pool set to match.

TVM's thread pool CAN be reconfigured while it runs (checked with TVM 0.27 by reading the affinity
and the CPU time of each thread under /proc/self/task, see tests/tvm/test_cores.py), so one worker
process serves every share of a run:

* The pool belongs to the thread that launches kernels (it is `thread_local`) and is made at its
  first use, with as many threads as TVM believes to have cores. The packed function
  `runtime.config_threadpool(mode, n, cpus)` sets that belief to `len(cpus)` before it makes the
  pool, and later how many of the pool's threads a launch uses. The pool never grows: it must be
  made with the largest share's cores, and every later call must come from the same thread.
* With one core TVM runs the kernel on the calling thread and wakes nobody.
* TVM's own binding pins its pool threads but leaves the calling thread free, so both can land on
  one core (seen: two threads no faster than one). Hence TVM_BIND_THREADS=0, and each thread, the
  calling one included, is bound here to a core of its own. `config_threadpool` together with the
  binding costs 5 us; switching to the share that is set costs nothing.
* An idle pool thread spins for TVM_THREAD_POOL_SPIN_COUNT turns before it sleeps: 0.15 s at the
  default of 300000, which takes a core from the builds after each launch and would run on beside a
  smaller share. 20000 turns are 10 ms, far above the gap between two launches of a timing loop.
* A forked child has a copy of the parent's pool but none of its threads, and hangs at its first
  parallel kernel. So the process that workers are forked from must not have run one. `enter_worker`
  notices and refuses; a new thread of such a child would make a new pool and work.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.base import Partition
from gpu_aware_tune.partition.shares import Share
from gpu_aware_tune.partition.topology import remember_unbound, usable_cores

SPIN_TURNS = "20000"  # of an idle pool thread before it sleeps; see above
_MODE_ONE_CORE_PER_THREAD = -2  # threading::ThreadGroup::kSpecifyOneCorePerThread
_POOL_NAME = "tvm-pool"
_TASKS = Path("/proc/self/task")


@dataclass
class _Pool:
    """TVM's pool of the current thread, as far as it is known here."""

    size: Callable[[], int]
    caller: int  # thread id of the launching thread, which does the first part of every kernel
    workers: list[int]
    capacity: int
    before: frozenset[int]  # what the launching thread was bound to
    active: tuple[int, ...] = ()
    users: set[int] = field(default_factory=set)


_local = threading.local()


class CoresPartition(Partition):
    """So many cores of this machine's CPU."""

    backend: ClassVar[str] = "cores"

    def __init__(self, share: Share, cores: Sequence[int], pool_size: int | None = None) -> None:
        """Promise `cores` to `share`.

        Args:
            share: what was asked for; its units are the number of cores.
            cores: logical CPUs, each on a physical core of its own.
            pool_size: the most cores of any share that the same worker serves.
        """
        super().__init__(share)
        self.cores = tuple(cores)
        self._pool_size = max(len(self.cores), pool_size or 0)

    def env(self) -> dict[str, str]:
        """TVM's and OpenMP's thread counts, and who binds threads (not TVM)."""
        return {
            "TVM_NUM_THREADS": str(self._pool_size),
            "OMP_NUM_THREADS": str(len(self.cores)),
            "TVM_BIND_THREADS": "0",
            "TVM_THREAD_POOL_SPIN_COUNT": SPIN_TURNS,
        }

    def enter_worker(self) -> None:
        """Bind this thread and TVM's pool to the cores; makes the pool where there is none yet."""
        os.environ.update(self.env())  # TVM reads them when it makes the pool
        pool: _Pool | None = getattr(_local, "pool", None)
        if pool is None:
            pool = _local.pool = _start_pool(self._pool_size)
        if pool.capacity < len(self.cores):
            raise SetupError(
                f"TVM's thread pool has {pool.capacity} threads and cannot grow to "
                f"{len(self.cores)}: enter the largest share first"
            )
        pool.users.add(id(self))
        remember_unbound(pool.before)
        try:
            self._activate(pool)
        except SetupError:
            self.close()
            raise

    def verify(self) -> None:
        """Check how many threads TVM uses and what each of them is bound to."""
        pool = self._entered()
        self._activate(pool)
        if (size := pool.size()) != self.share.units:
            raise SetupError(f"TVM uses {size} threads where {self.share.units} were promised")
        for thread, core in zip([pool.caller, *pool.workers], self.cores, strict=False):
            if (bound := os.sched_getaffinity(thread)) != {core}:
                raise SetupError(
                    f"thread {thread} may run on cores {sorted(bound)} instead of core {core}"
                )

    @contextlib.contextmanager
    def timing_context(self) -> Iterator[None]:
        """Switch this thread and TVM's pool to the share; free of cost when they are set to it."""
        self._activate(self._entered())
        yield

    def close(self) -> None:
        """Give the calling thread its former affinity back when the last share is closed."""
        pool: _Pool | None = getattr(_local, "pool", None)
        if pool is None or id(self) not in pool.users:
            return
        pool.users.discard(id(self))
        if not pool.users:
            pool.active = ()
            remember_unbound(None)
            set_pool(range(pool.capacity))
            for thread in (pool.caller, *pool.workers):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread, pool.before)

    def _entered(self) -> _Pool:
        pool: _Pool | None = getattr(_local, "pool", None)
        if pool is None or id(self) not in pool.users:
            raise SetupError("this thread has not entered the partition: call enter_worker() first")
        return pool

    def _activate(self, pool: _Pool) -> None:
        if pool.active == self.cores:
            return
        cores = self.cores
        set_pool(cores)
        try:
            for thread, core in zip([pool.caller, *pool.workers], cores, strict=False):
                os.sched_setaffinity(thread, {core})
        except OSError as error:
            pool.active = ()
            raise SetupError(
                f"cannot bind a thread to one of cores {list(cores)}: {error}"
            ) from error
        pool.active = cores


def choose_cores(
    units: Sequence[int], disjoint: bool, available: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """Pick the cores of each share.

    Shares measured one after the other are nested, so that the rest of the machine stays free for
    other work; shares measured at the same time share no core.
    """
    cores = tuple(usable_cores() if available is None else available)
    if not disjoint:
        if max(units) > len(cores):
            raise SetupError(f"{max(units)} cores were asked for and {len(cores)} may be used")
        return [cores[:count] for count in units]
    if sum(units) > len(cores):
        raise SetupError(
            f"shares side by side need {sum(units)} cores and {len(cores)} may be used"
        )
    starts = [sum(units[:position]) for position in range(len(units))]
    return [cores[start : start + count] for start, count in zip(starts, units, strict=True)]


def set_pool(cpus: Sequence[int]) -> None:
    """Let what this thread launches use as many of TVM's threads as there are `cpus`.

    The first call of a thread makes its pool. TVM binds each of the pool's threads to one of `cpus`,
    unless TVM_BIND_THREADS is 0, and never the calling one.
    """
    configure, _ = _tvm_functions()
    configure(_MODE_ONE_CORE_PER_THREAD, len(cpus), [str(cpu) for cpu in cpus])


def _start_pool(size: int) -> _Pool:
    """Make TVM's pool for this thread and find out which threads it consists of."""
    before = frozenset(os.sched_getaffinity(0))
    caller = threading.get_native_id()
    known = _named_threads()
    with _thread_name(caller, _POOL_NAME):  # threads inherit the name of the one that makes them
        set_pool(range(size))
    workers = sorted(_named_threads() - known - {caller})
    if len(workers) != size - 1:
        raise SetupError(
            "TVM's thread pool was already made in this thread, or in the process this one was "
            f"forked from ({len(workers)} new threads, not {size - 1}): enter the partition before "
            "TVM runs anything, or in a new thread"
        )
    return _Pool(_tvm_functions()[1], caller, workers, size, before)


def _tvm_functions() -> tuple[Callable[[int, int, list[str]], Any], Callable[[], int]]:
    import tvm

    configure = tvm.get_global_func("runtime.config_threadpool")
    return configure, tvm.get_global_func("runtime.NumThreads")


def _named_threads() -> set[int]:
    found = set()
    for task in _TASKS.iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            if (task / "comm").read_text().strip() == _POOL_NAME:
                found.add(int(task.name))
    return found


@contextlib.contextmanager
def _thread_name(thread: int, name: str) -> Iterator[None]:
    comm = _TASKS / str(thread) / "comm"
    former = comm.read_text().strip()
    comm.write_text(name)
    try:
        yield
    finally:
        comm.write_text(former)
