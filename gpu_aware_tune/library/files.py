"""Files of a folder that may come from anywhere: read only where they are regular, and not for ever."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, also through a symbolic link.

    Opening a FIFO would wait for a writer, and a device can have side effects: they are refused.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    _check_regular(os.stat(path), path)
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(file), path)  # it may have been replaced since
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes", str(path))
    return content


def sha256_of(path: Path) -> tuple[int, str]:
    """The number of bytes of a regular file, and its SHA-256.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size, _digest(file)


def has_content(path: Path, size: int, sha256: str) -> bool:
    """Whether a regular file has so many bytes and this SHA-256.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size == size and _digest(file) == sha256


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _check_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
