"""Shapes of a model's inputs as people write them: "data:1x3x224x224", once for each size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_aware_tune.errors import UserError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def parse_input(text: str) -> tuple[str, Shape]:
    """Reads "name:1x3x224x224"; the name itself may contain colons. "name:" is a scalar."""
    name, colon, dims = text.rpartition(":")
    if not colon or not name or not re.fullmatch(r"([0-9]+(x[0-9]+)*)?", dims):
        raise UserError(f"--input {text!r} is not NAME:SHAPE: give a form such as data:1x3x224x224")
    return name, check_shape(name, tuple(int(dim) for dim in dims.split("x")) if dims else ())


def check_shape(name: str, shape: Shape) -> Shape:
    """Returns `shape` where every dimension is a whole number from 1 to 2**31 - 1."""
    for dim in shape:
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim < 2**31:
            raise UserError(
                f"--input {name!r} has dimension {dim}: give whole numbers of at least 1"
            )
    return shape


def shape_text(shape: Sequence[int]) -> str:
    """A shape as `parse_input` reads it; a scalar has no text."""
    return "x".join(map(str, shape))


def parse_inputs(given: Mapping[str, Any] | Iterable[str]) -> list[Shapes]:
    """Reads the shapes of a model's inputs, one set for each size that it is to be tuned for.

    Args:
        given: texts such as "data:1x3x224x224", or shapes by name, each one shape or a sequence of
            several. Inputs with several shapes have equally many; one with a single shape has it in
            every set.

    Returns:
        At least one set; the first is empty where nothing is given.

    Raises:
        UserError: a shape is wrong or there twice, or the inputs have different numbers of shapes.
    """
    by_name: dict[str, list[Shape]] = {}
    if isinstance(given, Mapping):
        by_name = {name: _shapes(name, value) for name, value in given.items()}
    else:
        for name, shape in map(parse_input, given):
            by_name.setdefault(name, []).append(shape)
    counts = {name: len(shapes) for name, shapes in by_name.items() if len(shapes) > 1}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise UserError(
            f"--input: {told} shapes: give each input one shape, or as many as the others"
        )
    sizes: list[Shapes] = [
        {name: shapes[min(number, len(shapes) - 1)] for name, shapes in by_name.items()}
        for number in range(max(counts.values(), default=1))
    ]
    for number, size in enumerate(sizes):
        if size in sizes[:number]:
            told = ", ".join(f"{name}:{shape_text(shape)}" for name, shape in size.items())
            raise UserError(f"--input {told} is there twice: give each size once")
    return sizes


def _shapes(name: str, value: Any) -> list[Shape]:
    parts = list(value)
    several = parts and all(isinstance(part, list | tuple) for part in parts)
    return [check_shape(name, tuple(part)) for part in (parts if several else [parts])]
