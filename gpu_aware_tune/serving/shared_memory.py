"""Regions of POSIX shared memory that clients register, so that tensors need not be sent.

A region is another process's file, which may shrink or vanish at any time. So it is never mapped here
(reading behind its end would be a signal, not an error) but read and written by system calls, and
looked at before each of them.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu_aware_tune.errors import UserError, one_line
from gpu_aware_tune.serving.v2 import RegionPart, TooLarge

SHARED_MEMORY = Path("/dev/shm")
MAX_REGIONS = 128  # each holds an open file
# Semaphores of the C library, and what this package shares among its own processes.
PRIVATE_PREFIXES = ("sem.", "gpu-aware-tune", "gpu_aware_tune")


@dataclass(frozen=True, slots=True)
class Region:
    """A registered region: bytes `offset` to `offset + size` of the file."""

    name: str
    key: str
    offset: int
    size: int
    descriptor: int


class Regions:
    """The regions that are registered, by name. Thread-safe.

    Args:
        max_bytes: the largest tensor that is read.
        folder: where the system keeps shared memory.
    """

    def __init__(self, max_bytes: int, folder: Path = SHARED_MEMORY) -> None:
        self._max_bytes = max_bytes
        self._folder = folder
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()

    def list(self, name: str = "") -> list[Region]:
        """All regions, or the one of that name.

        Raises:
            UserError: there is none of that name.
        """
        with self._lock:
            if name:
                return [self._find(name)]
            return list(self._regions.values())

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        """Add a region.

        Raises:
            UserError: the key is no shared memory that this user owns, it is smaller than that, or
                the name is taken.
        """
        if not name or len(name) > 256:
            raise UserError("a region's name has from 1 to 256 characters")
        if not (0 <= offset < 2**63 and 0 < size < 2**63):
            raise UserError(f"region {_shown(name)}: offset and byte_size are no range of bytes")
        with self._lock:
            if name in self._regions:
                raise UserError(f"region {_shown(name)} is registered already")
            if len(self._regions) >= MAX_REGIONS:
                raise UserError(f"{MAX_REGIONS} regions are registered, no more are taken")
            descriptor = self._open(key)
            region = Region(name, key, offset, size, descriptor)
            try:
                _check(region)
            except UserError:
                os.close(descriptor)
                raise
            self._regions[name] = region

    def unregister(self, name: str = "") -> None:
        """Forget a region, or all of them; one that is unknown is none."""
        with self._lock:
            names = [name] if name else list(self._regions)
            for one in names:
                region = self._regions.pop(one, None)
                if region is not None:
                    os.close(region.descriptor)

    def read(self, part: RegionPart) -> bytes:
        """A copy of a part of a region.

        Raises:
            UserError: the region or that part of it is not there, or no longer.
        """
        if part.size > self._max_bytes:
            raise TooLarge(f"{part.size} bytes of input; {self._max_bytes} are taken")
        with self._lock:
            region = self._checked(part)
            with _plain_errors(region):
                data = os.pread(region.descriptor, part.size, region.offset + part.offset)
        if len(data) != part.size:
            raise UserError(f"region {_shown(region.name)} shrank while it was read")
        return data

    def check(self, part: RegionPart) -> None:
        """Raise what `read` and `write` of that part would raise."""
        with self._lock:
            self._checked(part)

    def write(self, part: RegionPart, data: memoryview) -> None:
        """Write to the start of a part of a region.

        Raises:
            UserError: the region or that part is not there, or no longer, or smaller than the data.
        """
        if len(data) > part.size:
            raise UserError(
                f"region {_shown(part.region)}: {len(data)} bytes of output for {part.size} bytes"
            )
        with self._lock:
            region = self._checked(part)
            start, done = region.offset + part.offset, 0
            with _plain_errors(region):
                while done < len(data):
                    done += os.pwrite(region.descriptor, data[done:], start + done)

    def close(self) -> None:
        """Forget all regions."""
        self.unregister()

    def _find(self, name: str) -> Region:
        try:
            return self._regions[name]
        except KeyError:
            raise UserError(f"no region {_shown(name)} is registered") from None

    def _checked(self, part: RegionPart) -> Region:
        region = self._find(part.region)
        if part.offset < 0 or part.size < 0 or part.offset + part.size > region.size:
            raise UserError(
                f"bytes {part.offset} to {part.offset + part.size} are not within region"
                f" {_shown(region.name)} of {region.size} bytes"
            )
        _check(region)
        return region

    def _open(self, key: str) -> int:
        name = key.removeprefix("/")
        if not 0 < len(name.encode(errors="replace")) <= 255 or name in (".", ".."):
            raise UserError("a key of shared memory has from 1 to 255 bytes")
        if "/" in name or not name.isprintable() or name.startswith(PRIVATE_PREFIXES):
            raise UserError(f"key {_shown(key)} is not one of a client's shared memory")
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        try:
            descriptor = os.open(self._folder / name, flags)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no name of a file"
            raise UserError(f"shared memory {_shown(key)}: {reason}") from None
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            os.close(descriptor)
            raise UserError(f"shared memory {_shown(key)} is not a region of this user")
        return descriptor


@contextlib.contextmanager
def _plain_errors(region: Region) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"region {_shown(region.name)}: {error.strerror}") from None


def _check(region: Region) -> None:
    """That the region is still there and as large as it was registered."""
    facts = os.fstat(region.descriptor)
    if not facts.st_nlink:
        raise UserError(f"region {_shown(region.name)}: its shared memory was removed")
    if facts.st_size < region.offset + region.size:
        raise UserError(
            f"region {_shown(region.name)}: its shared memory has {facts.st_size} bytes, not"
            f" {region.offset + region.size}"
        )


def _shown(name: str) -> str:
    return one_line(name, 80) if name else "''"
