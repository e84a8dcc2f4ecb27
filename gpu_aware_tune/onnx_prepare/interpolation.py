"""What Resize does along one axis, as a matrix: the formulas of the ONNX standard.

Coordinates are computed in float32 in the order in which ONNX Runtime computes them: where one lies
half-way between two elements, the rounding error decides which of them is the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

F32 = np.float32
MOST_ELEMENTS = 1 << 26  # of a matrix, and of a filter's taps: half a gigabyte
TIE = 1e-6  # so close to the middle between two elements counts as the middle, as in ONNX Runtime


@dataclass(frozen=True)
class Mode:
    """The attributes of a Resize, with their defaults."""

    kind: str = "nearest"
    coordinates: str = "half_pixel"
    rounding: str = "round_prefer_floor"
    cubic_a: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation: float = 0.0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Mode:
        """Return the mode that a node's attributes state."""
        return cls(
            kind=values.get("mode", b"nearest").decode(),
            coordinates=values.get("coordinate_transformation_mode", b"half_pixel").decode(),
            rounding=values.get("nearest_mode", b"round_prefer_floor").decode(),
            cubic_a=values.get("cubic_coeff_a", -0.75),
            exclude_outside=bool(values.get("exclude_outside", 0)),
            antialias=bool(values.get("antialias", 0)),
            extrapolation=values.get("extrapolation_value", 0.0),
        )


@dataclass(frozen=True)
class Axis:
    """One resized axis: elements before and after, the scale between, the region of interest."""

    extent: int
    scale: float
    size: int
    region: tuple[float, float] = (0.0, 1.0)


def resize_matrix(axis: Axis, mode: Mode) -> tuple[np.ndarray, np.ndarray] | None:
    """Return M (extent, size) and c (size,) such that `x @ M + c` resizes; None if unknown or too large."""
    if not axis.scale > 0 or axis.size < 1 or _elements(axis, mode) > MOST_ELEMENTS:
        return None
    positions = source_positions(axis, mode.coordinates)
    if positions is None or mode.kind not in ("nearest", "linear", "cubic"):
        return None
    if mode.antialias and axis.size == axis.extent:
        matrix = np.eye(axis.extent)  # as in ONNX Runtime, whatever the scale says
    else:
        matrix = _filter_matrix(positions, axis, mode)
    offset = np.zeros(axis.size)
    if mode.coordinates == "tf_crop_and_resize":
        beyond = (positions < 0) | (positions > axis.extent - 1)
        matrix[:, beyond] = 0
        offset[beyond] = mode.extrapolation
    return matrix, offset


def _filter_matrix(positions: np.ndarray, axis: Axis, mode: Mode) -> np.ndarray:
    if mode.kind == "nearest":
        taps, weights = _rounded(positions, mode.rounding)[:, None], np.ones((axis.size, 1))
    else:
        taps, weights = _filter_taps(positions.astype(np.float64), axis, mode)
        if mode.exclude_outside:
            weights = np.where((taps < 0) | (taps >= axis.extent), 0.0, weights)
            weights = weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((axis.extent, axis.size))
    columns = np.broadcast_to(np.arange(axis.size)[:, None], taps.shape)
    np.add.at(matrix, (taps.clip(0, axis.extent - 1), columns), weights)
    return matrix


def source_positions(axis: Axis, coordinates: str) -> np.ndarray | None:
    """Return where each output element lies in the input (float32); None for an unknown mode."""
    x = np.arange(axis.size, dtype=F32)
    scale, extent, half = F32(axis.scale), F32(axis.extent), F32(0.5)
    if scale == 1:  # as in ONNX Runtime, also where the formula would shift or crop
        return x
    match coordinates:
        case "half_pixel":
            return (x + half) / scale - half
        case "pytorch_half_pixel":
            return (x + half) / scale - half if axis.size > 1 else F32(0) * x
        case "half_pixel_symmetric":
            adjustment = F32(axis.size) / (scale * extent)
            return extent / F32(2) * (F32(1) - adjustment) + (x + half) / scale - half
        case "asymmetric":
            return x / scale
        case "tf_half_pixel_for_nn":
            return (x + half) / scale
        case "align_corners":
            return F32(0) * x if axis.size == 1 else x * (extent - 1) / F32(axis.size - 1)
        case "tf_crop_and_resize":
            start, end = (F32(edge) for edge in axis.region)
            if axis.size == 1:
                return half * (start + end) * (extent - 1) + F32(0) * x
            return start * (extent - 1) + x * (end - start) * (extent - 1) / F32(axis.size - 1)
    return None


def _rounded(positions: np.ndarray, rounding: str) -> np.ndarray:
    below = np.floor(positions)
    fraction = positions - below
    is_tie = np.abs(fraction - F32(0.5)) < TIE
    match rounding:
        case "floor":
            result = below
        case "ceil":
            result = np.ceil(positions)
        case _:
            up = np.where(is_tie, rounding == "round_prefer_ceil", fraction > F32(0.5))
            result = below + up
    return result.astype(np.int64)


def _filter_taps(positions: np.ndarray, axis: Axis, mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    """Return the taps of a linear or cubic filter and their weights, both (size, taps).

    With antialias the filter is stretched over the elements that one output element stands for.
    """
    stretch = _stretch(axis, mode)
    first = int(np.floor(-_reach(axis, mode))) + 1
    steps = np.arange(first, 2 - first)
    taps = np.floor(positions).astype(np.int64)[:, None] + steps
    distance = np.abs(taps - positions[:, None]) * stretch
    if mode.kind == "linear":
        weights = np.clip(1 - distance, 0, 1)
    else:
        a = mode.cubic_a
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    return taps, weights / weights.sum(axis=1, keepdims=True)


def _elements(axis: Axis, mode: Mode) -> float:
    """Return how many numbers the matrix, or what it is made of, has."""
    return axis.size * max(axis.extent, 2 * _reach(axis, mode))


def _stretch(axis: Axis, mode: Mode) -> float:
    return min(axis.scale, 1.0) if mode.antialias else 1.0


def _reach(axis: Axis, mode: Mode) -> float:
    """Return how far from its middle a filter reaches, in elements of the input."""
    return (1 if mode.kind == "linear" else 2) / _stretch(axis, mode)
