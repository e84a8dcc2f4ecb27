"""Is a kernel numerically correct? A scheduled kernel against the same one without a schedule.

Errors are relative to the largest reference value of a tensor. What is allowed follows from the type
and from how many terms were added in another order:

    float32, float64, bfloat16, float16    eps * (32 + 4 * sqrt(terms))
    products in TF32                       2e-3 more
    integers, booleans                     equal; 1 in 1000 may differ where floats were rounded
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.ir.expr import TensorLoad
from tvm.s_tir import SBlock

from gpu_aware_tune.codegen.build_options import build_options
from gpu_aware_tune.codegen.cuda_toolchain import export_module
from gpu_aware_tune.kernels.tf32 import ROUNDING, is_marked
from gpu_aware_tune.kernels.traces import apply_trace

_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_ROUNDED = 1e-3  # part of the integers that may differ where they come from floats
_TF32 = 4 * ROUNDING  # of one product's two factors, twice over


@dataclass(frozen=True)
class KernelCheck:
    """A scheduled kernel against the unscheduled one; `max_error` is relative, `allowed` its limit."""

    ok: bool
    max_error: float
    allowed: float


def verify_kernel(
    module: tvm.IRModule, trace_json: str, target: tvm.target.Target, seed: int
) -> KernelCheck:
    """Run a scheduled kernel and the unscheduled one on the same random inputs.

    Args:
        module: the unscheduled kernel.
        trace_json: the schedule; "" for the unscheduled kernel, which is right by definition.
        target: what the kernel is built for; the unscheduled one always runs on the CPU.
        seed: of the inputs.
    """
    if not trace_json:
        return KernelCheck(True, 0.0, 0.0)
    # With the packing of weights in it: the copy has to be right, too.
    scheduled = apply_trace(trace_json, module).mod
    arrays = kernel_inputs(module, seed)
    on_device = target.kind.name != "llvm"
    host = tvm.target.Target({"kind": "llvm"}) if on_device else target
    wanted = _run(module, host, tvm.cpu(), arrays)
    got = _run(scheduled, target, tvm.cuda() if on_device else tvm.cpu(), arrays)
    outputs = _written(module)
    allowed, worst, ok = 0.0, 0.0, True
    for number in outputs:
        limit = _allowed(arrays[number].dtype, _terms(module), _from_floats(arrays, outputs))
        if is_marked(module["main"]):
            limit += _TF32
        error = difference(got[number], wanted[number])
        ok = ok and error <= limit
        worst, allowed = max(worst, error), max(allowed, limit)
    return KernelCheck(ok, worst, allowed)


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """How far two arrays are apart, relative to the largest finite wanted value.

    For integers and booleans it is the part of the elements that differ. Infinite where shapes or
    the places of NaN and infinity differ.
    """
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return math.inf
    if got.size == 0:
        return 0.0
    if wanted.dtype.kind in "iub":
        return float(np.mean(got != wanted))
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    same_places = np.array_equal(a[~finite], b[~finite], equal_nan=True)
    if not same_places or not np.isfinite(a[finite]).all():
        return math.inf
    if not finite.any():
        return 0.0
    largest = float(np.abs(b[finite]).max())
    return float(np.abs(a[finite] - b[finite]).max()) / (largest or 1.0)


def kernel_inputs(module: tvm.IRModule, seed: int) -> list[np.ndarray]:
    """Give random arrays for a kernel's buffers (outputs are overwritten).

    Floats are standard normal. Integers that the kernel uses as indices are 0 or 1 where every
    dimension they may index has two elements, else 0; other integers are small.
    """
    generator = np.random.default_rng(seed)
    function = module["main"]
    bound = _index_bound(function)
    arrays = []
    for buffer in function.params:
        shape = [int(extent) for extent in buffer.shape]
        dtype = np.dtype(str(buffer.dtype)) if str(buffer.dtype) != "bool" else np.dtype(bool)
        if dtype.kind == "f":
            arrays.append(generator.standard_normal(shape).astype(dtype))
        elif dtype.kind == "b":
            arrays.append(generator.integers(0, 2, shape).astype(dtype))
        elif bound is not None:
            arrays.append(generator.integers(0, min(bound, 2), shape).astype(dtype))
        else:
            low = 0 if dtype.kind == "u" else -8
            arrays.append(generator.integers(low, 9, shape).astype(dtype))
    return arrays


def _index_bound(function: Any) -> int | None:
    """The smallest dimension that is indexed by values read from a buffer; None where none is."""
    extents: list[int] = []

    def visit(load: Any) -> None:
        for index, extent in zip(load.indices, load.source.shape, strict=True):
            inner: list[Any] = []
            tvm_ffi.structural_walk(index, (TensorLoad, inner.append))
            if inner:
                extents.append(int(extent))

    tvm_ffi.structural_walk(function.body, (TensorLoad, visit))
    return min(extents) if extents else None


def _written(module: tvm.IRModule) -> list[int]:
    """Numbers of the parameters that a kernel writes."""
    function = module["main"]
    written: list[Any] = []

    def visit(block: Any) -> None:
        written.extend(region.source for region in block.writes)

    tvm_ffi.structural_walk(function.body, (SBlock, visit))
    return [
        number
        for number, buffer in enumerate(function.params)
        if any(buffer.same_as(other) for other in written)
    ]


def _terms(module: tvm.IRModule) -> int:
    """The most terms that one value of a kernel is made of."""
    most = 1

    def visit(block: Any) -> None:
        nonlocal most
        terms = math.prod(
            int(iter_var.dom.extent) for iter_var in block.iter_vars if int(iter_var.iter_type) == 2
        )
        most = max(most, terms)

    tvm_ffi.structural_walk(module["main"].body, (SBlock, visit))
    return most


def _from_floats(arrays: Sequence[np.ndarray], outputs: Sequence[int]) -> bool:
    return any(a.dtype.kind == "f" for number, a in enumerate(arrays) if number not in outputs)


def _allowed(dtype: np.dtype[Any], terms: int, from_floats: bool) -> float:
    eps = _EPS.get(dtype.name)
    if eps is None:
        return _ROUNDED if from_floats else 0.0
    return eps * (32 + 4 * math.sqrt(terms))


def _run(
    module: tvm.IRModule, target: Any, device: Any, arrays: Sequence[np.ndarray]
) -> list[np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        with build_options(module, target):
            built = tvm.tirx.build(module, target=target)
        if target.kind.name != "llvm":  # build workers make source; what runs is the artifact
            path = Path(folder) / "kernel.so"
            export_module(built, path, str(target.attrs["arch"]))
            built = tvm.runtime.load_module(str(path))
        placed = [tvm.runtime.tensor(array, device) for array in arrays]
        built["main"](*placed)
        return [tensor.numpy() for tensor in placed]
