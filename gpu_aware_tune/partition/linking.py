"""What libraries and artifacts are linked with; known without loading TVM."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from gpu_aware_tune.errors import SetupError

COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")  # in the order TVM tries them
LINKERS = ("ld", "ld.bfd", "ld.lld", "ld.gold")
_DRIVERS = ("cc", "gcc", "clang")  # of a linker


def find_compiler() -> str:
    """Returns the compiler that TVM will link libraries with.

    Raises:
        SetupError: there is none.
    """
    named = os.environ.get("CXX") or os.environ.get("CC")
    for name in (named,) if named else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    looked = f"CXX or CC is {named}" if named else f"looked for {', '.join(COMPILERS)} on PATH"
    raise SetupError(f"no C compiler ({looked}): install gcc, on Debian with `apt-get install g++`")


def find_linker(packs: bool = False) -> list[str]:
    """The command of a linker itself (4 ms), else of the C compiler in front of it (20 ms).

    Args:
        packs: it has to make objects of other files too, which a compiler does not let it.

    Raises:
        SetupError: there is none.
    """
    for name in LINKERS:
        if found := shutil.which(name):
            return [found]
    for name in () if packs else _DRIVERS:
        if found := shutil.which(name):
            return [found, "-nostdlib"]
    raise SetupError("no linker found (looked for ld): install binutils or gcc")


def run_linker(*arguments: str, folder: Path | None = None, packs: bool = False) -> None:
    """Run the fastest linker at hand in a folder; a `RuntimeError` holds what it refuses."""
    command = find_linker(packs)
    done = subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:300]}")
