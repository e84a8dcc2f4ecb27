"""Which register tiles a reduction can have, the cheapest ones by the cost model first.

A tile is a block of results kept in vector registers while the reduction runs over them. One axis
is vectorised (`lanes` results a register); some axes are unrolled (`counts`), so that each loaded
value is used several times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from gpu_aware_tune.kernels.schedules.access import Access, Axis
from gpu_aware_tune.kernels.schedules.tile_cost import (
    STACK_BYTES,
    Machine,
    Tile,
    divisors,
    held,
    priced,
    priced_in_passes,
    traffic,
)

_EXPLORE_RATIO = 2.0  # times the best tile's cycles, for a tile of another kind to be tried early
_ROWS = 64  # that a tile reads a few elements of, from which on a copy tile by tile may pay
_HELD = 13  # of 16 registers for results, the others for what is loaded; rows of 13 are common
_PASS_TERMS = 32  # of the sum, at least, before its results are stored


def best_tiles(
    axes: Sequence[Axis],
    operands: Sequence[Access],
    result: Access,
    machine: Machine,
    weights: frozenset[int] = frozenset(),
) -> list[Tile]:
    """Give the best tile of each kind that comes near the best one, then all others, cheapest first.

    Kinds differ in the axis that is vectorised and in whether they sum in passes.

    Args:
        axes: of the block.
        operands: what it reads.
        result: what it writes.
        machine: the CPU.
        weights: operands (by number) that are packed before the kernel runs.
    """
    every = _tiles(axes, operands, result, machine, weights)
    ranked = sorted(every, key=lambda tile: tile.cycles)
    best: dict[tuple[int, bool], Tile] = {}
    for tile in ranked:
        if tile.cycles <= _EXPLORE_RATIO * ranked[0].cycles:
            best.setdefault((tile.vector, tile.passes > 1), tile)
    first = list(best.values())
    return [*first, *(tile for tile in ranked if not any(tile is other for other in first))]


def _tiles(
    axes: Sequence[Axis],
    operands: Sequence[Access],
    result: Access,
    machine: Machine,
    weights: frozenset[int],
) -> Iterator[Tile]:
    spatial = [axis for axis in axes if not axis.reduce and axis.extent > 1]
    registers = machine.registers * _HELD // 16
    shared = shared_dimensions(axes, result)
    runs = _runs(spatial, axes, operands)
    for vector in spatial:
        packed = _packed(vector, operands)
        for lanes in divisors(vector.extent, machine.lanes)[:3]:
            most = min(registers, (STACK_BYTES - 1) // (result.itemsize * lanes))
            for counts in _counts(vector, lanes, spatial, len(axes), most):
                tile = Tile(vector.position, lanes, counts, packed, 0.0)
                sizes = {axis.position: tile.size(axis) for axis in spatial}
                if not packed and _sums_in_passes(vector, axes, operands, result, weights):
                    whole = {axis.position: axis.extent for axis in spatial}
                    kept = {axis.position for axis in held(tile, axes, operands)}
                    block = {**whole, **{at: sizes[at] for at in kept & set(sizes)}}
                    if is_box(block, shared):
                        yield priced_in_passes(tile, axes, operands, machine)
                if not is_box(sizes, shared):
                    continue
                for variant in _copied(tile, runs, axes, operands, weights):
                    yield priced(variant, axes, operands, result, machine, weights)


def shared_dimensions(axes: Sequence[Axis], result: Access) -> list[tuple[Axis, Axis]] | None:
    """Pairs of axes that share a dimension of the result, the outer one first.

    As NCHWc channels do that are written as one, `outer * 8 + inner`. None where the result is not
    linear in an axis.
    """
    moving = [axis for axis in axes if not axis.reduce and axis.extent > 1]
    steps = {axis.position: result.strides[axis.position] for axis in moving}
    dims = {}
    for axis in moving:
        step = steps[axis.position]
        if step is None:
            return None
        dims[axis.position] = step, _dimension(step, result)
    return [
        (outer, inner)
        for outer in moving
        for inner in moving
        if dims[outer.position][0] > dims[inner.position][0]
        and dims[outer.position][1] == dims[inner.position][1]
    ]


def is_box(sizes: Mapping[int, int], shared: Sequence[tuple[Axis, Axis]] | None) -> bool:
    """Whether a tile's results fill a box of the result's dimensions.

    What TVM computes at the loops over tiles (`reverse_compute_at`, `cache_write`) covers the
    smallest box around a tile's results. Where two axes share a dimension, that box may hold results
    of other tiles, which are not there yet.

    Args:
        sizes: results along each spatial axis, by position; axes of extent 1 may be left out.
        shared: see `shared_dimensions`.
    """
    return shared is not None and not any(
        sizes[outer.position] > 1 and sizes[inner.position] < inner.extent
        for outer, inner in shared
    )


def _dimension(stride: int, access: Access) -> int:
    """The dimension of a buffer in which its flat index moves by `stride` elements."""
    shape = [int(extent) for extent in access.buffer.shape]
    for dim in range(len(shape)):
        if shape[dim] > 1 and math.prod(shape[dim + 1 :]) <= stride:
            return dim
    return len(shape)


def _counts(
    vector: Axis, lanes: int, spatial: Sequence[Axis], length: int, most: int
) -> Iterator[tuple[int, ...]]:
    """Registers along the vectorised axis and at most two others."""
    others = [axis for axis in spatial if axis is not vector]
    for along in divisors(vector.extent // lanes, most):
        subsets = (itertools.combinations(others, count) for count in range(3))
        for chosen in itertools.chain.from_iterable(subsets):
            for factors in itertools.product(
                *(divisors(axis.extent, most // along)[:-1] for axis in chosen)
            ):
                if along * math.prod(factors) <= most:
                    counts = [1] * length
                    counts[vector.position] = along
                    for axis, factor in zip(chosen, factors, strict=True):
                        counts[axis.position] = factor
                    yield tuple(counts)


def _packed(vector: Axis, operands: Sequence[Access]) -> tuple[int, ...]:
    """Operands in which the axis lies far apart, in a dimension of its own.

    What is read only once, as a sum or a maximum does, is not worth a copy, and the elementwise
    block that makes it would no longer run along its rows.
    """
    if len(operands) < 2:
        return ()
    return tuple(
        number
        for number, operand in enumerate(operands)
        if operand.uses(vector)
        and operand.strides[vector.position] != 1
        and operand.dims[vector.position] >= 0
    )


def _runs(
    spatial: Sequence[Axis], axes: Sequence[Axis], operands: Sequence[Access]
) -> dict[int, Axis]:
    """By operand, the axis along whose rows it lies, where its terms are rows far apart.

    A tile reads a few neighbours of each of many rows. Rows apart by a multiple of a power of two
    evict one another from the caches, and each needs a page of its own.
    """
    found = {}
    for number, operand in enumerate(operands):
        for axis in spatial:
            far = any(
                other.reduce
                and other.extent >= _ROWS
                and (operand.strides[other.position] or 0) >= axis.extent
                for other in axes
            )
            if far and operand.strides[axis.position] == 1 and plane_of(operand, axis) is not None:
                found[number] = axis
    return found


def plane_of(operand: Access, axis: Axis) -> int | None:
    """The first of an operand's last dimensions that an axis walks along from end to end."""
    shape = [int(extent) for extent in operand.buffer.shape]
    for dim in range(len(shape) - 1, -1, -1):
        if math.prod(shape[dim:]) == axis.extent:
            return dim
    return None


