"""What an export that was killed has left beside a folder: put back, or removed.

An export works in `.NAME.PID.partial`. Where the file system cannot swap two folders in one step,
the old one is `.NAME.PID.old` between two renames, and a kill there leaves no folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL, OLD = "partial", "old"


def beside(folder: Path, kind: str) -> Path:
    """This process's name for a folder that stands beside another one during an export."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.{kind}")


def restore(folder: Path) -> bool:
    """Put an old folder back that a killed export has moved away; False where there is none."""
    for old in _left(folder, OLD):
        with contextlib.suppress(OSError):  # not ours to write, or another process was faster
            old.rename(folder)
        if folder.is_dir():
            return True
    return False


def remove_stale(folder: Path) -> None:
    """Remove what killed exports have left beside the folder; an old one is put back if needed."""
    if not os.path.lexists(folder):
        restore(folder)
    for path in (*_left(folder, PARTIAL), *_left(folder, OLD)):
        shutil.rmtree(path, ignore_errors=True)


def _left(folder: Path, kind: str) -> Iterator[Path]:
    """Folders of exports that no longer run; one of this process's number is an earlier process's."""
    prefix, suffix = f".{folder.name}.", f".{kind}"
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(folder.parent)):
            if name.startswith(prefix) and name.endswith(suffix):
                pid = name.removeprefix(prefix).removesuffix(suffix)
                if pid.isdecimal() and (int(pid) == os.getpid() or not _alive(pid)):
                    yield folder.parent / name


def _alive(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()
