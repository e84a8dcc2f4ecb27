"""What a register tile is, and how many cycles a reduction is expected to take with it.

The model counts cycles; it need not be right, only rank tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpu_aware_tune.kernels.dot_products import DotProduct
from gpu_aware_tune.kernels.schedules.access import Access, Axis

STACK_BYTES = 1024  # TVM keeps smaller buffers on the stack, where LLVM turns them into registers

_LINE = 64
_ALIAS = 4096  # addresses this far apart share the first-level cache's few ways
_WAYS = 8
_WAY_BYTES = 65536  # of the second-level cache: what lies so far apart shares a set
_ALIASING_ROWS = 64  # rows, from which on that matters


@dataclass(frozen=True)
class Costs:
    """What the model takes things to cost on a kind of processor, in cycles if not said otherwise.

    `benchmarks/tile_model.py` measures tiles, fits these, and tells how well they rank.

    Args:
        full: a multiply-add of whole vectors.
        half: one of vectors of half the width or less.
        odd: times that, of vectors whose lanes are no power of two, without masks.
        spill: for each register that a tile lacks, in each step; 0 where a multiply-add takes one
            value for all lanes from memory, so that those values need none.
        latency: the least a step of the sum takes.
        load: a load, where nothing else limits.
        port: what a load costs beside the arithmetic that hides it.
        broadcast: times that, of one value for all lanes.
        unaligned: times that of a vector load, which may straddle cache lines.
        gather: times that, for each lane that lies apart.
        aliased: times that, of a load whose line others keep evicting.
        l2_line, far_line: a line from the second-level cache, and from beyond.
        pack: an element copied into another layout.
        store, reload: a vector of results, written, and read to go on with.
        per_tile: the loops around a tile.
        memory: bytes a cycle from the far caches.
        kept: of that, what is read again and stayed in the second-level cache, or nearly.
        near_bytes, middle_bytes: what the first and the second-level cache serve without misses.
        kept_bytes: what the second one keeps, if only in part, while the rest streams by.
    """

    full: float = 1.0
    half: float = 0.55
    odd: float = 1.0
    spill: float = 0.0
    latency: float = 2.6
    load: float = 0.5
    port: float = 0.16
    broadcast: float = 1.0
    unaligned: float = 1.35
    gather: float = 3.0
    aliased: float = 5.0
    l2_line: float = 0.7
    far_line: float = 4.0
    pack: float = 1.2
    store: float = 0.9
    reload: float = 0.5
    per_tile: float = 4.0
    memory: float = 7.0
    kept: float = 0.25
    near_bytes: int = 24 * 1024
    middle_bytes: int = 384 * 1024
    kept_bytes: int = 1280 * 1024


# Fitted to 750 tiles of 25 kernels on one core with AVX-512; that data is not kept.
AVX512 = Costs()

# Its multiply-adds take as long for half a vector as for a whole one, four cycles until their result is
# there (AMD's guide to its Family 1Ah); the rest is AVX512's. Judged on 1055 tiles of 44 kernels.
ZNVER5 = Costs(half=1.0, latency=4.0)

AVX2 = Costs(full=0.5, half=0.5, odd=2.0, spill=1.0, latency=4.0)


def costs_for(lanes: int, processor: str) -> Costs:
    """The constants for a processor, by its vectors' lanes and LLVM's name for it."""
    if lanes < 16:
        return AVX2
    return ZNVER5 if processor == "znver5" else AVX512


@dataclass(frozen=True)
class Machine:
    """What the model must know of a CPU target."""

    lanes: int  # float32 values of one vector register
    registers: int
    units: int
    costs: Costs = AVX512
    dots: DotProduct | None = None  # the instruction for sums of products of integers


@dataclass(frozen=True)
class Tile:
    """One way to hold results in registers.

    Args:
        vector: position of the vectorised axis.
        lanes: its results in one register.
        counts: registers along each axis, by position (1 where the axis is not tiled).
        packed: operands (by number) to copy so that the vectorised axis lies contiguous.
        cycles: what the model expects of all units together.
        panels: operands (by number) to copy tile by tile, each with the axis along which it lies
            contiguous: what a tile reads, term by term, is then one piece of memory.
        passes: over all results of a block of channels, each for one step of the first reduction
            axis, whose weights then stay in the nearest cache; 1 sums every tile up at once.
    """

    vector: int
    lanes: int
    counts: tuple[int, ...]
    packed: tuple[int, ...]
    cycles: float
    passes: int = 1
    panels: tuple[tuple[int, int], ...] = ()

    @property
    def copied(self) -> set[int]:
        """The operands that are read from a copy."""
        return {*self.packed, *(number for number, _ in self.panels)}

    def size(self, axis: Axis) -> int:
        """Results along an axis."""
        return self.counts[axis.position] * (self.lanes if axis.position == self.vector else 1)


def divisors(number: int, most: int) -> list[int]:
    """Divisors of a number up to `most`, largest first."""
    return [d for d in range(min(number, most), 0, -1) if number % d == 0]


def _moves(operand: Access, axis: Axis, size: int) -> bool:
    """Whether an operand's element changes within `size` steps of an axis."""
    if not operand.uses(axis):
        return False
    return operand.strides[axis.position] is not None or operand.granules[axis.position] % size > 0


