"""One writer at a time: the lock beside a record store."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import ClassVar

from gpu_aware_tune.errors import SetupError


class WriterLock:
    """The right to write one store: a locked file beside it that holds the writer's process id.

    A POSIX record lock, not flock(): it belongs to this process alone, so workers forked from it
    do not keep the store locked after it was killed.
    """

    # POSIX locks never conflict within one process, so what it holds is kept here.
    _held: ClassVar[dict[str, int]] = {}

    def __init__(self, path: Path) -> None:
        self.path = lock_path(path)
        self._name = os.path.realpath(self.path)
        self._owner = os.getpid()
        if self._held.get(self._name) == self._owner:
            raise SetupError(_busy(path, f"this process ({self._owner})"))
        try:
            self._fd = self._acquire(path)
        except OSError as error:
            raise SetupError(
                f"cannot lock {self.path} ({error.strerror}); make the folder writable"
                " or give another folder with --db"
            ) from error
        self._held[self._name] = self._owner

    @classmethod
    def holds(cls, path: Path) -> bool:
        """Whether this process holds the lock at `path`."""
        return cls._held.get(os.path.realpath(path)) == os.getpid()

    def _acquire(self, store: Path) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A writer that just ended may have removed the file between open and lock.
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(self.path).st_ino == os.fstat(fd).st_ino:
                        os.ftruncate(fd, 0)
                        os.write(fd, str(self._owner).encode())
                        return fd
            except OSError as error:
                pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
                os.close(fd)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    text = f"process {pid}" if pid else "another process"
                    raise SetupError(_busy(store, text)) from error
                raise
            os.close(fd)

    def release(self) -> None:
        """Give the right back and remove the file; not for children forked from the writer."""
        if self._held.pop(self._name, None) is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._fd)


def lock_path(store: Path) -> Path:
    """Return the path of a store's lock file."""
    return store.with_name(store.name + ".writer")  # ".lock" is a name that SQLite uses


def writer_of(store: Path) -> int | None:
    """Return the id of the process that writes a store's file, or None where there is none.

    Asks who holds the lock and takes nothing, so a run that starts just now is not refused.
    """
    path = lock_path(store)
    if WriterLock.holds(path):
        return os.getpid()  # closing a second descriptor of the file would release that lock
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, wanted))
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else int(pid)


_FLOCK = "hhqqi4x"  # Linux's struct flock on 64-bit machines: type, whence, start, length, pid


def _busy(path: Path, who: str) -> str:
    fix = "wait until that has ended or give another folder with --db"
    return f"{path} is being written by {who}; {fix}"
