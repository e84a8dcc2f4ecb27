"""Threads that a loaded library runs in: on a CPU bound to cores, on a GPU inside a partition."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gpu_aware_tune.errors import TuneError, UserError
from gpu_aware_tune.partition import Partition
from gpu_aware_tune.partition.cores import SPIN_TURNS, set_pool
from gpu_aware_tune.partition.thread_pool import pools_at_hand
from gpu_aware_tune.partition.topology import usable_cores

_ENDING_S = 2.0  # for a thread's pool to end after it: a turn of spinning
_EXIT_S = 60.0  # for the inference that is under way when the process ends

# TVM has one pool of GPU memory for a process: what a library has freed goes to whoever asks next,
# also while kernels on the first one's stream still use it. So only one partition is at work.
_one_on_gpu = threading.Lock()

Result = TypeVar("Result")


class LibraryThread:
    """Runs functions one after the other in a thread of its own; what that is worth is a subclass's.

    A subclass says what the thread does before its first function, around each, and at its end.
    Handing a function over costs about 20 microseconds.

    A process that ends waits for the function that is under way: CPython ends a thread that comes
    back from TVM during its own shutdown, which C++ answers with abort(). Functions that are asked
    for later are never run, and a daemon thread that asks is left waiting.
    """

    cores: tuple[int, ...] = ()  # that the thread is bound to; empty on a GPU

    def __init__(self) -> None:
        self._process = os.getpid()
        self._stopped = False
        self._exiting = False
        self._queueing = threading.Lock()  # nothing is put behind the end, where it would wait
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], _Answer] | None] = (
            queue.SimpleQueue()
        )
        # A daemon: a library that was never closed must not keep the process alive.
        self._thread = threading.Thread(target=self._serve, name="tuned-library", daemon=True)
        self._thread.start()
        _running.add(self)

    @property
    def is_ending(self) -> bool:
        """Whether a function that takes long should return; what it returns does not matter."""
        return self._exiting

    def run(self, function: Callable[[], Result]) -> Result:
        """Call a function in the thread; returns what it returns, raises what it raises.

        Raises:
            UserError: the thread was stopped before, or belongs to this process's parent.
        """
        answer = self._put(function)
        answer.ready.acquire()
        if self._exiting and _is_daemon():
            threading.Event().wait()  # what the caller did next could be ended in C++ too
        if answer.error is not None:
            raise answer.error
        result: Result = answer.result
        return result

    def post(self, function: Callable[[], object]) -> None:
        """Call a function in the thread without waiting for it; it must not raise.

        Raises:
            UserError: as for `run`.
        """
        self._put(function)

    def _put(self, function: Callable[[], Any]) -> _Answer:
        check_process(self._process)
        answer = _Answer()
        with self._queueing:
            if self._stopped and not (self._exiting and _is_daemon()):
                raise UserError("the library is closed: load it again")
            self._jobs.put((function, answer))  # at exit nobody takes it, and the caller waits
        return answer

    def stop(self) -> None:
        """Let the thread end after what it has been given."""
        if self._process == os.getpid():  # a fork has a copy of the locks, but not the thread
            with self._queueing:
                self._stopped = True
                self._jobs.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until the thread has ended, and TVM's pool with it; `stop` comes before."""
        if self._process == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
            _wait_for_end(self._thread.native_id)

    def abandon(self) -> None:
        """Before the process ends: let the thread end after the function that is under way."""
        if self._process == os.getpid():
            with self._queueing:
                self._exiting = self._stopped = True
                self._jobs.put(None)

    def _enter(self) -> None:
        """In the thread, before its first function; again before the next one where it fails."""

    def _call(self, function: Callable[[], Result]) -> Result:
        """In the thread: call a function."""
        return function()

    def _leave(self) -> None:
        """In the thread, after its last function."""

    def _serve(self) -> None:
        entered = False
        while (job := self._jobs.get()) is not None and not self._exiting:
            function, answer = job
            try:
                if not entered:
                    self._enter()
                    entered = True
                answer.result = self._call(function)
            except BaseException as error:  # belongs to the caller
                answer.error = error
            answer.ready.release()
            del job, function, answer  # what they hold, such as the library, may go
        if entered and not self._exiting:
            self._leave()


