"""Load TVM once, quickly, so that forked workers start in milliseconds."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Iterator


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


@functools.cache
def load_tvm() -> None:
    """Import what every worker needs, `onnx` and parts of TVM; neither torch nor CUDA is started."""
    with cheap_stack(), _without_torch():
        import onnx  # noqa: F401
        import tvm
        import tvm.relax
        import tvm.s_tir.meta_schedule
        import tvm.s_tir.tensor_intrin  # noqa: F401
