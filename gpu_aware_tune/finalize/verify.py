"""Are the numbers right? A kernel against its plain loops; a library against the plain model and
ONNX Runtime.

Errors are given relative to the largest reference value of a tensor. What is allowed follows from
the type and from how many terms were added in another order:

    float32, float64, bfloat16, float16    eps * (32 + 4 * sqrt(terms)), for one kernel
    products in TF32                       2e-3 more
    integers, booleans                     equal; 1 in 1000 may differ where floats were rounded
    a whole model                          5e-4 (float32), 1e-2 (TF32), 5e-2 (where float16 is involved)
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.ir.expr import TensorLoad
from tvm.s_tir import SBlock

from gpu_aware_tune.codegen.compile import compile_model
from gpu_aware_tune.codegen.cuda_toolchain import export_module, has_gpu_kernels
from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.kernels.packing import packed
from gpu_aware_tune.kernels.tf32 import ROUNDING, is_marked
from gpu_aware_tune.kernels.traces import apply_trace
from gpu_aware_tune.model.importer import Model, random_inputs

# What a loaded library is to this module.
Runnable = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]

_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_ROUNDED = 1e-3  # part of the integers that may differ where they come from floats
_TF32 = 4 * ROUNDING  # of one product's two factors, twice over
_MODEL_FLOAT32, _MODEL_TF32, _MODEL_FLOAT16 = 5e-4, 1e-2, 5e-2


@dataclass(frozen=True)
class KernelCheck:
    """A scheduled kernel against its plain loops; `max_error` is relative, `allowed` its limit."""

    ok: bool
    max_error: float
    allowed: float


@dataclass(frozen=True)
class VerifyReport:
    """A library against its references; `errors` has the largest error against each."""

    ok: bool
    max_error: float
    allowed: float
    errors: Mapping[str, float]
    text: str


def verify_kernel(
    module: tvm.IRModule, trace_json: str, target: tvm.target.Target, seed: int
) -> KernelCheck:
    """Run a scheduled kernel and its plain loops on the same random inputs.

    Args:
        module: the unscheduled kernel.
        trace_json: the schedule; "" for the plain loops, which are right by definition.
        target: what the kernel is built for; the plain loops always run on the CPU.
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


class References:
    """What a model computes for random inputs without schedules, and in ONNX Runtime.

    Worked out when first needed and kept, since all libraries of a model are compared with the
    same numbers and the plain loops are slow.

    Args:
        model: what the libraries were compiled from.
        seed: of the inputs.
        use_onnxruntime: run it there too, where it is installed and can run the model.
    """

    def __init__(self, model: Model, seed: int, use_onnxruntime: bool = True) -> None:
        self._model = model
        self._use_onnxruntime = use_onnxruntime
        self.inputs = random_inputs(model.inputs, seed)

    @functools.cached_property
    def outputs(self) -> dict[str, list[np.ndarray] | str]:
        """By the reference's name: its outputs, or why there are none."""
        found = {"plain loops": _plain_outputs(self._model, self.inputs)}
        if self._use_onnxruntime:
            found["ONNX Runtime"] = _onnxruntime_outputs(self._model, self.inputs)
        return found


def verify_library(
    model: Model,
    library: Runnable | Path | str,
    seed: int,
    use_onnxruntime: bool = True,
    entry: str = "main",
) -> VerifyReport:
    """Run a library, the same model without schedules, and ONNX Runtime on the same random inputs.

    Args:
        model: what the library was compiled from.
        library: loaded, or the path of its `.so`, which is run in this process.
        seed: of the inputs.
        use_onnxruntime: compare with it too, where it is installed and can run the model.
        entry: the function of a `.so` that holds several shares: "main_2" for 2 units.
    """
    references = References(model, seed, use_onnxruntime)
    return judge(model, _library_outputs(model, library, references.inputs, entry), references)


