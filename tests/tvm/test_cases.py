"""Small models that were once computed wrongly or refused, with the right answers.

They lie in a folder beside the checkout, which a user's machine does not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tiny_library import target, target_json

from gpu_aware_tune.codegen.compile import compile_model
from gpu_aware_tune.library import RunFacts, export, link, load
from gpu_aware_tune.library.manifest import ShareFacts
from gpu_aware_tune.model.importer import load_model

CASES = ROOT.parent / "shared" / "cases"
FILES = sorted(CASES.glob("*.onnx"))
# The order of what TopK finds is free where sorted=0: compared as sets.
UNORDERED = {"topk_unsorted"}


def tolerance(dtype: str) -> float:
    return 1e-3 if dtype == "float32" else 1e-2


def as_floats(array: np.ndarray) -> Any:
    """bfloat16 is kept as two bytes in an .npz file."""
    if array.dtype.kind == "V":
        import ml_dtypes

        array = array.view(ml_dtypes.bfloat16)
    return array


@pytest.mark.skipif(not FILES, reason=f"{CASES} is not there")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_library_of_a_case_is_right(path: Path, tmp_path: Path) -> None:
    dtype = "float16" if path.stem.startswith("dt16") else None
    model = load_model(path, target(), dtype=dtype)
    link(compile_model(model, target(), {}), tmp_path / "lib.so")
    facts = RunFacts(
        device="llvm/test/cpu", shares=(ShareFacts(2, percent=100, target=target_json(2)),)
    )
    export(tmp_path / "out", model, {2: tmp_path / "lib.so"}, facts)
    with np.load(path.with_suffix(".npz"), allow_pickle=True) as stored:
        names = [str(name) for name in stored["names"]]
        inputs = {name: as_floats(stored[f"in_{n}"]) for n, name in enumerate(names)}
        wanted = [as_floats(stored[f"out_{n}"]) for n in range(len(model.outputs))]
    library = load(tmp_path / "out")
    outputs = library({spec.name: inputs[spec.name] for spec in library.inputs})
    for got, want in zip(outputs.values(), wanted, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if path.stem in UNORDERED:
            got, want = np.sort(got, axis=None), np.sort(want, axis=None)
        if "float" not in want.dtype.name:
            np.testing.assert_array_equal(got, want)
            continue
        exact = want.astype(np.float64)
        scale = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0))
        allowed = tolerance(want.dtype.name)
        np.testing.assert_allclose(
            got.astype(np.float64), exact, rtol=allowed, atol=allowed * scale, equal_nan=True
        )