class CoreThread(LibraryThread):
    """Runs functions on `units` cores.

    Kernels run on a pool of threads that belongs to the thread which calls them (see
    `partition.thread_pool`). In a thread of its own the pool has the right size and every thread a
    core, while the caller's thread and what it is bound to stay as they are. The pool ends with the
    thread.

    The cores are the first ones this process may use: processes that run side by side should be
    given cores of their own, for instance with `taskset`.

    Args:
        units: how many cores.
        cores: which ones, where the caller has looked them up.
    """

    def __init__(self, units: int, cores: Sequence[int] | None = None) -> None:
        self.cores = tuple(usable_cores() if cores is None else cores)[:units]
        super().__init__()

    def _enter(self) -> None:
        """Make the pool for this thread, and give each of its threads a core."""
        if pools := pools_at_hand():
            pools.use(self.cores)
            return
        # TVM's own; by default each core of it spins for 0.15 s after every call.
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", SPIN_TURNS)
        set_pool(self.cores)
        os.sched_setaffinity(0, {self.cores[0]})  # of this thread only; TVM leaves it unbound


class PartitionThread(LibraryThread):
    """Runs functions inside a partition of a GPU, and waits for what they have launched.

    TVM launches on the current stream of the calling thread, and a partition is entered and left in
    one thread: this one. The threads of a process take turns.

    Args:
        open_partition: gives the partition, entered and verified.

    Raises:
        UserError: there is no such partition.
        SetupError: it cannot be had here.
    """

    _partition: Partition

    def __init__(self, open_partition: Callable[[], Partition]) -> None:
        self._open_partition = open_partition
        super().__init__()
        try:
            self.evidence: dict[str, Any] = self.run(lambda: self._partition.evidence())
        except BaseException:
            self.stop()
            raise

    def _enter(self) -> None:
        with _one_on_gpu:
            self._partition = self._open_partition()

    def _call(self, function: Callable[[], Result]) -> Result:
        with _one_on_gpu, self._partition.timing_context():
            try:
                return function()
            finally:
                self._partition.sync()  # also after an error: what it launched holds memory

    def _leave(self) -> None:
        # After a fault nothing can be given back, and nothing is lost: the context is gone.
        with _one_on_gpu, contextlib.suppress(TuneError):
            self._partition.close()


class _Answer:
    """What a call in the thread came to; `ready` is free once it is known."""

    def __init__(self) -> None:
        self.ready = threading.Lock()
        self.ready.acquire()
        self.result: Any = None
        self.error: BaseException | None = None


def run_apart(function: Callable[[], Result]) -> Result:
    """Call a function in a thread of its own: what TVM keeps for a calling thread ends with it."""
    answer = _Answer()

    def call() -> None:
        try:
            answer.result = function()
        except BaseException as error:  # belongs to the caller
            answer.error = error

    thread = threading.Thread(target=call, name="tuned-library-opening")
    thread.start()
    thread.join()
    if answer.error is not None:
        raise answer.error
    result: Result = answer.result
    return result


def check_process(loaded_in: int) -> None:
    """Refuse what was loaded before a fork: a child has no thread of its parent.

    Raises:
        UserError: this is another process.
    """
    if loaded_in != os.getpid():
        raise UserError(
            f"the library was loaded in process {loaded_in}, and this is its fork {os.getpid()}:"
            " load it in the child"
        )


def _is_daemon() -> bool:
    return threading.current_thread().daemon


def _wait_for_end(native_id: int | None) -> None:
    """Wait for a thread's end: Python has done with it before TVM has ended its pool."""
    task = Path(f"/proc/self/task/{native_id}")
    end = time.monotonic() + _ENDING_S
    while task.exists() and time.monotonic() < end:
        time.sleep(0.0005)


_running: weakref.WeakSet[LibraryThread] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Python runs this when only daemon threads are left, and before it ends them."""
    threads = list(_running)
    for thread in threads:
        thread.abandon()
    for thread in threads:
        thread.join(_EXIT_S)
