"""What TVM's passes must be told before they build a kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm.s_tir import SBlock

from gpu_aware_tune.kernels.vector_math import vector_math


@contextlib.contextmanager
def build_options(
    module: tvm.IRModule, target: tvm.target.Target, checks: bool = False
) -> Iterator[None]:
    """Set TVM up for building a module of kernels for a target.

    For a CPU, exp and its like become plain arithmetic (see `vector_math`).

    TVM's storage rewriting lets the sums of a tensor-core kernel, which are float32, use the shared
    memory of its float16 tiles, and then refuses the kernel for the types' sake. Without it, dynamic
    shared memory is still shared out by the pass that knows how to.

    Args:
        module: the kernels, scheduled or not.
        target: what to build them for.
        checks: have every kernel check the types and shapes of what it is called with, as in a library,
            whose weights nothing else checks. A candidate is called with what was made for it: its
            checks would be a quarter of its build's time, of the smallest kernels half of it.
    """
    config = {"tirx.disable_assert": not checks}
    if _has_float32_fragments(module):
        config["tirx.disable_storage_rewrite"] = True
    with contextlib.ExitStack() as options:
        if target.kind.name == "llvm":
            options.enter_context(vector_math())
        options.enter_context(_with_config(config))
        yield


def _with_config(changes: Mapping[str, Any]) -> tvm.transform.PassContext:
    """The present options with some of their values changed."""
    now = tvm.transform.PassContext.current()
    return tvm.transform.PassContext(
        opt_level=now.opt_level,
        required_pass=list(now.required_pass),
        disabled_pass=list(now.disabled_pass),
        instruments=list(now.instruments),
        config={**now.config, **changes},
    )


def _has_float32_fragments(module: tvm.IRModule) -> bool:
    found = False

    def visit(block: Any) -> None:
        nonlocal found
        found = found or any(
            buffer.scope() == "wmma.accumulator" and str(buffer.dtype) == "float32"
            for buffer in block.alloc_buffers
        )

    for function in module.functions.values():
        if isinstance(function, tvm.tirx.PrimFunc):
            tvm_ffi.structural_walk(function.body, (SBlock, visit))
    return found
