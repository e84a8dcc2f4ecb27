"""What TVM's passes must be told before they build a kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tvm
import tvm_ffi
from tvm.s_tir import SBlock

from gpu_aware_tune.kernels.vector_math import vector_math


@contextlib.contextmanager
def build_options(module: tvm.IRModule, target: tvm.target.Target) -> Iterator[None]:
    """Set TVM up for building a module of kernels for a target.

    For a CPU, exp and its like become plain arithmetic (see `vector_math`).

    TVM's storage rewriting lets the sums of a tensor-core kernel, which are float32, use the shared
    memory of its float16 tiles, and then refuses the kernel for the types' sake. Without it, dynamic
    shared memory is still shared out by the pass that knows how to.
    """
    with contextlib.ExitStack() as options:
        if target.kind.name == "llvm":
            options.enter_context(vector_math())
        if _has_float32_fragments(module):
            options.enter_context(_without_storage_rewrite())
        yield


def _without_storage_rewrite() -> tvm.transform.PassContext:
    now = tvm.transform.PassContext.current()
    return tvm.transform.PassContext(
        opt_level=now.opt_level,
        required_pass=list(now.required_pass),
        disabled_pass=list(now.disabled_pass),
        instruments=list(now.instruments),
        config={**now.config, "tirx.disable_storage_rewrite": True},
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
