"""Tuned folders of the tiny model for tests that serve, and what it must answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny_library import write_library

from gpu_aware_tune import load

Inputs = dict[str, np.ndarray]


def write_folder(folder: Path, batch: int = 1) -> Path:
    """A folder as `tune` writes it, for one and two cores; the batch is an axis of all tensors."""
    folder.mkdir(parents=True)
    return write_library(folder, batch=batch, bias_rows=batch)[1]


def draw_inputs(seed: int, rows: int = 1) -> Inputs:
    generator = np.random.default_rng(seed)
    return {
        "image": generator.random((rows, 3, 12, 12), dtype="float32"),
        "bias": generator.random((rows, 20), dtype="float32"),
    }


class Oracle:
    """The library alone, one row after the other."""

    def __init__(self, folder: Path) -> None:
        self._library = load(folder)

    def __call__(self, inputs: Inputs) -> Inputs:
        rows = len(inputs["image"])
        parts = [
            self._library({name: array[row : row + 1] for name, array in inputs.items()})
            for row in range(rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def check(self, inputs: Inputs, outputs: Inputs) -> None:
        for name, wanted in self(inputs).items():
            np.testing.assert_allclose(outputs[name], wanted, rtol=1e-5, atol=1e-5)
