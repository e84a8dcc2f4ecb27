"""The C compiler that libraries are linked with; known without loading TVM."""

from __future__ import annotations

import os
import shutil

from gpu_aware_tune.errors import SetupError

COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")  # in the order TVM tries them


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
