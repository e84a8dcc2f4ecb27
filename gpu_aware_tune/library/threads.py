"""Where a loaded library runs: on a CPU a thread bound with TVM's pool to so many cores."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tvm

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.partition.topology import usable_cores

_ONE_CORE_PER_THREAD = -2  # TVM's threading::ThreadGroup::kSpecifyOneCorePerThread

Result = TypeVar("Result")


class CoreThread:
    """Runs functions one after the other on `units` cores.

    TVM keeps a pool of threads for each thread that calls it; the pool never grows, and the calling
    thread does the first part of every kernel without being bound, so it can land on a core that a
    pool thread is bound to (seen: two threads no faster than one). In a thread of its own the pool
    has the right size and every thread a core, while the caller's thread and what it is bound to
    stay as they are. Handing a call over costs about 20 microseconds.

    The cores are the first ones this process may use: processes that run side by side should be
    given cores of their own, for instance with `taskset`.

    Args:
        units: how many cores.
        cores: which ones, where the caller has looked them up.
    """

    def __init__(self, units: int, cores: Sequence[int] | None = None) -> None:
        self.cores = tuple(usable_cores() if cores is None else cores)[:units]
        self._stopped = False
        self._queueing = threading.Lock()  # nothing is put behind the end, where it would wait
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], _Answer] | None] = (
            queue.SimpleQueue()
        )
        # A daemon: a library that was never closed must not keep the process alive.
        self._thread = threading.Thread(target=self._serve, name="tuned-library", daemon=True)
        self._thread.start()

    def run(self, function: Callable[[], Result]) -> Result:
        """Call a function in the thread; gives what it returns, raises what it raises.

        Raises:
            UserError: the thread was stopped before.
        """
        answer = _Answer()
        with self._queueing:
            if self._stopped:
                raise UserError("the library is closed: load it again")
            self._jobs.put((function, answer))
        answer.ready.acquire()
        if answer.error is not None:
            raise answer.error
        result: Result = answer.result
        return result

    def stop(self) -> None:
        """Let the thread and its pool end after what it has been given."""
        with self._queueing:
            self._stopped = True
            self._jobs.put(None)

    def _serve(self) -> None:
        bound = False
        while (job := self._jobs.get()) is not None:
            function, answer = job
            try:
                if not bound:
                    self._bind()
                    bound = True
                answer.result = function()
            except BaseException as error:  # belongs to the caller
                answer.error = error
            answer.ready.release()
            del job, function, answer  # what they hold, such as the library, may go

    def _bind(self) -> None:
        """Make TVM's pool for this thread, and give each of its threads a core."""
        names = [str(core) for core in self.cores]
        configure = tvm.get_global_func("runtime.config_threadpool")
        configure(_ONE_CORE_PER_THREAD, len(names), names)
        os.sched_setaffinity(0, {self.cores[0]})  # of this thread only; TVM leaves it unbound


class CallerThread:
    """Runs functions in the thread that calls, one after the other: what a GPU's library needs."""

    cores: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._running = threading.Lock()

    def run(self, function: Callable[[], Result]) -> Result:
        """Call a function once no other one runs."""
        with self._running:
            return function()


class _Answer:
    """What a call in the thread came to; `ready` is free once it is known."""

    def __init__(self) -> None:
        self.ready = threading.Lock()
        self.ready.acquire()
        self.result: Any = None
        self.error: BaseException | None = None
