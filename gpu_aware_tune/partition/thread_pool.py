"""The threads that run the parallel loops of kernels on CPU cores, in place of TVM's pool.

TVM's threads wait by giving their core away (`sched_yield`) until there is work. Beside a busy
process on the same core each of these costs the rest of that process's turn, milliseconds: on two
cores with a busy loop each, SqueezeNet took 29 times as long as alone, ONNX Runtime's 4 times. And
what one of TVM's threads was given nobody else does, so a launch lasts until that thread gets its core.

The pool of `thread_pool.c` spins without giving its core away, sleeps soon, and lets the launching
thread do what no other has begun. A kernel finds it through a variable of its shared object
(`__TVMBackendParallelLaunch`, which TVM sets on loading): `adopt` points that here. Threads without a
pool of ours go on with TVM's, and so does a library that is loaded without this package.

The machine code comes from a C compiler. `export` puts it beside the libraries, because the machines
that load them may have none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.linking import find_compiler

FILE = "threads.so"  # beside exported libraries

_SOURCE = Path(__file__).with_name("thread_pool.c")
_OPTIONS = ("-x", "c", "-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
_COMPILE_S = 60.0
_MOST_THREADS = 1024  # CPU_SETSIZE, as in the source
_FILE_VARIABLE = "GPU_AWARE_TUNE_THREADS"  # where workers find a file that their parent has opened

_opening = threading.Lock()
_opened: ThreadPools | None = None


class ThreadPools:
    """The code of the pools, loaded; each thread that calls `use` has a pool of its own.

    Args:
        path: the shared object.

    Raises:
        OSError: it cannot be loaded, or is something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            code = ctypes.CDLL(str(path))
            self._use, self._threads = code.tune_pool_use, code.tune_pool_threads
            self._adopt, self._close, self._spin = (
                code.tune_pool_adopt,
                code.tune_pool_close,
                code.tune_pool_spin,
            )
        except AttributeError as error:
            raise OSError(f"{path} is no thread pool") from error
        self._spin.argtypes = [ctypes.c_long]
        self._close.restype = self._spin.restype = None

    def use(self, cores: Sequence[int]) -> None:
        """Let what this thread launches run on `cores`, itself on the first; 1 us where they are set.

        Raises:
            SetupError: a thread cannot be made or bound.
        """
        if error := self._use(len(cores), (ctypes.c_int * len(cores))(*cores)):
            raise SetupError(
                f"cannot bind a thread to one of cores {list(cores)}: {os.strerror(error)}"
            )

    def threads(self) -> list[int]:
        """Native ids of the threads that a launch of this thread uses; empty without a pool."""
        ids = (ctypes.c_int * _MOST_THREADS)()
        return list(ids[: self._threads(ids, _MOST_THREADS)])

    def adopt(self, library: Path | str) -> None:
        """Let the kernels of a loaded shared object launch on the pool of the thread they run in."""
        self._adopt(os.fsencode(library))

    def close(self) -> None:
        """End this thread's pool; otherwise it ends with the thread."""
        self._close()

    def spin(self, seconds: float) -> None:
        """How long idle threads spin before they sleep, in all pools of this process."""
        self._spin(round(seconds * 1e9))


def thread_pools() -> ThreadPools:
    """The pools of this process: of a file that it or its parent has opened, else compiled (0.2 s).

    Raises:
        SetupError: there is no C compiler, or it fails.
    """
    global _opened
    if _opened is None and (file := os.environ.get(_FILE_VARIABLE)):
        open_pools(Path(file))
    with _opening:
        if _opened is None:
            with _file_in_memory() as (code, path):
                code.write(pools_code())
                code.flush()
                _opened = _open(path)
        return _opened


def open_pools(path: Path) -> None:
    """Take the pools of a library's folder, unless this process has some; a bad file is left alone."""
    global _opened
    with _opening, contextlib.suppress(OSError):
        if _opened is None and path.is_file():
            _opened = ThreadPools(path)
            os.environ[_FILE_VARIABLE] = str(path.resolve())


def pools_at_hand() -> ThreadPools | None:
    """The pools of this process; None where they would have to be compiled and cannot be."""
    try:
        return thread_pools()
    except SetupError:
        return None


def adopt(library: Path | str) -> None:
    """Let a loaded library's kernels use this process's pools, where it can have some."""
    if pools := pools_at_hand():
        pools.adopt(library)


@functools.cache
def pools_code() -> bytes:
    """The content of the pools' shared object, compiled once in a process (0.2 s).

    Raises:
        SetupError: there is no C compiler, or it fails.
    """
    with _file_in_memory() as (file, path):
        command = [find_compiler(), *_OPTIONS, str(_SOURCE), "-o", str(path), "-ldl"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_COMPILE_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SetupError(f"{command[0]} cannot compile the thread pool: {error}") from error
        if done.returncode:
            said = " ".join(done.stderr.split())[:200]
            raise SetupError(f"{command[0]} cannot compile the thread pool: {said}")
        return file.read()


@contextlib.contextmanager
def _file_in_memory() -> Iterator[tuple[BinaryIO, Path]]:
    """An empty file of no folder, which nobody has to remove if this process is killed."""
    with open(os.memfd_create(FILE), "w+b") as file:
        yield file, Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def _open(path: Path) -> ThreadPools:
    try:
        return ThreadPools(path)
    except OSError as error:
        raise SetupError(f"the thread pool cannot be loaded: {error}") from error
