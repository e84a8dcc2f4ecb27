"""Whose fault it is that a file cannot be imported: its own, where ONNX Runtime cannot run it either."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpu_aware_tune.errors import one_line

_LENGTH = 140  # characters, of a reason
_DTYPES = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}


def fault_of(path: Path) -> str:
    """Say why ONNX Runtime does not load a file, or not run it on zeros; "" where it does both.

    It decides, and not ONNX's checker, which has something to say about models that run everywhere.
    Files that leave extents of their inputs open are only loaded: which of them go together, none says.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = session.get_inputs()
        if all(isinstance(extent, int) for value in inputs for extent in value.shape):
            session.run(None, {value.name: _zeros(value.shape, value.type) for value in inputs})
    except Exception as refusal:
        reason = str(refusal).split(" : ", 3)[-1]
        for opening in (" failed:", "This is an invalid model. ", "Error Unrecognized "):
            reason = reason.split(opening, 1)[-1]
        return one_line(reason, _LENGTH)
    return ""


def _zeros(shape: list[int], kind: str) -> np.ndarray:
    """Zeros of a type such as "tensor(float)"."""
    element = kind.removeprefix("tensor(").removesuffix(")")
    return np.zeros(shape, _DTYPES.get(element, element))
