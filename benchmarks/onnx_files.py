"""ONNX files as cases of `benchmarks.onnx_coverage`: on drawn inputs, against ONNX Runtime."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx

from benchmarks.onnx_coverage import Case, freeze, is_random, shape_like_of

_EXTENTS = (2, 1, 3, 4, 5, 8)  # tried for an unknown extent
_HIGHEST = (3, 1, 0)  # tried for the largest integer of an input; 1 is the smallest, or 0


def files_of(folder: Path) -> tuple[list[Case], dict[str, str]]:
    """Return the ONNX files below a folder as cases, and by name why others are not among them."""
    cases, left_out = [], {}
    for path in sorted(folder.rglob("*.onnx")):
        name = path.relative_to(folder).as_posix()
        try:
            cases.append(_file_case(path, name))
        except Exception as error:
            left_out[name] = " ".join(str(error).split())[:300] or type(error).__name__
    return cases, left_out


def _file_case(path: Path, name: str) -> Case:
    """A file with inputs that ONNX Runtime accepts, and what it computes from them."""
    import onnxruntime

    model = onnx.load(path)
    taken = {tensor.name for tensor in model.graph.initializer}
    infos = [info for info in model.graph.input if info.name not in taken]
    del model.graph.input[:]
    model.graph.input.extend(infos)
    problem: Exception = ValueError("it has no nodes")
    empty: Case | None = None
    for extent, highest in itertools.product(_EXTENTS, _HIGHEST):
        rng = np.random.default_rng(0)
        fixed = onnx.ModelProto()
        fixed.CopyFrom(model)
        inputs = [_drawn(info, extent, highest, rng) for info in fixed.graph.input]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        frozen, kept = freeze(fixed, inputs, shape_like_of(fixed))
        try:
            session = onnxruntime.InferenceSession(
                frozen.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            names = [info.name for info in frozen.graph.input]
            expected = session.run(None, dict(zip(names, kept, strict=True)))
        except Exception as error:
            problem = error
            continue
        if any(not isinstance(value, np.ndarray) for value in expected):
            raise ValueError("an output is no tensor")
        half = any(array.dtype == np.float16 for array in (*kept, *expected))
        limits = (1e-2, 1e-2) if half else (1e-3, 1e-4)
        if is_random(model):
            limits = (0.0, np.inf)
        found = Case(name, path.parent.name, True, frozen, tuple(kept), tuple(expected), *limits)
        if any(value.size == 0 for value in expected):
            empty = found  # other numbers may ask for more than nothing
            continue
        return found
    if empty is not None:
        return empty
    raise problem


def _drawn(
    info: onnx.ValueInfoProto, extent: int, highest: int, rng: np.random.Generator
) -> np.ndarray:
    """An array for an input, whose unknown extents are fixed in the graph."""
    tensor = info.type.tensor_type
    if info.type.WhichOneof("value") != "tensor_type":
        raise ValueError(f"input {info.name} is no tensor")
    for dim in tensor.shape.dim:
        if not dim.HasField("dim_value") or dim.dim_value < 0:
            dim.dim_value = extent
    shape = [dim.dim_value for dim in tensor.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(min(1, highest), highest + 1, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)
