"""Products whose extents no tile divides, computed a little larger.

Of 197 tokens or the 49 columns of a window no number of registers is a whole part: a tile is one row
then, or its vectors have seven lanes. The product is computed for 200 and 64 instead, from copies of
its operands with zeros behind, and what reads it leaves the rest out. Only what is summed over keeps
its extent, and so do weights, which are stored once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from tvm.s_tir import Schedule

from gpu_aware_tune.kernels.schedules.access import Axis
from gpu_aware_tune.kernels.schedules.blocks import attempt, inline_elementwise
from gpu_aware_tune.kernels.schedules.reductions import Reduction
from gpu_aware_tune.kernels.schedules.tile_cost import Machine

_LEAST = 16  # smaller extents would grow by too much
_PADDING_RATIO = 1.15  # times what full vectors would take, from which on padding is considered
_GAIN = 0.9  # of the cycles without padding, for the copies are cheap only nearly always
_COPY = 0.5  # cycles an element of a padded operand, or of a result that is read once more


def pad_product(schedule: Schedule, name: str, machine: Machine) -> Schedule:
    """Return a schedule in which a product has extents that tiles divide, where that is faster.

    Args:
        schedule: left as it is.
        name: the product's block; its loops have not been touched.
        machine: the CPU.
    """
    plain = Reduction(schedule, name, machine)
    tiles = plain.tiles()
    if len(plain.operands) != 2 or not tiles or tiles[0].passes > 1:
        return schedule
    best, cycles = schedule, _GAIN * tiles[0].cycles
    if tiles[0].cycles < _PADDING_RATIO * plain.steps / machine.lanes:
        return schedule
    for padding in _paddings(plain, machine):
        padded = _padded(schedule, name, padding)
        if padded is schedule:
            continue
        reduction = Reduction(padded, name, machine)
        found = reduction.tiles()
        expected = found[0].cycles + _COPY * _copied(reduction, padding) if found else math.inf
        if expected < cycles:
            best, cycles = padded, expected
    return best


def _paddings(product: Reduction, machine: Machine) -> Iterator[tuple[int, ...]]:
    """For each axis the number that its extent becomes a multiple of, in all ways that may pay."""
    choices = [_multiples(axis, product, machine) for axis in product.axes]
    for padding in itertools.product(*choices):
        if any(number > 1 for number in padding):
            yield padding


def _multiples(axis: Axis, product: Reduction, machine: Machine) -> Sequence[int]:
    of_weights = any(product.operands[number].uses(axis) for number in product.weights)
    if axis.reduce or axis.extent < _LEAST or of_weights:
        return (1,)
    # Of numbers that lead to the same extent the first one is enough.
    extents: dict[int, int] = {axis.extent: 1}
    for number in (6, machine.lanes // 2, machine.lanes):
        extents.setdefault(-(-axis.extent // number) * number, number)
    return tuple(extents.values())


def _padded(schedule: Schedule, name: str, padding: Sequence[int]) -> Schedule:
    """The schedule with larger extents; the one given where TVM knows no way."""

    def change(changed: Schedule) -> None:
        changed.pad_einsum(changed.get_sblock(name), list(padding))
        inline_elementwise(changed)  # what cuts the result, into its reader

    return attempt(schedule, change)


def _copied(product: Reduction, padding: Sequence[int]) -> int:
    """Elements of the operands that are copied, and of the result."""
    grown = [axis for axis, number in zip(product.axes, padding, strict=True) if number > 1]
    assert product.result is not None
    elements = product.result.elements
    for operand in product.operands:
        if any(operand.uses(axis) for axis in grown):
            elements += operand.elements
    return elements
