"""Who writes a record store: any number of processes, each of which can be seen to be alive.

SQLite keeps their writes apart. What it cannot tell is whether the process whose run is open in the
store still lives, which decides whether that run is to be closed as interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import ClassVar

from gpu_aware_tune.errors import SetupError

_GUARD = 0  # the byte that is locked while a process comes or goes


class WriterLock:
    """A process's mark that it writes a store: one locked byte of a file beside it, at its id.

    A POSIX record lock, not flock(): it belongs to this process alone, so workers forked from it
    leave no mark after it was killed. Stores of one process share the mark.
    """

    # Closing any descriptor of a file gives up all locks of the process on it: one is shared.
    _held: ClassVar[dict[str, tuple[int, int]]] = {}  # path -> descriptor, stores that use it
    _of: ClassVar[int] = 0  # the process that `_held` is true of

    def __init__(self, path: Path) -> None:
        self.path = lock_path(path)
        self._name = os.path.realpath(self.path)
        if WriterLock._of != os.getpid():  # forked: the locks are the parent's
            WriterLock._held, WriterLock._of = {}, os.getpid()
        self._owner = os.getpid()
        fd, users = self._held.get(self._name, (-1, 0))
        try:
            self._held[self._name] = (fd if users else self._acquire(), users + 1)
        except OSError as error:
            raise SetupError(
                f"cannot lock {self.path} ({error.strerror}); make the folder writable"
                " or give another folder with --db"
            ) from error

    @classmethod
    def descriptor(cls, path: Path) -> int | None:
        """The descriptor by which this process holds the lock file at `path`."""
        if cls._of != os.getpid():
            return None
        return cls._held.get(os.path.realpath(path), (None, 0))[0]

    def _acquire(self) -> int:
        while True:
            fd = open_plain(self.path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX, 1, _GUARD)
                # A writer that just ended may have removed the file between open and lock.
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(self.path).st_ino == os.fstat(fd).st_ino:
                        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._owner)
                        fcntl.lockf(fd, fcntl.LOCK_UN, 1, _GUARD)
                        return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def release(self) -> None:
        """Take the mark away, and the file with the last of them; not for forked children."""
        if os.getpid() != self._owner or self._name not in self._held:
            return
        fd, users = self._held[self._name]
        if users > 1:
            self._held[self._name] = (fd, users - 1)
            return
        del self._held[self._name]
        with contextlib.suppress(OSError):
            fcntl.lockf(fd, fcntl.LOCK_EX, 1, _GUARD)
            if _holder(fd, 1, 0) is None:
                self.path.unlink()
        os.close(fd)


def open_plain(path: Path, flags: int) -> int:
    """Open a regular file without following a symbolic link.

    Raises:
        OSError: it cannot be opened, or is a link, a device or a pipe.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(22, "it is no regular file")
    return fd


def lock_path(store: Path) -> Path:
    """Return the path of a store's lock file."""
    return store.with_name(store.name + ".writer")  # ".lock" is a name that SQLite uses


def is_writing(store: Path, pid: int) -> bool:
    """Tell whether a process writes a store's file now; asks, and takes nothing."""
    return _ask(store, pid, 1) is not None or (pid == os.getpid() and _is_ours(store))


def other_writer(store: Path) -> int | None:
    """Return the id of another process that writes a store's file, or None where there is none."""
    return _ask(store, 1, 0)


def _is_ours(store: Path) -> bool:
    return WriterLock.descriptor(lock_path(store)) is not None


def _ask(store: Path, start: int, length: int) -> int | None:
    path = lock_path(store)
    held = WriterLock.descriptor(path)
    if held is not None:  # closing a second descriptor of the file would release our own locks
        return _holder(held, start, length)
    try:
        fd = open_plain(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _holder(fd, start, length)
    finally:
        os.close(fd)


def _holder(fd: int, start: int, length: int) -> int | None:
    """Which other process holds a lock on these bytes of a file; a length of 0 is to the end."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, wanted))
    return None if kind == fcntl.F_UNLCK else int(pid)


_FLOCK = "hhqqi4x"  # Linux's struct flock on 64-bit machines: type, whence, start, length, pid
