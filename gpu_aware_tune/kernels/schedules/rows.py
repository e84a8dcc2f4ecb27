"""Kernels that need no more of their input than a row at a time: softmax, norms of rows.

Stage by stage, each of them would read and write the whole tensor: four times as much memory for a
softmax as it takes, and as many times all threads would wait for one another. Here one loop over rows has
all stages within, and what they hand on stays in the nearest cache.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.s_tir import Schedule

from gpu_aware_tune.kernels.schedules.access import axes_of
from gpu_aware_tune.kernels.schedules.blocks import (
    block_names,
    block_of,
    is_elementwise,
    is_reduction,
    loops_of_axes,
    realize_of,
)
from gpu_aware_tune.kernels.schedules.elementwise import PARALLEL_STEPS, parallel
from gpu_aware_tune.kernels.schedules.tile_cost import Machine

_LONGEST = 8192  # elements of a row, of which a few copies stay in the second-level cache
_SUMS = 2  # vectors of partial results: more would take longer to add up in the end
_LAST_LANES = 4  # partial results that are added up one by one


def schedule_rows(schedule: Schedule, machine: Machine) -> None:
    """Compute all stages of a kernel row by row.

    Raises:
        ValueError: it is not of that kind.
    """
    names = block_names(schedule)
    rows, length = _rows(schedule, names)
    stages = []
    for name in names[:-1]:
        if is_reduction(block_of(schedule, name)):
            stages += _partial_sums(schedule, name, machine)
        else:
            stages.append(name)
    last = names[-1]
    loops = loops_of_axes(schedule, last) or []
    outer = [(loop, extent) for loop, extent in zip(loops, rows, strict=False)]
    if math.prod(rows) * length >= PARALLEL_STEPS:
        row, depth = parallel(schedule, outer, machine)
    else:
        row, depth = outer[-1][0], len(outer)
    for name in reversed(stages):
        schedule.compute_at(schedule.get_sblock(name), row)
    for name in [*stages, last]:
        _within(schedule, name, depth, machine)


def _rows(schedule: Schedule, names: list[str]) -> tuple[list[int], int]:
    """The extents of the axes that all stages walk along first, and the length of a row."""
    axes = axes_of(block_of(schedule, names[-1])) or []
    extents = [axis.extent for axis in axes]
    if len(extents) < 2 or not is_elementwise(block_of(schedule, names[-1])):
        raise ValueError("no rows")
    if not any(is_reduction(block_of(schedule, name)) for name in names):
        raise ValueError("nothing is summed up along the rows")
    rows = extents[:-1]
    longest = 0
    for name in names:
        own = axes_of(block_of(schedule, name)) or []
        across = [axis.extent for axis in own if not axis.reduce]
        along = [axis.extent for axis in own if axis.reduce]
        if across[: len(rows)] != rows or len(across) > len(extents) or len(along) > 1:
            raise ValueError(f"{name} does not walk along the rows")
        if along and math.prod(across[len(rows) :]) > 1:
            raise ValueError(f"{name} has more than one result for a row")
        if loops_of_axes(schedule, name) is None:
            raise ValueError(f"the loops of {name} were changed before")
        longest = max([longest, *across[len(rows) :], *along])
    if longest > _LONGEST:
        raise ValueError("the rows are too long for the near caches")
    return rows, longest


def _partial_sums(schedule: Schedule, name: str, machine: Machine) -> list[str]:
    """Sum up (or the like) in vectors, their lanes four at a time, and those; gives the names."""
    loops = loops_of_axes(schedule, name) or []
    extent, dims = int(schedule.get(loops[-1]).extent), len(loops) - 1
    choices = (machine.lanes * count for count in (_SUMS, 1))
    lanes = next((lanes for lanes in choices if extent % lanes == 0 and extent >= 2 * lanes), 0)
    if not lanes:
        return [name]
    found = [name]
    for count in (_LAST_LANES, lanes // _LAST_LANES):
        terms = schedule.get_loops(schedule.get_sblock(found[0]))[dims]
        schedule.rfactor(schedule.split(terms, [None, count])[1], dims)
        found.insert(0, f"{found[0]}_rf")
    return found


def _within(schedule: Schedule, name: str, depth: int, machine: Machine) -> None:
    """Vectorise a stage below the loop over rows."""
    block = schedule.get_sblock(name)
    loops = schedule.get_loops(block)[depth:]
    if not loops:
        return
    if is_reduction(block_of(schedule, name)):
        if "_rf" in name:
            _sum_in_lanes(schedule, name, loops, machine)
        return
    if schedule.can_decompose_padding(block, loops[0]):
        # What is filled in and the copy apart: a condition would keep both from being vectorised.
        schedule.decompose_padding(block, loops[0])
        return
    _vectorize(schedule, loops[-1], machine)


def _sum_in_lanes(schedule: Schedule, name: str, loops: list[Any], machine: Machine) -> None:
    block = schedule.get_sblock(name)
    realize = realize_of(schedule, name)
    axes = axes_of(realize.block) or []
    lanes: list[Any] = []
    terms: list[Any] = []
    for loop in loops:
        variable = schedule.get(loop).loop_var
        at = next(n for n, v in enumerate(realize.iter_values) if v.same_as(variable))
        (terms if axes[at].reduce else lanes).append(loop)
    schedule.reorder(*terms, *lanes)
    lane = schedule.fuse(*lanes) if len(lanes) > 1 else lanes[0]
    _vectorize(schedule, lane, machine)
    init = schedule.decompose_reduction(block, terms[0])
    _vectorize(schedule, schedule.get_loops(init)[-1], machine)


def _vectorize(schedule: Schedule, loop: Any, machine: Machine) -> None:
    extent = int(schedule.get(loop).extent)
    lanes = extent if extent == _LAST_LANES else machine.lanes
    if extent % lanes:
        return  # LLVM's own loop handles the rest better
    if extent > lanes:
        many, loop = schedule.split(loop, [None, lanes])
        if extent // lanes <= _SUMS:
            schedule.unroll(many)
    schedule.vectorize(loop)
