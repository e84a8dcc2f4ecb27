"""Partial sums: a reduction along contiguous elements, one result a lane, and the sum of those."""

from __future__ import annotations

import math

from tvm.s_tir import Schedule

from gpu_aware_tune.kernels.schedules.access import Axis
from gpu_aware_tune.kernels.schedules.blocks import loops_of_axes
from gpu_aware_tune.kernels.schedules.reductions import Reduction
from gpu_aware_tune.kernels.schedules.tile_cost import Machine, divisors


def split_lanes(schedule: Schedule, name: str, machine: Machine) -> None:
    """Turn a reduction along contiguous elements into one partial result a lane, then their sum.

    For reductions whose results lie far apart in memory but whose terms lie side by side (means
    over an image, rows of a softmax, a matrix times one vector).

    Raises:
        ValueError: the block is not of that kind.
    """
    reduction = Reduction(schedule, name, machine)
    loops = loops_of_axes(schedule, name)
    if loops is None or reduction.result is None:
        raise ValueError(f"{name} has no loop for each axis, or several results")
    run = _contiguous(reduction)
    terms = math.prod(axis.extent for axis in run)
    lanes = divisors(terms, machine.lanes)[0]
    if lanes < machine.lanes // 4 or terms < 2 * lanes:
        raise ValueError(f"the terms of {name} lie apart")
    chosen = [loops[axis.position] for axis in run if axis.extent > 1]
    fused = schedule.fuse(*chosen) if len(chosen) > 1 else chosen[0]
    lane = schedule.split(fused, [None, lanes])[1]
    schedule.rfactor(lane, len(reduction.result.buffer.shape))


def _contiguous(reduction: Reduction) -> list[Axis]:
    """The last reduction axes that every operand walks like one contiguous axis, or not at all."""
    run: list[Axis] = []
    span = 1
    for axis in reversed([axis for axis in reduction.axes if axis.reduce]):
        steps = {operand.strides[axis.position] for operand in reduction.operands} - {0}
        if axis.extent > 1 and steps != {span}:
            break
        run.insert(0, axis)
        span *= axis.extent
    return run