def priced(
    tile: Tile,
    axes: Sequence[Axis],
    operands: Sequence[Access],
    result: Access,
    machine: Machine,
    weights: frozenset[int],
) -> Tile:
    registers = math.prod(tile.counts)
    costs = machine.costs
    steps = math.prod(axis.extent for axis in axes if axis.reduce)
    spatial = math.prod(axis.extent for axis in axes if not axis.reduce)
    count = spatial // (registers * tile.lanes)
    ports, misses = 0.0, 0.0
    for number, operand in enumerate(operands):
        ports += _loads(tile, number, axes, operand, costs) * costs.load
        misses += _misses(tile, axes, operand, number, costs) / steps
    step = _step(tile, axes, operands, machine, ports) + misses
    packing = sum(
        _copying(tile, number, operands[number], costs) for number in tile.copied - weights
    )
    contiguous = result.strides[tile.vector] == 1
    store = registers * costs.store * (1 if contiguous else tile.lanes) + costs.per_tile
    compute = count * (steps * step + store) + packing
    cycles = _with_traffic(compute, tile, axes, operands, costs) * _rounds(count, machine)
    return replace(tile, cycles=cycles)


def _step(
    tile: Tile, axes: Sequence[Axis], operands: Sequence[Access], machine: Machine, ports: float
) -> float:
    """Cycles of one term of all of a tile's sums, whose loads take `ports` cycles by themselves."""
    costs = machine.costs
    whole = costs.half if tile.lanes <= machine.lanes // 2 else costs.full
    arithmetic = math.prod(tile.counts) * whole * _oddness(tile, costs)
    spilled = costs.spill * _lacking(tile, axes, operands, machine)
    return max(arithmetic, ports, costs.latency) + costs.port * ports + spilled


def _oddness(tile: Tile, costs: Costs) -> float:
    """How much more a vector of a tile costs, where its lanes are no power of two."""
    return costs.odd if tile.lanes & (tile.lanes - 1) else 1.0


def _lacking(tile: Tile, axes: Sequence[Axis], operands: Sequence[Access], machine: Machine) -> int:
    """Registers that a step needs beyond those there are: LLVM loads its broadcasts first."""
    vector = axes[tile.vector]
    alone = [o for o in operands if not _moves(o, vector, tile.size(vector))]
    broadcasts = sum(_values(tile, axes, operand) for operand in alone)
    return max(0, math.prod(tile.counts) + broadcasts + 1 - machine.registers)


def _copying(tile: Tile, number: int, operand: Access, costs: Costs) -> float:
    """Cycles of a copy into another layout."""
    apart = (operand.strides[tile.vector] or 0) * operand.itemsize
    aliased = number in tile.packed and apart and apart % _ALIAS == 0
    return costs.pack * operand.elements * (costs.aliased if aliased else 1.0)


def held(tile: Tile, axes: Sequence[Axis], operands: Sequence[Access]) -> list[Axis]:
    """The axes whose loops are outside of the passes: those of the weights."""
    vector = axes[tile.vector]
    own = [operand for operand in operands if operand.uses(vector)]
    return [axis for axis in axes if not axis.reduce and any(o.uses(axis) for o in own)]


