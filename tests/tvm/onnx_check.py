"""Compiles an ONNX model without any schedule and compares it with what is numerically correct."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi
from onnx import ModelProto
from tvm import relax

from gpu_aware_tune.model.importer import Model, load_model

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "null")]
from onnx_graphs import run_onnxruntime  # noqa: E402

LLVM = tvm.target.Target({"kind": "llvm", "opt-level": 1})  # half of the time is LLVM's


def imported(
    model: ModelProto,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: str | None = None,
    target: tvm.target.Target = LLVM,
) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return load_model(path, target, shapes, dtype)


def computed(model: Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):  # in less time
        machine = relax.VirtualMachine(tvm.compile(model.module, target=LLVM), tvm.cpu())
    arrays = [feeds[spec.name] for spec in model.inputs] + list(model.weights.values())
    result = machine["main"](*[tvm.runtime.tensor(np.array(a, order="C")) for a in arrays])
    return [r.numpy() for r in (result if isinstance(result, tvm_ffi.Array) else [result])]


def assert_correct(
    model: ModelProto,
    feeds: Mapping[str, np.ndarray],
    expected: Sequence[np.ndarray] | None = None,
    tolerance: float = 2e-5,
    dtype: str | None = None,
) -> Model:
    """Compares with ONNX Runtime on the original, or with the values given.

    Args:
        tolerance: of floats, relative to the largest finite value expected; other types must be
            equal.
    """
    if expected is None:
        expected = run_onnxruntime(model, dict(feeds))
    made = imported(model, dtype=dtype)
    for spec, got, want in zip(made.outputs, computed(made, feeds), expected, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert (spec.shape, spec.dtype) == (want.shape, want.dtype.name)
        if want.dtype.kind in "iub":
            np.testing.assert_array_equal(got, want)
            continue
        left, right = got.astype(np.float64), want.astype(np.float64)
        finite = np.abs(right[np.isfinite(right)])
        scale = finite.max() if finite.size else 1.0
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance * scale)
    return made
