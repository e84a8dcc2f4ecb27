"""Baseline schedule of an elementwise block: parallel outer loops, a vectorised inner one."""

from __future__ import annotations

import math
from typing import Any

from tvm.s_tir import Schedule

from gpu_aware_tune.kernels.schedules.access import Access, Axis, accesses_of, axes_of
from gpu_aware_tune.kernels.schedules.blocks import block_of, deciding_variables, loops_of_axes
from gpu_aware_tune.kernels.schedules.tile_cost import Machine, divisors

PARALLEL_STEPS = 32_768  # below, waking the other threads costs more than they save


def schedule_elementwise(schedule: Schedule, name: str, machine: Machine) -> None:
    """Run a block's rows in parallel and vectorise along them; loops already changed are left."""
    block = block_of(schedule, name)
    axes = axes_of(block)
    loops = loops_of_axes(schedule, name)
    accesses = accesses_of(block, [*block.reads, *block.writes])
    if not axes or loops is None or accesses is None or any(axis.reduce for axis in axes):
        return
    crossed = _crossed(axes, accesses)
    if crossed is not None:
        _transpose(schedule, axes, loops, crossed, machine)
        return
    deciding = _deciding(block, axes)
    first = _row(axes, accesses, deciding)
    row = math.prod(axis.extent for axis in axes[first:])
    rows = math.prod(axis.extent for axis in axes[:first])
    inner = schedule.fuse(*loops[first:]) if len(loops) - first > 1 else loops[first]
    outer = [(loops[axis.position], axis.extent) for axis in axes[:first]]
    if rows < 4 * machine.units and row >= 2 * PARALLEL_STEPS:
        parts = _parts(row, machine)
        split, inner = schedule.split(inner, [parts, row // parts])
        outer.append((split, parts))
        row //= parts
    if outer and math.prod(axis.extent for axis in axes) >= PARALLEL_STEPS:
        parallel(schedule, outer, machine)
    variable = schedule.get_sblock(name)
    if schedule.can_decompose_padding(variable, inner):
        # The zeros and the copy apart: a condition inside would keep both from being vectorised.
        schedule.decompose_padding(variable, inner)
        return
    # Where elements are gathered or chosen one by one, LLVM's own loop beats TVM's vectors.
    last = max((axis.position for axis in axes if axis.extent > 1), default=0)
    even = all(access.strides[last] in (0, 1) for access in accesses)
    if even and not deciding & {axis.position for axis in axes[first:]}:
        _vectorize(schedule, inner, row, machine)


def parallel(schedule: Schedule, loops: list[tuple[Any, int]], machine: Machine) -> tuple[Any, int]:
    """Share the first of nested loops out to the threads: as many as make enough equal pieces.

    Args:
        loops: each with its extent.

    Returns:
        The innermost of the loops, and how many there are now.
    """
    taken, pieces = 0, 1
    while taken < len(loops) and pieces < 8 * machine.units:
        pieces *= loops[taken][1]
        taken += 1
    chosen = [loop for loop, _ in loops[:taken]]
    first = schedule.fuse(*chosen) if taken > 1 else chosen[0]
    schedule.parallel(first)
    rest = [loop for loop, _ in loops[taken:]]
    return (rest[-1] if rest else first), 1 + len(rest)


def _crossed(axes: list[Axis], accesses: list[Access]) -> tuple[Axis, Axis] | None:
    """The axes along which a buffer is read and the result is written, where those are not one."""
    *reads, write = accesses
    along = [axis for axis in axes if axis.extent >= 8 and write.strides[axis.position] == 1]
    for read in reads:
        across = [axis for axis in axes if axis.extent >= 8 and read.strides[axis.position] == 1]
        if (
            along
            and across
            and along != across
            and read.strides[along[0].position] not in (0, None)
        ):
            return across[0], along[0]
    return None


def _transpose(
    schedule: Schedule,
    axes: list[Axis],
    loops: list[Any],
    crossed: tuple[Axis, Axis],
    machine: Machine,
) -> None:
    """Copy square blocks, so that every cache line is used up while it is near."""
    inner = {
        axis.position: schedule.split(loops[axis.position], [None, _block(axis)])
        for axis in crossed
    }
    outer = [inner[axis.position][0] if axis in crossed else loops[axis.position] for axis in axes]
    schedule.reorder(*outer, *(inner[axis.position][1] for axis in crossed))
    if math.prod(axis.extent for axis in axes) >= PARALLEL_STEPS:
        sizes = [axis.extent // (_block(axis) if axis in crossed else 1) for axis in axes]
        parallel(schedule, list(zip(outer, sizes, strict=True)), machine)


def _block(axis: Axis) -> int:
    return divisors(axis.extent, 16)[0]


def _deciding(block: Any, axes: list[Axis]) -> set[int]:
    """Positions of the axes that conditions look at: one decision a row, not one an element."""
    used = deciding_variables(block)
    return {
        axis.position
        for axis in axes
        if any(block.iter_vars[axis.position].var.same_as(variable) for variable in used)
    }


def _row(axes: list[Axis], accesses: list[Access], deciding: set[int]) -> int:
    """The first axis of the longest run of last axes that every buffer walks like one."""
    moving = [axis for axis in axes if axis.extent > 1]
    if not moving:
        return 0
    *before, last = moving
    first, span = last.position, last.extent
    for axis in reversed(before):
        steps = [(a.strides[last.position], a.strides[axis.position]) for a in accesses]
        chained = all(a is not None and b is not None and b == a * span for a, b in steps)
        if not chained or axis.position in deciding:
            break
        first, span = axis.position, span * axis.extent
    return first


def _parts(row: int, machine: Machine) -> int:
    """Into how many equal parts a long row is cut for the threads."""
    fitting = [d for d in divisors(row, 8 * machine.units) if row // d % machine.lanes == 0]
    return (fitting or divisors(row, 8 * machine.units))[0]


def _vectorize(schedule: Schedule, loop: Any, extent: int, machine: Machine) -> None:
    """Vectorise where the extent divides well; LLVM does as well with what is left a loop."""
    for lanes in (machine.lanes, machine.lanes // 2, machine.lanes // 4):
        if lanes > 1 and extent % lanes == 0:
            if extent > lanes:
                loop = schedule.split(loop, [None, lanes])[1]
            schedule.vectorize(loop)
            return