def priced_in_passes(
    tile: Tile, axes: Sequence[Axis], operands: Sequence[Access], machine: Machine
) -> Tile:
    registers = math.prod(tile.counts)
    costs = machine.costs
    passes, *terms = [axis.extent for axis in axes if axis.reduce]
    spatial = math.prod(axis.extent for axis in axes if not axis.reduce)
    count = spatial // (registers * tile.lanes)
    pieces = math.prod(axis.extent // tile.size(axis) for axis in held(tile, axes, operands))
    loads = sum(_loads(tile, n, axes, operand, costs) for n, operand in enumerate(operands))
    ports = loads * costs.load
    step = _step(tile, axes, operands, machine, ports)
    again = registers * (costs.store + costs.reload) + costs.per_tile
    compute = count * passes * (math.prod(terms) * step + again)
    read = sum(
        operand.elements * operand.itemsize * (1 if operand.uses(axes[tile.vector]) else pieces)
        for operand in operands
    )
    compute += costs.l2_line * read / _LINE
    cycles = _with_traffic(compute, tile, axes, operands, costs) * _rounds(pieces, machine)
    return replace(tile, cycles=cycles, passes=passes)


def _rounds(pieces: int, machine: Machine) -> float:
    """How much longer the slowest unit takes than all would with equal work."""
    return math.ceil(pieces / machine.units) * machine.units / pieces


def _with_traffic(
    compute: float,
    tile: Tile,
    axes: Sequence[Axis],
    operands: Sequence[Access],
    costs: Costs,
) -> float:
    """Cycles of the arithmetic and of what comes from the far caches, which mostly overlap."""
    moved = min(traffic(tile, axes, operands, costs)) / costs.memory
    return max(compute, moved) + 0.25 * min(compute, moved)


def _loads(tile: Tile, number: int, axes: Sequence[Axis], operand: Access, costs: Costs) -> float:
    """Load instructions of one step of the reduction."""
    vector = axes[tile.vector]
    values, ways = _values(tile, axes, operand), 0
    for axis, count in zip(axes, tile.counts, strict=True):
        apart = count > 1 and axis is not vector and number not in tile.copied
        if apart and _moves(operand, axis, tile.size(axis)):
            stride = operand.strides[axis.position] or 0
            ways = max(ways, count * math.gcd(stride * operand.itemsize, _ALIAS) // _ALIAS)
    extra = costs.aliased * values if ways > _WAYS else 0.0
    if not _moves(operand, vector, tile.size(vector)):
        return values * costs.broadcast + extra
    if number not in tile.packed and operand.strides[tile.vector] != 1:
        return values * costs.gather * tile.lanes + extra
    whole = max(1.0, tile.lanes * operand.itemsize / 32)
    return values * costs.unaligned * _oddness(tile, costs) * whole + extra


def _values(tile: Tile, axes: Sequence[Axis], operand: Access) -> int:
    """Vectors or single values of an operand that one step reads."""
    values = 1
    for axis, count in zip(axes, tile.counts, strict=True):
        if count > 1 and _moves(operand, axis, tile.size(axis)):
            values *= count
    return values


def _misses(tile: Tile, axes: Sequence[Axis], operand: Access, number: int, costs: Costs) -> float:
    """Cycles one tile waits for an operand that does not stay in the nearest cache."""
    copied = number in tile.copied
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
            side_by_side = number in tile.packed and other == tile.vector
            windows.append((1 if side_by_side else abs(move or _LINE), size))
    lines, line = 1.0, _LINE / operand.itemsize
    for apart, many in windows:
        lines *= max(1.0, many * apart / line) if apart < line else many
    if lines * _LINE <= costs.near_bytes:
        return 0.0
    crowded = 1.0 if copied else _crowding(windows, operand.itemsize)
    return lines * (
        costs.l2_line if lines * _LINE * crowded <= costs.middle_bytes else costs.far_line
    )


def _crowding(windows: Sequence[tuple[int, int]], itemsize: int) -> float:
    """By how much less of the second-level cache serves lines that lie far apart.

    Lines a multiple of a power of two apart share the sets that this power leaves.
    """
    run = _LINE
    for apart, many in sorted(windows):
        if apart * itemsize <= run:
            run = max(run, apart * itemsize * many)
    powers = [
        math.gcd(apart * itemsize, _WAY_BYTES) for apart, many in windows if many >= _ALIASING_ROWS
    ]
    return max(1.0, max(powers, default=1) / run)


def traffic(
    tile: Tile, axes: Sequence[Axis], operands: Sequence[Access], costs: Costs
) -> tuple[float, float]:
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
    # Operands that are not copied share sets, so that little of them is kept between the rounds.
    kept = [costs.kept if tile.panels and size <= costs.kept_bytes else 1.0 for size in bytes_]
    again = [(rounds[1 - n] - 1) * kept[n] * bytes_[n] for n in range(2)]
    return sum(bytes_) + again[1], sum(bytes_) + again[0]
