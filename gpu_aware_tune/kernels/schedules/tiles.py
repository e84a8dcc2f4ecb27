"""Which register tile a reduction gets: a small cost model over all tiles that fit.

A tile is a block of results kept in vector registers while the reduction runs over them. One axis
is vectorised (`lanes` results a register); some axes are unrolled (`counts`), so that each loaded
value is used several times. The model counts cycles; it need not be right, only rank tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gpu_aware_tune.kernels.schedules.access import Access, Axis

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
_STORE, _LOAD = 0.9, 0.5  # a vector of results
_PER_TILE = 4.0
_FAR = 7.0  # bytes a cycle from the far caches

_NEAR_BYTES = 24 * 1024  # of the first-level cache
_MIDDLE_BYTES = 384 * 1024  # of the second-level cache
_LINE = 64
_HOPEFUL = 2.0  # times the best tile's cycles, for a tile of another kind to be tried early
_PASS_TERMS = 32  # of the sum, at least, before its results are stored
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
        passes: over all results of a block of channels, each for one step of the first reduction
            axis, whose weights then stay in the nearest cache; 1 sums every tile up at once.
    """

    vector: int
    lanes: int
    counts: tuple[int, ...]
    packed: tuple[int, ...]
    cycles: float
    passes: int = 1

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
        if tile.cycles <= _HOPEFUL * ranked[0].cycles:
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
    registers = machine.registers * 3 // 4
    shared = shared_dimensions(axes, result)
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
                        yield _priced_in_passes(tile, axes, operands, machine)
                if not is_box(sizes, shared):
                    continue
                yield _priced(tile, axes, operands, result, machine, weights)
                if packed:
                    plain = Tile(vector.position, lanes, counts, (), 0.0)
                    yield _priced(plain, axes, operands, result, machine, weights)


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
    cycles = _with_traffic(compute, tile, axes, operands) * _rounds(count, machine)
    return replace(tile, cycles=cycles)


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


def held(tile: Tile, axes: Sequence[Axis], operands: Sequence[Access]) -> list[Axis]:
    """The axes whose loops are outside of the passes: those of the weights."""
    vector = axes[tile.vector]
    own = [operand for operand in operands if operand.uses(vector)]
    return [axis for axis in axes if not axis.reduce and any(o.uses(axis) for o in own)]


def _priced_in_passes(
    tile: Tile, axes: Sequence[Axis], operands: Sequence[Access], machine: Machine
) -> Tile:
    registers = math.prod(tile.counts)
    width = _HALF if tile.lanes <= machine.lanes // 2 else 1.0
    passes, *terms = [axis.extent for axis in axes if axis.reduce]
    spatial = math.prod(axis.extent for axis in axes if not axis.reduce)
    count = spatial // (registers * tile.lanes)
    pieces = math.prod(axis.extent // tile.size(axis) for axis in held(tile, axes, operands))
    ports = sum(_loads(tile, n, axes, operand) for n, operand in enumerate(operands)) / 2
    step = max(registers * width, ports, _LATENCY) + _PORT * ports
    again = registers * (_STORE + _LOAD) + _PER_TILE
    compute = count * passes * (math.prod(terms) * step + again)
    read = sum(
        operand.elements * operand.itemsize * (1 if operand.uses(axes[tile.vector]) else pieces)
        for operand in operands
    )
    compute += _NEAR * read / _LINE
    cycles = _with_traffic(compute, tile, axes, operands) * _rounds(pieces, machine)
    return replace(tile, cycles=cycles, passes=passes)


def _rounds(pieces: int, machine: Machine) -> float:
    """How much longer the slowest unit takes than all would with equal work."""
    return math.ceil(pieces / machine.units) * machine.units / pieces


def _with_traffic(
    compute: float, tile: Tile, axes: Sequence[Axis], operands: Sequence[Access]
) -> float:
    """Cycles of the arithmetic and of what comes from the far caches, which mostly overlap."""
    traffic = min(_traffic(tile, axes, operands)) / _FAR
    return max(compute, traffic) + 0.25 * min(compute, traffic)


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
        if len(rows) > 1 and vector in own[filters] and not tile.packed:
            # All filters over one row: it stays in the nearest caches, and units share the rows out.
            return shared + rows[:1] + own[filters] + [a for a in own[image] if a is not rows[0]]
    first_outer, second_outer = _traffic(tile, axes, operands)
    ordered = own[0] + own[1] if first_outer <= second_outer else own[1] + own[0]
    return shared + ordered