def _copied(
    tile: Tile,
    runs: Mapping[int, Axis],
    axes: Sequence[Axis],
    operands: Sequence[Access],
    weights: frozenset[int],
) -> Iterator[Tile]:
    """A tile with its operands copied in every way that may pay.

    Weights are copied when the library is loaded, so that theirs are always stored tile by tile.
    """
    panels = {n: axis for n, axis in runs.items() if 1 < tile.size(axis) < axis.extent}
    free = tuple((n, axis.position) for n, axis in panels.items() if n in weights)
    yield replace(tile, panels=free)
    if tile.packed:
        yield replace(tile, packed=())
    others = tuple((n, axis.position) for n, axis in panels.items() if n not in weights)
    if others:
        yield replace(tile, panels=(*free, *others))


def _sums_in_passes(
    vector: Axis,
    axes: Sequence[Axis],
    operands: Sequence[Access],
    result: Access,
    weights: frozenset[int],
) -> bool:
    """Whether a pass has enough terms to pay for loading and storing the results again."""
    first, *rest = [axis.extent for axis in axes if axis.reduce] or [1]
    moving = [number for number, operand in enumerate(operands) if operand.uses(vector)]
    return (
        first > 1
        and math.prod(rest) >= _PASS_TERMS
        and result.strides[vector.position] == 1
        and weights.issuperset(moving)
        and all(operands[number].strides[vector.position] == 1 for number in moving)
    )


def outer_order(
    tile: Tile, axes: Sequence[Axis], operands: Sequence[Access], machine: Machine
) -> list[Axis]:
    """Order the loops over tiles so that little memory is read again from far."""
    spatial = [axis for axis in axes if not axis.reduce]
    if len(operands) < 2:
        return spatial
    own: tuple[list[Axis], list[Axis]] = ([], [])
    shared: list[Axis] = []
    for axis in spatial:
        uses = [operand.uses(axis) for operand in operands[:2]]
        if uses[0] == uses[1]:
            shared.append(axis)
        else:
            own[0 if uses[0] else 1].append(axis)
    vector = axes[tile.vector]
    for image, filters in ((0, 1), (1, 0)):
        rows = [axis for axis in own[image] if axis.extent > 1]
        if len(rows) > 1 and vector in own[filters] and not tile.copied:
            read = operands[image].elements * operands[image].itemsize
            if read <= machine.costs.middle_bytes:
                # The image stays in the second-level cache, so that filters are read only once.
                return shared + own[filters] + own[image]
            # All filters over one row: it stays in the nearest caches, and units share the rows out.
            return shared + rows[:1] + own[filters] + [a for a in own[image] if a is not rows[0]]
    first_outer, second_outer = traffic(tile, axes, operands, machine.costs)
    ordered = own[0] + own[1] if first_outer <= second_outer else own[1] + own[0]
    return shared + ordered
