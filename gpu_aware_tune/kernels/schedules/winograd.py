"""Baseline schedules of a convolution in Winograd's form (`kernels/winograd.py`): two ways to share it out.

by tiles     a task takes a rectangle of tiles through all three steps, for all channels of the result:
             what it computes in between stays in its caches, and the filters stream by
by channels  the image is transformed first; then a task takes some channels of the result, for all tiles:
             the filters are read once, the transformed image by every task

The sums of a row or rectangle of tiles stay in registers, one vector of channels for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.s_tir import Schedule

from gpu_aware_tune.kernels.schedules.blocks import (
    attempt,
    block_of,
    inline_elementwise,
    is_elementwise,
    loops_of_axes,
)
from gpu_aware_tune.kernels.schedules.tile_cost import Machine, divisors
from gpu_aware_tune.kernels.winograd import POINTS, SIZE, Role, roles_of

_POINTS = POINTS * POINTS
_FLOAT, _LINE = 4, 64  # bytes
_FEWEST = 4  # tiles in registers, below which loads and latency take more time than the arithmetic
_ROWS = (1, 2, 4)  # rectangles of a task, one below the other
_CHANNELS = 8  # vectors of a task, at most
_UNROLLED = 4  # channels of the sum
_TRANSFORM = 3.0  # cycles for each vector of a transformed tile, loads and stores included


@dataclass(frozen=True)
class Division:
    """One way to share a convolution out.

    Args:
        down, across: tiles whose sums are in registers together.
        rows: rectangles of so many tiles down that a task takes through all steps; 0 shares out channels.
        channels: vectors of the result's channels of a task where those are shared out.
        cycles: what it is expected to take.
    """

    down: int
    across: int
    rows: int
    channels: int
    cycles: float


@dataclass(frozen=True)
class Problem:
    """Tiles (images, down and across) and vectors of channels of a convolution."""

    batch: int
    down: int
    across: int
    inputs: int
    outputs: int
    lanes: int


def schedule_winograd(module: Any, machine: Machine) -> Iterator[Schedule]:
    """Schedule such a kernel's convolution in every way that TVM accepts, the promising ones first.

    Args:
        module: one PrimFunc named "main", not scheduled.
        machine: the CPU.

    Returns:
        Schedules whose other blocks are as they were; none where it has no such convolution, or what
        follows it does not go through its results in their order.
    """
    roles = roles_of(module["main"])
    if not roles:
        return
    base = Schedule(module, error_render_level="fast")
    problem = _problem(block_of(base, roles[Role.PRODUCT]))
    for keep_results in (False, True):
        inlined = base.copy()
        inline_elementwise(inlined, _kept(base, roles, keep_results))
        last = _last(inlined, roles)
        if last is not None:
            break
    else:
        return
    for division in divisions(problem, machine):
        change = partial(
            _by_tiles if division.rows else _by_channels, roles=roles, last=last, division=division
        )
        tried = attempt(inlined, change)
        if tried is not inlined:
            yield tried


def divisions(problem: Problem, machine: Machine) -> list[Division]:
    """Ways to share a convolution out: the best one of each kind, then the others, cheapest first."""
    found = []
    for down, across in _rectangles(problem.down, problem.across, machine):
        for rows in _ROWS:
            if problem.down % (down * rows) == 0:
                found.append(_tiles(problem, machine, down, across, rows))
        for channels in divisors(problem.outputs, _CHANNELS):
            found.append(_channels(problem, machine, down, across, channels))
    found.sort(key=lambda division: division.cycles)
    first = {bool(division.rows): division for division in reversed(found)}
    best = sorted(first.values(), key=lambda division: division.cycles)
    return [*best, *(division for division in found if division not in best)]


def can_divide(down: int, across: int, machine: Machine) -> bool:
    """Whether so many tiles fall into rectangles that registers can hold, and that fill them."""
    return any(True for _ in _rectangles(down, across, machine))


def _rectangles(down: int, across: int, machine: Machine) -> Iterator[tuple[int, int]]:
    most = machine.registers // 2  # LLVM takes as many for what it loads ahead
    for columns in divisors(across, most):
        for rows in divisors(down, most // columns):
            if rows * columns >= _FEWEST:
                yield rows, columns


def _tiles(p: Problem, machine: Machine, down: int, across: int, rows: int) -> Division:
    size = down * across * rows
    tasks = p.batch * (p.down // (down * rows)) * (p.across // across)
    panel = p.inputs * p.lanes * p.lanes * _FLOAT / _LINE * machine.costs.l2_line
    cycles = (_sums(p, machine, down * across) * rows + _POINTS * panel) * p.outputs
    cycles += _TRANSFORM * _POINTS * size * (p.inputs + p.outputs)
    filters = _POINTS * p.inputs * p.outputs * p.lanes * p.lanes * _FLOAT
    if filters > machine.costs.middle_bytes:
        cycles += filters / machine.costs.memory
    within = _POINTS * size * (p.inputs + p.outputs) * p.lanes * _FLOAT
    if within > machine.costs.middle_bytes:
        cycles += 2 * within / machine.costs.memory
    return Division(down, across, rows, 0, cycles * math.ceil(tasks / machine.units))


def _channels(p: Problem, machine: Machine, down: int, across: int, channels: int) -> Division:
    tiles = p.batch * p.down * p.across
    tasks = p.batch * p.outputs // channels
    cycles = _sums(p, machine, down * across) * (p.down * p.across // (down * across)) * channels
    cycles += _TRANSFORM * _POINTS * p.down * p.across * channels
    read = _POINTS * p.down * p.across * p.inputs * p.lanes * _FLOAT
    if read > machine.costs.middle_bytes:
        cycles += read / machine.costs.memory
    filters = _POINTS * p.inputs * channels * p.lanes * p.lanes * _FLOAT
    cycles += filters / machine.costs.memory
    first = _TRANSFORM * _POINTS * tiles * p.inputs / machine.units
    return Division(down, across, 0, channels, first + cycles * math.ceil(tasks / machine.units))


def _sums(p: Problem, machine: Machine, tiles: int) -> float:
    """Cycles for the sums of so many tiles, for one vector of channels of the result."""
    costs = machine.costs
    step = max(costs.full * tiles, costs.load * (tiles + 1), costs.latency)
    return _POINTS * p.inputs * p.lanes * step


def _problem(product: Any) -> Problem:
    batch, _, _, outputs, down, across, lanes, inputs, _ = (
        int(each.dom.extent) for each in product.iter_vars
    )
    return Problem(batch, down, across, inputs, outputs, lanes)


def _kept(schedule: Schedule, roles: dict[Role, str], results: bool) -> set[str]:
    """Blocks that stay as they are: the three, but not the last if its values may go straight on."""
    padding = schedule.get_producers(schedule.get_sblock(roles[Role.INPUT]))
    kept = {str(schedule.get(block).name_hint) for block in padding}
    kept |= {roles[Role.INPUT], roles[Role.PRODUCT]}
    return kept | {roles[Role.OUTPUT]} if results else kept


def _last(schedule: Schedule, roles: dict[Role, str]) -> str | None:
    """The block that makes results of the sums, if it goes through them in their order."""
    product = schedule.get_sblock(roles[Role.PRODUCT])
    readers = schedule.get_consumers(product)
    if len(readers) != 1:
        return None
    block = schedule.get(readers[0])
    shape = [int(extent) for extent in block.writes[0].source.shape]
    batch, _, _, outputs, down, across, lanes = (
        int(e) for e in schedule.get(product).writes[0].source.shape
    )
    fits = (
        is_elementwise(block)
        and len(shape) == 5
        and [shape[0], shape[1], shape[4]] == [batch, outputs, lanes]
        and [-(-shape[2] // SIZE), -(-shape[3] // SIZE)] == [down, across]
        and [int(each.dom.extent) for each in block.iter_vars] == shape
    )
    name = str(block.name_hint)
    return name if fits and loops_of_axes(schedule, name) is not None else None


def _by_tiles(schedule: Schedule, roles: dict[Role, str], last: str, division: Division) -> None:
    block = schedule.get_sblock(last)
    n, channel, down, across, within = _in_tiles(schedule, block)
    outer, inner = schedule.split(down, [None, division.down * division.rows])
    left, right = schedule.split(across, [None, division.across])
    schedule.reorder(n, outer, left, channel, inner, right, *within)
    task = schedule.fuse(n, outer, left)
    schedule.parallel(task)
    product, points = (schedule.get_sblock(roles[role]) for role in (Role.PRODUCT, Role.INPUT))
    schedule.compute_at(product, task, preserve_unit_loops=True)
    schedule.compute_at(points, task, preserve_unit_loops=True)
    _transform_image(schedule, points)
    _sum_up(schedule, product, division)
    _finish(schedule, within)


def _by_channels(schedule: Schedule, roles: dict[Role, str], last: str, division: Division) -> None:
    block = schedule.get_sblock(last)
    n, channel, down, across, within = _in_tiles(schedule, block)
    outer, inner = schedule.split(channel, [None, division.channels])
    schedule.reorder(n, outer, inner, down, across, *within)
    task = schedule.fuse(n, outer)
    schedule.parallel(task)
    product, points = (schedule.get_sblock(roles[role]) for role in (Role.PRODUCT, Role.INPUT))
    schedule.compute_at(product, task, preserve_unit_loops=True)
    batch, row = _transform_image(schedule, points)
    schedule.parallel(schedule.fuse(batch, row))
    _sum_up(schedule, product, division)
    _finish(schedule, within)


def _in_tiles(schedule: Schedule, block: Any) -> tuple[Any, Any, Any, Any, list[Any]]:
    """The loops over images, channels and tiles of the last block, and those within a tile."""
    n, channel, h, w, lane = schedule.get_loops(block)
    down, h = schedule.split(h, [None, SIZE])
    across, w = schedule.split(w, [None, SIZE])
    schedule.reorder(n, channel, down, across, h, w, lane)
    return n, channel, down, across, [h, w, lane]


def _finish(schedule: Schedule, within: list[Any]) -> None:
    *unrolled, lane = within
    schedule.vectorize(lane)
    for loop in unrolled:
        schedule.unroll(loop)


def _transform_image(schedule: Schedule, block: Any) -> tuple[Any, Any]:
    """Transform one tile after the other; the loops over images and rows."""
    n, a, b, down, across, channel, lane = schedule.get_loops(block)[-7:]
    schedule.reorder(n, down, across, channel, a, b, lane)
    schedule.vectorize(lane)
    schedule.unroll(a)
    schedule.unroll(b)
    return n, down


def _sum_up(schedule: Schedule, block: Any, division: Division) -> None:
    loops = schedule.get_loops(block)[-9:]
    n, a, b, channel, down, across, lane, block_of_terms, term = loops
    outer, down = schedule.split(down, [None, division.down])
    left, across = schedule.split(across, [None, division.across])
    terms, unrolled = schedule.split(term, [None, _UNROLLED])
    schedule.reorder(
        n, a, b, outer, left, channel, block_of_terms, terms, unrolled, down, across, lane
    )
    schedule.vectorize(lane)
    for loop in (down, across, unrolled):
        schedule.unroll(loop)
    init = schedule.decompose_reduction(block, block_of_terms)
    *_, down, across, lane = schedule.get_loops(init)
    schedule.vectorize(lane)
    schedule.unroll(down)
    schedule.unroll(across)
