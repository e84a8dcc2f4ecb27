"""Which register tile a reduction gets: a small cost model over all tiles that fit.

A tile is a block of results kept in vector registers while the reduction runs over them. One axis
is vectorised (`lanes` results a register); some axes are unrolled (`counts`), so that each loaded
value is used several times. The model counts cycles; it need not be right, only rank tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpu_aware_tune.schedules.access import Access, Axis

STACK_BYTES = 1024  # TVM keeps smaller buffers on the stack, where LLVM turns them into registers

# Cycles, fitted to the times of 750 tiles of 25 kernels on one core of an AVX-512 machine.
_HALF = 0.55  # a half-width vector operation: they run at up to twice the rate
_LATENCY = 2.6  # the least a step takes
_PORT = 0.16  # what a load costs beside the arithmetic that hides it
_UNALIGNED = 1.35  # half-vector loads for one that may straddle cache lines
_GATHER = 3.0  # loads for each lane that lies apart
_ALIASED = 5.0  # a load whose line others keep evicting
_NEAR, _MIDDLE = 0.7, 4.0  # a line from the second-level cache, and from beyond
_PACK = 1.2  # an element copied into another layout
_STORE = 0.9  # a vector of results
_PER_TILE = 4.0
_FAR = 7.0  # bytes a cycle from the far caches

_NEAR_BYTES = 24 * 1024  # of the first-level cache
_MIDDLE_BYTES = 384 * 1024  # of the second-level cache
_LINE = 64
_ALIAS = 4096  # addresses this far apart share the first-level cache's few ways
_WAYS = 8


@dataclass(frozen=True)
class Machine:
    """What the model must know of a CPU target."""

    lanes: int  # float32 values of one vector register
    registers: int
    units: int


@dataclass(frozen=True)
class Tile:
    """One way to hold results in registers.

    Args:
        vector: position of the vectorised axis.
        lanes: its results in one register.
        counts: registers along each axis, by position (1 where the axis is not tiled).
        packed: operands (by number) to copy so that the vectorised axis lies contiguous.
        cycles: what the model expects of all units together.
    """

    vector: int
    lanes: int
    counts: tuple[int, ...]
    packed: tuple[int, ...]
    cycles: float

    def size(self, axis: Axis) -> int:
        """Results along an axis."""
        return self.counts[axis.position] * (self.lanes if axis.position == self.vector else 1)


def divisors(number: int, most: int) -> list[int]:
    """Divisors of a number up to `most`, largest first."""
    return [d for d in range(min(number, most), 0, -1) if number % d == 0]


def best_tiles(
    axes: Sequence[Axis],
    operands: Sequence[Access],
    result: Access,
    machine: Machine,
    weights: frozenset[int] = frozenset(),
) -> list[Tile]:
    """Give the best tile for each axis that could be vectorised, cheapest first, then all others.

    Args:
        axes: of the block.
        operands: what it reads.
        result: what it writes.
        machine: the CPU.
        weights: operands (by number) that are packed before the kernel runs.
    """
    best: dict[int, Tile] = {}
    every = _tiles(axes, operands, result, machine, weights)
    ranked = sorted(every, key=lambda tile: tile.cycles)
    for tile in ranked:
        best.setdefault(tile.vector, tile)
    return [*best.values(), *(tile for tile in ranked if best[tile.vector] is not tile)]


def _tiles(
    axes: Sequence[Axis],
    operands: Sequence[Access],
    result: Access,
    machine: Machine,
    weights: frozenset[int],
) -> Iterator[Tile]:
    spatial = [axis for axis in axes if not axis.reduce and axis.extent > 1]
    registers = machine.registers * 3 // 4
    for vector in spatial:
        packed = _packed(vector, operands)
        for lanes in divisors(vector.extent, machine.lanes)[:3]:
            most = min(registers, (STACK_BYTES - 1) // (result.itemsize * lanes))
            for counts in _counts(vector, lanes, spatial, len(axes), most):
                tile = Tile(vector.position, lanes, counts, packed, 0.0)
                yield _priced(tile, axes, operands, result, machine, weights)
                if packed:
                    plain = Tile(vector.position, lanes, counts, (), 0.0)
                    yield _priced(plain, axes, operands, result, machine, weights)


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
    """Operands in which the axis lies far apart, in a dimension of its own."""
    return tuple(
        number
        for number, operand in enumerate(operands)
        if operand.uses(vector)
        and operand.strides[vector.position] != 1
        and operand.dims[vector.position] >= 0
    )


def _moves(operand: Access, axis: Axis, size: int) -> bool:
    """Whether an operand's element changes within `size` steps of an axis."""
    if not operand.uses(axis):
        return False
    return operand.strides[axis.position] is not None or operand.granules[axis.position] % size > 0


