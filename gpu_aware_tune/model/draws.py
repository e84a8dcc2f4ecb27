"""Inputs that find faults: several draws of every input of a model, the same for the same seed.

Standard normal numbers alone hide wrong padding (zeros are harmless), wrong rounding near integers,
lost biases and overflow; so there are also shifted, large, tiny and signed zero inputs, and NaN and
infinity in draws of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.model.importer import TensorSpec

_COMMON_RANGE = 2  # integers that index nothing: masks, conditions, small counts


class DrawKind(StrEnum):
    """How the floats of a draw are distributed."""

    NORMAL = "normal"
    SHIFTED = "shifted"  # mean 2, so that padding and means matter
    LARGE = "large"
    TINY = "tiny"
    ZEROS = "zeros"  # half of them negative
    NAN = "nan"
    INFINITE = "infinite"
    USER = "user"  # from the file that the user gave


ORDINARY = (DrawKind.NORMAL, DrawKind.SHIFTED, DrawKind.LARGE, DrawKind.TINY, DrawKind.ZEROS)
SPECIAL = (DrawKind.NAN, DrawKind.INFINITE)


@dataclass(frozen=True)
class DrawPlan:
    """What a model is verified with; picklable, so that workers make the same arrays.

    Args:
        specs: name, static shape and NumPy type of each input.
        bounds: for inputs that index something, how many elements there are, by name.
        seed: of every draw.
        user: an `.npz` file with an array for each input; None: random inputs only.
    """

    specs: tuple[TensorSpec, ...]
    bounds: Mapping[str, int]
    seed: int
    user: Path | None = None

    @property
    def kinds(self) -> tuple[DrawKind, ...]:
        """The draws, the one that must work first.

        Where no input is a float, only the first two say anything.
        """
        if any(is_float(spec.dtype) for spec in self.specs):
            kinds: tuple[DrawKind, ...] = (*ORDINARY, *SPECIAL)
        else:
            kinds = ORDINARY[:2]
        return (DrawKind.USER, *kinds) if self.user else kinds

    def arrays(self, kind: DrawKind) -> dict[str, np.ndarray]:
        """One array for each input, by name.

        Raises:
            UserError: the user's file cannot be read, or does not fit the inputs.
        """
        if kind == DrawKind.USER:
            assert self.user is not None
            return user_arrays(self.user, self.specs)
        number = list(DrawKind).index(kind)
        generator = np.random.default_rng([self.seed, number])
        return {
            spec.name: _array(spec, kind, self.bounds.get(spec.name), generator)
            for spec in self.specs
        }


def is_float(dtype: str) -> bool:
    """Whether a NumPy type's name is one of a floating point type, bfloat16 included."""
    return "float" in dtype


def user_arrays(path: Path, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """Read the arrays that a user gave, in the inputs' types.

    Raises:
        UserError: the file cannot be read, lacks an input, or an array has another shape.
    """
    try:
        with np.load(path) as found:
            given = {name: found[name] for name in found.files}
    except (OSError, ValueError) as error:
        raise UserError(
            f"--verify-inputs {str(path)!r} cannot be read ({error}): give an .npz file with an"
            " array for each input"
        ) from error
    arrays = {}
    for spec in specs:
        if spec.name not in given:
            known = ", ".join(given) or "nothing"
            raise UserError(
                f"--verify-inputs {str(path)!r} lacks the input {spec.name!r}; it holds {known}"
            )
        array = given[spec.name]
        if array.shape != spec.shape:
            raise UserError(
                f"--verify-inputs {str(path)!r}: {spec.name!r} has shape {array.shape}, the model"
                f" takes {spec.shape}"
            )
        arrays[spec.name] = array.astype(numpy_dtype(spec.dtype))
    return arrays


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of a name, types of `ml_dtypes` such as bfloat16 included."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def _array(
    spec: TensorSpec, kind: DrawKind, bound: int | None, generator: np.random.Generator
) -> np.ndarray:
    dtype = numpy_dtype(spec.dtype)
    if is_float(spec.dtype):
        return np.asarray(_floats(spec.shape, kind, generator)).astype(dtype)
    if dtype.kind == "b":
        return np.asarray(generator.integers(0, 2, spec.shape)).astype(dtype)
    high = bound if bound is not None else _COMMON_RANGE
    if bound is None and kind == DrawKind.SHIFTED and dtype.itemsize == 1:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max + 1  # images and quantised values
        return np.asarray(generator.integers(low, high, spec.shape)).astype(dtype)
    return np.asarray(generator.integers(0, max(1, high), spec.shape)).astype(dtype)


def _floats(shape: tuple[int, ...], kind: DrawKind, generator: np.random.Generator) -> Any:
    normal = generator.standard_normal(shape)
    match kind:
        case DrawKind.SHIFTED:
            return normal * 0.5 + 2
        case DrawKind.LARGE:
            return normal * 100
        case DrawKind.TINY:
            return normal * 1e-3
        case DrawKind.ZEROS:
            return np.where(normal < 0, -0.0, 0.0)
        case DrawKind.NAN | DrawKind.INFINITE:
            flat = np.asarray(normal).reshape(-1).copy()
            places = generator.integers(0, flat.size, max(1, flat.size // 1000))
            values = [np.nan] if kind == DrawKind.NAN else [np.inf, -np.inf]
            flat[places] = np.resize(values, places.size)
            return flat.reshape(shape)
    return normal