def judge(model: Model, got: Sequence[np.ndarray], references: References) -> VerifyReport:
    """Compare what a library gave for the references' inputs with the references."""
    outputs = references.outputs
    errors = {n: _largest(got, r) for n, r in outputs.items() if not isinstance(r, str)}
    notes = [reference for reference in outputs.values() if isinstance(reference, str)]
    if not errors:
        raise TuneError(f"the library cannot be verified: {'; '.join(notes)}")
    allowed = _allowed_of_model(model)
    worst = max(errors.values())
    parts = [f"error {error:.1e} against {name}" for name, error in errors.items()] + notes
    text = ", ".join(parts) + f" (allowed {allowed:.0e})"
    return VerifyReport(worst <= allowed, worst, allowed, errors, text)


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


def _allowed_of_model(model: Model) -> float:
    if _uses_float16(model):
        return _MODEL_FLOAT16
    return _MODEL_TF32 if _uses_tf32(model) else _MODEL_FLOAT32


def _uses_float16(model: Model) -> bool:
    """Whether any kernel reads or writes float16; inputs, outputs and small weights do not tell."""
    types: set[str] = set()

    def visit(block: Any) -> None:
        types.update(str(region.source.dtype) for region in (*block.reads, *block.writes))

    for function in model.module.functions.values():
        if isinstance(function, tvm.tirx.PrimFunc):
            tvm_ffi.structural_walk(function.body, (SBlock, visit))
    return "float16" in types


def _uses_tf32(model: Model) -> bool:
    kernels = model.module.functions.values()
    return any(isinstance(f, tvm.tirx.PrimFunc) and is_marked(f) for f in kernels)


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
        built = tvm.tirx.build(module, target=target)
        if target.kind.name != "llvm":  # build workers make source; what runs is the artifact
            path = Path(folder) / "kernel.so"
            export_module(built, path, str(target.attrs["arch"]))
            built = tvm.runtime.load_module(str(path))
        placed = [tvm.runtime.tensor(array, device) for array in arrays]
        built["main"](*placed)
        return [tensor.numpy() for tensor in placed]


def _largest(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    if len(got) != len(wanted):
        raise TuneError(f"the library gives {len(got)} outputs, the reference {len(wanted)}")
    return max((difference(g, w) for g, w in zip(got, wanted, strict=True)), default=0.0)


def _library_outputs(
    model: Model, library: Runnable | Path | str, inputs: Mapping[str, np.ndarray], entry: str
) -> list[np.ndarray]:
    if callable(library):
        return list(library(inputs).values())
    module = tvm.runtime.load_module(str(library))
    device = tvm.cuda() if has_gpu_kernels(module) else tvm.cpu()
    return _run_main(module, device, model, inputs, entry)


def _plain_outputs(model: Model, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray] | str:
    """What the model gives without any schedule on the CPU, or why that is not known."""
    host = tvm.target.Target({"kind": "llvm"})
    try:
        plain = compile_model(model, host, {}).jit()
    except Exception as error:  # a model legalized for a GPU may hold kernels that bind threads
        return f"the plain loops cannot be compiled for the CPU ({type(error).__name__})"
    return _run_main(plain, tvm.cpu(), model, inputs)


def _run_main(
    module: Any, device: Any, model: Model, inputs: Mapping[str, np.ndarray], entry: str = "main"
) -> list[np.ndarray]:
    machine = relax.VirtualMachine(module, device)
    placed = [tvm.runtime.tensor(array, device) for array in inputs.values()]
    weights = packed(
        machine, (tvm.runtime.tensor(w, device) for w in model.weights.values()), entry
    )
    result = machine[entry](*placed, *weights)
    outputs = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
    return [output.numpy() for output in outputs]


def _onnxruntime_outputs(model: Model, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray] | str:
    """ONNX Runtime's outputs, or why there are none."""
    try:
        import onnxruntime
    except ImportError:
        return "ONNX Runtime is not installed"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            model.prepared, options, providers=["CPUExecutionProvider"]
        )
        outputs: list[np.ndarray] = session.run([spec.name for spec in model.outputs], dict(inputs))
    except Exception as error:  # its errors derive from Exception only
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        return f"ONNX Runtime cannot run it ({reason})"
    return outputs
