"""Rule for the determinant of small matrices."""

from __future__ import annotations

import itertools

from onnx import NodeProto

from gpu_aware_tune.onnx_prepare.rewriter import Rewriter

LARGEST = 5  # rows; the expansion has 120 products then


def det(node: NodeProto, to: Rewriter) -> list[str] | None:
    """Rule: expand along the first row, and reuse the minors of the rows below."""
    shape = to.shape(node.input[0])
    if shape is None or not 1 <= shape[-1] <= LARGEST:
        return None
    size = shape[-1]
    places = [to.constant(at) for at in range(size)]
    rows = [to.op("Gather", node.input[0], place, axis=-2) for place in places]
    cells = [[to.op("Gather", row, place, axis=-1) for place in places] for row in rows]
    # Determinants of the lowest rows, by the columns that they take.
    minors: dict[tuple[int, ...], str] = {(column,): cells[-1][column] for column in range(size)}
    for row in range(size - 2, -1, -1):
        larger: dict[tuple[int, ...], str] = {}
        for columns in itertools.combinations(range(size), size - row):
            total = ""
            for place, column in enumerate(columns):
                rest = tuple(each for each in columns if each != column)
                term = to.op("Mul", cells[row][column], minors[rest])
                total = to.op("Sub" if place % 2 else "Add", total, term) if total else term
            larger[columns] = total
        minors = larger
    return [to.op("Identity", minors[tuple(range(size))])]
