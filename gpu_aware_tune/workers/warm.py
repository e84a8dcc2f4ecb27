"""Load TVM once, quickly, so that forked workers start in milliseconds."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import platform
import sys
import types
from collections.abc import Iterator
from pathlib import Path

_INTRINSICS = "tvm.s_tir.tensor_intrin"
_CPU_INTRINSICS = {"x86_64": "x86", "aarch64": "arm_cpu"}  # by what the kernel calls the machine


def _frames(context: int = 1) -> list[inspect.FrameInfo]:
    """Walk the caller's frames without reading any source file."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        code = frame.f_code
        found.append(
            inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None)
        )
        frame = frame.f_back  # type: ignore[assignment]
    return found


@contextlib.contextmanager
def cheap_stack() -> Iterator[None]:
    """Replace `inspect.stack` for the length of an import.

    TVM's `prim_func` decorator calls it once per intrinsic, and it then resolves the source module
    of every frame: 12 to 28 s for `tvm.s_tir.tensor_intrin`, 2 s with this walk in its place.
    """
    original = inspect.stack
    inspect.stack = _frames
    try:
        yield
    finally:
        inspect.stack = original


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hide torch for the length of an import, where it is installed and not loaded yet.

    TVM imports torch wherever it finds it, which takes seconds, and asks it for a GPU. That starts
    CUDA, and CUDA does not survive a fork: no worker could measure on the GPU.
    """
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            del sys.modules["torch"]


@contextlib.contextmanager
def _names_listed_once() -> Iterator[None]:
    """Have TVM's 51 modules of C++ functions ask for the names of all 2,000 once, not 51 times.

    The list only grows.
    """
    from tvm_ffi import registry

    original = registry.list_global_func_names
    known: list[str] = []

    def listed() -> list[str]:
        names = registry.get_global_func("ffi.FunctionListGlobalNamesFunctor")()
        known.extend(names(place) for place in range(len(known), names(-1)))
        return known

    registry.list_global_func_names = listed
    try:
        yield
    finally:
        registry.list_global_func_names = original


@functools.cache
def load_tvm() -> None:
    """Import what every worker needs, `onnx` and parts of TVM; neither torch nor CUDA is started."""
    with cheap_stack(), _without_torch(), _names_listed_once():
        import onnx  # noqa: F401
        import tvm
        import tvm.relax
        import tvm.s_tir.meta_schedule  # noqa: F401


@functools.cache
def load_intrinsics(kind: str) -> None:
    """Register TVM's tensor intrinsics, which search spaces name, for a kind of target.

    A CPU's own take 0.2 s. The package imports those of every GPU as well, which takes 3 s.

    Args:
        kind: of the target, "llvm" or "cuda".
    """
    load_tvm()
    own = _CPU_INTRINSICS.get(platform.machine())
    with cheap_stack():
        if kind == "llvm" and own:
            if _INTRINSICS not in sys.modules:
                sys.modules[_INTRINSICS] = _stand_in(_INTRINSICS)
            importlib.import_module(f"{_INTRINSICS}.{own}")
            return
        found = sys.modules.get(_INTRINSICS)
        if found is not None and found.__spec__ is None:
            del sys.modules[_INTRINSICS]  # a stand-in; what it has imported stays
        importlib.import_module(_INTRINSICS)


def _stand_in(package: str) -> types.ModuleType:
    """A package of the same modules that imports none of them by itself; TVM imports it everywhere."""
    above, _, last = package.rpartition(".")
    made = types.ModuleType(package)
    made.__path__ = [str(Path(folder, last)) for folder in sys.modules[above].__path__]
    return made
