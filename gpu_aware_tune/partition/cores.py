"""A share of a CPU: so many cores, bound by affinity, with a pool of threads to match.

The pool can be switched while it runs (checked by reading the affinity and the CPU time of each
thread under /proc/self/task, see tests/tvm/test_cores.py), so one worker process serves every share
of a run:

* The pool belongs to the thread that launches kernels (see `thread_pool`). Each of its threads, the
  calling one included, is bound to a core of its own. Switching to the share that is set is free,
  switching to another one takes 2 us a thread.
* With one core a kernel runs on the calling thread and wakes nobody.
* A forked child has none of its parent's threads; it gets a pool of its own when it enters.

TVM's own pool (`set_pool`) serves where ours cannot be had. It is made at a thread's first use, never
grows, binds its threads but not the calling one (seen: both on one core, two threads no faster than
one; hence TVM_BIND_THREADS=0), and an idle thread of it spins for TVM_THREAD_POOL_SPIN_COUNT turns
before it sleeps: 0.15 s at the default of 300000, 10 ms at 20000.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.base import Partition
from gpu_aware_tune.partition.shares import Share
from gpu_aware_tune.partition.thread_pool import ThreadPools, thread_pools
from gpu_aware_tune.partition.topology import remember_unbound, usable_cores

SPIN_TURNS = "20000"  # of an idle thread of TVM's pool before it sleeps; see above
_MODE_ONE_CORE_PER_THREAD = -2  # threading::ThreadGroup::kSpecifyOneCorePerThread


@dataclass
class _Entered:
    """The shares that a thread has entered, and which of them its pool is set to."""

    pools: ThreadPools
    before: frozenset[int]  # what the thread was bound to
    active: tuple[int, ...] = ()
    users: set[int] = field(default_factory=set)


_local = threading.local()


class CoresPartition(Partition):
    """So many cores of this machine's CPU."""

    backend: ClassVar[str] = "cores"

    def __init__(self, share: Share, cores: Sequence[int]) -> None:
        """Promise `cores` to `share`.

        Args:
            share: what was asked for; its units are the number of cores.
            cores: logical CPUs, each on a physical core of its own.
        """
        super().__init__(share)
        self.cores = tuple(cores)

    def env(self) -> dict[str, str]:
        """Thread counts of TVM's own pool and of OpenMP, and who binds threads (not TVM)."""
        return {
            "TVM_NUM_THREADS": str(len(self.cores)),
            "OMP_NUM_THREADS": str(len(self.cores)),
            "TVM_BIND_THREADS": "0",
            "TVM_THREAD_POOL_SPIN_COUNT": SPIN_TURNS,
        }

    def enter_worker(self) -> None:
        """Bind this thread and its pool to the cores; makes the pool where there is none yet."""
        os.environ.update(self.env())
        entered: _Entered | None = getattr(_local, "entered", None)
        if entered is None:
            before = frozenset(os.sched_getaffinity(0))
            entered = _local.entered = _Entered(thread_pools(), before)
        entered.users.add(id(self))
        remember_unbound(entered.before)
        try:
            self._activate(entered)
        except SetupError:
            self.close()
            raise

    def verify(self) -> None:
        """Check how many threads launches use and what each of them is bound to."""
        entered = self._entered()
        self._activate(entered)
        threads = entered.pools.threads()
        if len(threads) != self.share.units:
            raise SetupError(
                f"kernels use {len(threads)} threads where {self.share.units} were promised"
            )
        for thread, core in zip(threads, self.cores, strict=True):
            if (bound := os.sched_getaffinity(thread)) != {core}:
                raise SetupError(
                    f"thread {thread} may run on cores {sorted(bound)} instead of core {core}"
                )

    @contextlib.contextmanager
    def timing_context(self) -> Iterator[None]:
        """Switch this thread and its pool to the share; free of cost when they are set to it."""
        self._activate(self._entered())
        yield

    def close(self) -> None:
        """End the pool and give the thread its former affinity back when the last share is closed."""
        entered: _Entered | None = getattr(_local, "entered", None)
        if entered is None or id(self) not in entered.users:
            return
        entered.users.discard(id(self))
        if not entered.users:
            del _local.entered
            remember_unbound(None)
            entered.pools.close()
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, entered.before)

    def _entered(self) -> _Entered:
        entered: _Entered | None = getattr(_local, "entered", None)
        if entered is None or id(self) not in entered.users:
            raise SetupError("this thread has not entered the partition: call enter_worker() first")
        return entered

    def _activate(self, entered: _Entered) -> None:
        if entered.active != self.cores:
            entered.active = ()
            entered.pools.use(self.cores)
            entered.active = self.cores


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
    """Let what this thread launches on TVM's own pool use as many threads as there are `cpus`.

    The first call of a thread makes its pool. TVM binds each of the pool's threads to one of `cpus`,
    unless TVM_BIND_THREADS is 0, and never the calling one.
    """
    import tvm

    configure = tvm.get_global_func("runtime.config_threadpool")
    configure(_MODE_ONE_CORE_PER_THREAD, len(cpus), [str(cpu) for cpu in cpus])