def _priced(
    tile: Tile,
    axes: Sequence[Axis],
    operands: Sequence[Access],
    result: Access,
    machine: Machine,
    weights: frozenset[int],
) -> Tile:
    registers = math.prod(tile.counts)
    width = _HALF if tile.lanes <= machine.lanes // 2 else 1.0
    steps = math.prod(axis.extent for axis in axes if axis.reduce)
    spatial = math.prod(axis.extent for axis in axes if not axis.reduce)
    count = spatial // (registers * tile.lanes)
    ports, misses = 0.0, 0.0
    for number, operand in enumerate(operands):
        ports += _loads(tile, number, axes, operand) / 2
        misses += _misses(tile, axes, operand, number in tile.packed) / steps
    step = max(registers * width, ports, _LATENCY) + _PORT * ports + misses
    copied = [operands[number] for number in tile.packed if number not in weights]
    packing = sum(_PACK * operand.elements for operand in copied)
    contiguous = result.strides[tile.vector] == 1
    store = registers * _STORE * (1 if contiguous else tile.lanes) + _PER_TILE
    compute = count * (steps * step + store) + packing
    traffic = min(_traffic(tile, axes, operands)) / _FAR  # bytes a cycle from the far caches
    rounds = math.ceil(count / machine.units) * machine.units / count
    cycles = rounds * (max(compute, traffic) + 0.25 * min(compute, traffic))
    return Tile(tile.vector, tile.lanes, tile.counts, tile.packed, cycles)


def _loads(tile: Tile, number: int, axes: Sequence[Axis], operand: Access) -> float:
    """Load instructions of one step of the reduction."""
    vector = axes[tile.vector]
    values, ways = 1, 0
    for axis, count in zip(axes, tile.counts, strict=True):
        if count > 1 and _moves(operand, axis, tile.size(axis)):
            values *= count
            stride = operand.strides[axis.position] or 0
            if axis is not vector and number not in tile.packed:
                ways = max(ways, count * math.gcd(stride * operand.itemsize, _ALIAS) // _ALIAS)
    extra = _ALIASED * values if ways > _WAYS else 0.0
    if not _moves(operand, vector, tile.size(vector)):
        return values + extra
    if number not in tile.packed and operand.strides[tile.vector] != 1:
        return values * _GATHER * tile.lanes + extra
    return values * _UNALIGNED * max(1.0, tile.lanes * operand.itemsize / 32) + extra


def _misses(tile: Tile, axes: Sequence[Axis], operand: Access, packed: bool) -> float:
    """Cycles one tile waits for an operand that does not stay in the nearest cache."""
    sizes = {axis.position: tile.size(axis) for axis in axes if not axis.reduce}
    windows: list[tuple[int, int]] = []  # (elements apart, how many)
    for axis in axes:
        step = operand.strides[axis.position]
        if not axis.reduce or step == 0:
            continue
        window = axis.extent
        for other in sizes:
            move = operand.strides[other]
            if step and move and sizes[other] and move % step == 0 and move // step <= window:
                # A sliding window: neighbouring results share all but the edge.
                window += move // step * (sizes[other] - 1)
                sizes[other] = 0
        windows.append((abs(step) if step else _LINE, window))
    for other, size in sizes.items():
        if size and operand.strides[other] != 0:
            move = operand.strides[other]
            windows.append((1 if packed and other == tile.vector else abs(move or _LINE), size))
    lines, line = 1.0, _LINE / operand.itemsize
    for apart, many in windows:
        lines *= max(1.0, many * apart / line) if apart < line else many
    if lines * _LINE <= _NEAR_BYTES:
        return 0.0
    return lines * (_NEAR if lines * _LINE <= _MIDDLE_BYTES else _MIDDLE)


def _traffic(tile: Tile, axes: Sequence[Axis], operands: Sequence[Access]) -> tuple[float, float]:
    """Bytes read with the first operand's own axes as the outer loops, and with the second's."""
    if len(operands) < 2:
        only = float(sum(operand.elements * operand.itemsize for operand in operands))
        return only, only
    first, second = operands[0], operands[1]
    rounds = [1, 1]
    for axis in axes:
        if axis.reduce or first.uses(axis) == second.uses(axis):
            continue
        rounds[0 if first.uses(axis) else 1] *= axis.extent // tile.size(axis)
    bytes_ = [operand.elements * operand.itemsize for operand in (first, second)]
    return bytes_[0] + bytes_[1] * rounds[0], bytes_[1] + bytes_[0] * rounds[1]


def outer_order(tile: Tile, axes: Sequence[Axis], operands: Sequence[Access]) -> list[Axis]:
    """Order the loops over tiles so that the least memory is read again."""
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
    first_outer, second_outer = _traffic(tile, axes, operands)
    ordered = own[0] + own[1] if first_outer <= second_outer else own[1] + own[0]
    return shared + ordered
