"""The images that a convolution walks over: their rows as one, or their channels row by row.

A 1x1 convolution reads and writes images from end to end, yet its kernel has an axis for rows and one
for columns: of a row of 56 no whole number of 16 lanes fits, of the 3136 elements of an image it does.

Of images of 16 x 16 elements, the same row of all channels lies in the same few sets of the nearest
cache, so that they evict one another while a convolution sums over the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tvm.s_tir import Schedule
from tvm.tirx import IndexMap

from gpu_aware_tune.kernels.schedules.access import Access, Axis, accesses_of, axes_of
from gpu_aware_tune.kernels.schedules.blocks import is_elementwise

_ALIAS = 1024  # bytes: what lies a multiple of them apart shares a sixteenth of the nearest cache
_MANY_CHANNELS = 32  # channels, from which on that matters


def flatten_planes(schedule: Schedule, name: str) -> None:
    """Make two axes of a reduction, and of the one elementwise block that reads it, into one.

    The result in between gets the shape that goes with it; arguments keep theirs.

    Args:
        schedule: changed in place.
        name: the reduction's block; its loops have not been touched.

    Raises:
        ValueError: there are no such axes.
    """
    block = schedule.get_sblock(name)
    consumers = schedule.get_consumers(block)
    found = schedule.get(block)
    plane = _plane(found)
    if plane is None or len(consumers) != 1:
        raise ValueError(f"{name} has no plane, or not one reader")
    reader = schedule.get(consumers[0])
    inner, dim = plane
    at = _same_axis(found, inner, reader)
    if not is_elementwise(reader) or at is None:
        raise ValueError(f"{name} is read in another order")
    schedule.transform_layout(block, ("write", 0), _merged(dim, inner))
    _merge_axes(schedule, block, inner.position, inner)
    _merge_axes(schedule, consumers[0], at, inner)


def interleave_rows(schedule: Schedule, name: str) -> None:
    """Store what a reduction reads row by row, of each row all channels, where images would alias.

    Only what the kernel has made itself, such as the padded image.

    Args:
        schedule: changed in place.
        name: the reduction's block.

    Raises:
        ValueError: there is nothing like that.
    """
    block = schedule.get_sblock(name)
    axes = axes_of(schedule.get(block)) or []
    for access in accesses_of(schedule.get(block), schedule.get(block).reads) or []:
        at = _crowded(access, axes)
        for producer in schedule.get_producers(block):
            writes = schedule.get(producer).writes
            if at is not None and writes[0].source.same_as(access.buffer):
                schedule.transform_layout(producer, ("write", 0), _before_last(at))
                return
    raise ValueError(f"{name} reads nothing that aliases")


def _crowded(access: Access, axes: list[Axis]) -> int | None:
    """The dimension in which what is summed lies so far apart that it aliases; None: there is none."""
    for axis in axes:
        step, at = access.strides[axis.position], access.dims[axis.position]
        summed = axis.reduce and axis.extent >= _MANY_CHANNELS
        if summed and step and at >= 0 and step * access.itemsize % _ALIAS == 0:
            return at if at < len(access.buffer.shape) - 2 else None
    return None


def _before_last(at: int) -> Callable[..., list[Any]]:
    """The map of indices that moves dimension `at` to the place before the last."""

    def moved(*index: Any) -> list[Any]:
        return [*index[:at], *index[at + 1 : -1], index[at], index[-1]]

    return moved


def _plane(block: Any) -> tuple[Axis, int] | None:
    """The second of two neighbouring axes that all buffers walk as one, and its result's dimension."""
    axes = axes_of(block) or []
    operands = accesses_of(block, block.reads) or []
    results = accesses_of(block, block.writes) or []
    if len(results) != 1 or not operands:
        return None
    for outer, inner in pairwise(axes):
        if outer.reduce or inner.reduce or min(outer.extent, inner.extent) == 1:
            continue
        dims = [results[0].dims[axis.position] for axis in (outer, inner)]
        beside = min(dims) >= 0 and dims[1] == dims[0] + 1
        buffers = [*operands, *results]
        if beside and all(_walked_as_one(each, outer, inner) for each in buffers):
            return inner, dims[1]
    return None


def _same_axis(block: Any, inner: Axis, reader: Any) -> int | None:
    """The position of an axis, which follows its neighbour, in a reader with the same axes.

    Where rows are read pixel by pixel, axes of extent 1 do not count: of a convolution that writes
    blocks of channels, those of a 1x1 window are not summed over any more. One that reads blocks as
    well keeps its rows, which fit the nearest cache.
    """
    axes = [axis for axis in axes_of(block) or [] if not axis.reduce]
    others = axes_of(reader) or []
    operands = accesses_of(block, block.reads) or []
    if any(operand.strides[inner.position] == 1 for operand in operands):
        axes = [axis for axis in axes if axis.extent > 1]
        others = [axis for axis in others if axis.extent > 1]
    if [axis.extent for axis in axes] != [axis.extent for axis in others]:
        return None
    at = axes.index(inner)
    found = others[at].position
    return found if others[at - 1].position == found - 1 else None


def _walked_as_one(access: Access, outer: Axis, inner: Axis) -> bool:
    far, near = access.strides[outer.position], access.strides[inner.position]
    return far is not None and near is not None and far == near * inner.extent


def _merged(at: int, inner: Axis) -> Callable[..., list[Any]]:
    """The map of indices that makes dimension `at` and the one before it one."""

    def merged(*index: Any) -> list[Any]:
        return [*index[: at - 1], index[at - 1] * inner.extent + index[at], *index[at + 1 :]]

    return merged


def _merge_axes(schedule: Schedule, block: Any, at: int, inner: Axis) -> None:
    variables = schedule.get(block).iter_vars
    index_map = IndexMap.from_func(
        _merged(at, inner), ndim=len(variables), index_dtype=str(variables[0].var.ty)
    )
    schedule.transform_block_layout(block, index_map)
