"""Baseline schedule of a reduction: a register tile, its operands' layout, what reads it."""

from __future__ import annotations

import math
from typing import Any

from tvm.s_tir import Schedule

from gpu_aware_tune.kernels.packing import mark_packing, weight_buffers
from gpu_aware_tune.kernels.schedules.access import Access, Axis, accesses_of, axes_of
from gpu_aware_tune.kernels.schedules.blocks import (
    block_of,
    conditions_of,
    is_costly,
    is_elementwise,
    loops_of_axes,
)
from gpu_aware_tune.kernels.schedules.elementwise import PARALLEL_STEPS, parallel
from gpu_aware_tune.kernels.schedules.tile_cost import Machine, Tile, divisors, held
from gpu_aware_tune.kernels.schedules.tiles import best_tiles, outer_order, plane_of

_PARALLEL_TERMS = 131_072  # of vectorised reductions; below, one thread is faster
_ROW_TERMS = 32  # unrolled terms of one result
_ROW_STEP = 0.35  # cycles of one term in LLVM's loop
_PACKED_ROW = 128  # elements of one row copied at a time
_PANEL_ROW = 256  # elements of one row that go to panels side by side
_PARALLEL = 1  # tirx.ForKind
_NEARBY = 65_536  # elements of an image that does not stay in the near caches
_UNROLLED, _UNROLLED_WHOLE = 72, 144  # multiply-adds in one unrolled body; where that is all of it


class Reduction:
    """A reduction block, described as it is before it is scheduled."""

    def __init__(self, schedule: Schedule, name: str, machine: Machine) -> None:
        self.name = name
        self.machine = machine
        block = block_of(schedule, name)
        self.axes: list[Axis] = axes_of(block) or []
        self.operands: list[Access] = accesses_of(block, block.reads) or []
        results = accesses_of(block, block.writes) or []
        self.result: Access | None = results[0] if len(results) == 1 else None
        weights = weight_buffers(schedule.mod["main"])
        self.weights = frozenset(
            number
            for number, operand in enumerate(self.operands)
            if any(operand.buffer.same_as(weight) for weight in weights)
        )

    @property
    def steps(self) -> int:
        """Multiply-adds of the whole block."""
        return math.prod(axis.extent for axis in self.axes)

    def tiles(self) -> list[Tile]:
        """The tiles worth trying, best first; none where the block has no result to spread."""
        if self.result is None or not self.operands:
            return []
        return best_tiles(self.axes, self.operands, self.result, self.machine, self.weights)

    def apply(self, schedule: Schedule, tile: Tile, fuse_consumer: bool) -> None:
        """Schedule the block with a tile; TVM's refusals are for the caller to catch."""
        if tile.passes > 1:
            self._apply_in_passes(schedule, tile, fuse_consumer)
            return
        self._store_operands(schedule, tile)
        block = schedule.get_sblock(self.name)
        stages = self._stages(schedule, block, tile, fuse_consumer)
        self._lay_out_result(schedule, block, tile)
        loops = self._loops(schedule)
        order = outer_order(tile, self.axes, self.operands, self.machine)
        outer, inner, vector = self._split(schedule, loops, tile, order)
        reduce, within = self._terms(schedule, loops)
        schedule.reorder(*(loop for loop, _ in [*outer, *reduce]), *inner, vector, *within)
        at, depth = self._parallel(schedule, outer, _PARALLEL_TERMS)
        for stage, unrolled in stages:
            schedule.reverse_compute_at(stage, at)
            self._finish(schedule, stage, depth, tile, unrolled)
        if not within:
            schedule.vectorize(vector)
        for loop in inner:
            schedule.unroll(loop)
        self._unroll(schedule, reduce, math.prod(tile.counts))
        self._pad_nearby(schedule, block)
        init = schedule.decompose_reduction(block, reduce[0][0])
        self._finish(schedule, init, depth, tile, unrolled=True)
        self._use_instruction(schedule, vector)

    def _store_operands(self, schedule: Schedule, tile: Tile) -> None:
        """Copy the operands that the tile wants in another layout."""
        for number in tile.packed:
            self._pack(schedule, tile, number)
        for number, position in tile.panels:
            self._store_in_panels(schedule, tile, number, self.axes[position])

    def _terms(
        self, schedule: Schedule, loops: list[Any]
    ) -> tuple[list[tuple[Any, int]], list[Any]]:
        """The loops over terms, with their extents, and those of terms that one step sums up."""
        return [(loops[axis.position], axis.extent) for axis in self.axes if axis.reduce], []

    def _use_instruction(self, schedule: Schedule, vector: Any) -> None:
        """Let an instruction take the place of a step's loops, where there is one: of floats, none."""

    def _pad_nearby(self, schedule: Schedule, block: Any) -> None:
        """Pad an image piece by piece, right before a piece is read, where it is read only once.

        So it is by a depthwise convolution, which would otherwise wait for the padded image to go to
        memory and back.
        """
        first = schedule.get_loops(block)[0]
        if int(schedule.get(first).kind) != _PARALLEL:
            return
        spatial = [axis for axis in self.axes if not axis.reduce and axis.extent > 1]
        for producer in schedule.get_producers(block):
            found = schedule.get(producer)
            image = [o for o in self.operands if o.buffer.same_as(found.writes[0].source)]
            once = all(access.uses(axis) for access in image for axis in spatial)
            padded = bool(conditions_of(found)) and image and image[0].elements >= _NEARBY
            if not (once and padded) or len(schedule.get_consumers(producer)) != 1:
                continue
            try:
                schedule.compute_at(producer, first)
            except Exception:  # where TVM refuses, the image is padded as a whole
                continue
            last = schedule.get_loops(producer)[-1]
            if int(schedule.get(last).extent) == self.machine.lanes:
                schedule.vectorize(last)

    def _apply_in_passes(self, schedule: Schedule, tile: Tile, fuse_consumer: bool) -> None:
        """Sum all results of a block of channels up side by side, a block of the input at a time."""
        block = schedule.get_sblock(self.name)
        loops = self._loops(schedule)
        kept = held(tile, self.axes, self.operands)
        image = [axis for axis in self.axes if not axis.reduce and axis not in kept]
        outer, inner, vector = self._split(schedule, loops, tile, [*kept, *image])
        blocks, *terms = [loops[axis.position] for axis in self.axes if axis.reduce]
        outside, within = outer[: len(kept)], [loop for loop, _ in outer[len(kept) :]]
        around = [loop for loop, _ in outside]
        schedule.reorder(*around, blocks, *within, *terms, *inner, vector)
        at, depth = self._parallel(schedule, outside, _PARALLEL_TERMS)
        consumers = schedule.get_consumers(block)
        schedule.vectorize(vector)
        for loop in inner:
            schedule.unroll(loop)
        if fuse_consumer and len(consumers) == 1 and self._fits(schedule, consumers[0]):
            schedule.reverse_compute_at(consumers[0], at)
            self._finish(schedule, consumers[0], depth, tile, unrolled=False)
        init = schedule.decompose_reduction(block, blocks)
        self._finish(schedule, init, depth, tile, unrolled=False)

    def _loops(self, schedule: Schedule) -> list[Any]:
        """The loop behind each axis."""
        loops = loops_of_axes(schedule, self.name)
        if loops is None:
            raise ValueError(f"the loops of {self.name} were changed before")
        return loops

    def _split(
        self, schedule: Schedule, loops: list[Any], tile: Tile, order: list[Axis]
    ) -> tuple[list[tuple[Any, int]], list[Any], Any]:
        """Split axes into loops over tiles, with their extents, loops within a tile, and lanes."""
        outer, inner, vector = [], [], None
        for axis in order:
            loop, count = loops[axis.position], tile.counts[axis.position]
            if axis.position == tile.vector:
                first, along, vector = schedule.split(loop, [None, count, tile.lanes])
            else:
                first, along = schedule.split(loop, [None, count])
            outer.append((first, axis.extent // tile.size(axis)))
            inner.append(along)
        return outer, inner, vector

    def apply_rows(self, schedule: Schedule, fuse_consumer: bool) -> None:
        """Leave the innermost loop to LLVM, with few terms unrolled in it; rows run in parallel.

        LLVM loads strided elements as whole vectors and shuffles them, where TVM reads one by one.
        """
        block = schedule.get_sblock(self.name)
        loops = self._loops(schedule)
        spatial = [axis for axis in self.axes if not axis.reduce]
        terms = [axis for axis in self.axes if axis.reduce]
        if len(spatial) < 2 or math.prod(axis.extent for axis in terms) > _ROW_TERMS:
            raise ValueError(f"{self.name} has one axis, or too many terms")
        outer = [(loops[axis.position], axis.extent) for axis in spatial[:-1]]
        consumers = schedule.get_consumers(block)
        schedule.reorder(*(loops[axis.position] for axis in [*spatial, *terms]))
        row, _ = self._parallel(schedule, outer, PARALLEL_STEPS)
        for axis in terms:
            schedule.unroll(loops[axis.position])
        if fuse_consumer and len(consumers) == 1 and self._fits(schedule, consumers[0]):
            schedule.reverse_compute_at(consumers[0], row)

    def row_cycles(self) -> float:
        """What `apply_rows` is expected to take, in the unit of `Tile.cycles`."""
        return _ROW_STEP * self.steps

    def _pack(self, schedule: Schedule, tile: Tile, number: int) -> None:
        """Give an operand a layout in which the tile's vectorised axis is contiguous."""
        dim = self.operands[number].dims[tile.vector]
        size = tile.size(self.axes[tile.vector])
        writer, at_load = self._writer(schedule, number)
        if at_load is not None:
            self._schedule_packing(schedule, writer, dim, size, at_load)

        def blocked(*index: Any) -> list[Any]:
            rest = [value for position, value in enumerate(index) if position != dim]
            return [index[dim] // size, *rest, index[dim] % size]

        schedule.transform_layout(writer, ("write", 0), blocked)

    def _writer(self, schedule: Schedule, number: int) -> tuple[Any, bool | None]:
        """What writes an operand: a block of the kernel, or a copy that is made here.

        Returns:
            The block; and, of a copy, whether it is made when the library is loaded.
        """
        block = schedule.get_sblock(self.name)
        buffer = self.operands[number].buffer
        for producer in schedule.get_producers(block):
            if any(region.source.same_as(buffer) for region in schedule.get(producer).writes):
                return producer, None
        copy = schedule.cache_read(block, number, "global")
        return copy, mark_packing(schedule, copy, buffer)

    def _store_in_panels(self, schedule: Schedule, tile: Tile, number: int, axis: Axis) -> None:
        """Store an operand tile by tile along an axis that its last dimensions are."""
        operand, size = self.operands[number], tile.size(axis)
        first = plane_of(operand, axis)
        assert first is not None
        shape = [int(extent) for extent in operand.buffer.shape]
        writer, at_load = self._writer(schedule, number)
        if at_load is not None:
            self._schedule_panels(schedule, writer, first, size, at_load)

        def panels(*index: Any) -> list[Any]:
            along = index[first]
            for value, extent in zip(index[first + 1 :], shape[first + 1 :], strict=True):
                along = along * extent + value
            return [along // size, *index[:first], along % size]

        schedule.transform_layout(writer, ("write", 0), panels)

    def _schedule_panels(
        self, schedule: Schedule, writer: Any, first: int, size: int, at_load: bool
    ) -> None:
        """Copy some panels side by side, so that of each row whole cache lines are read."""
        *rows, along = self._fused_from(schedule, schedule.get_loops(writer), first)
        extent = int(schedule.get(along).extent)
        many = divisors(extent // size, max(1, _PANEL_ROW // size))[0]
        blocks, few, within = schedule.split(along, [None, many, size])
        schedule.reorder(blocks, *rows, few, within)
        if size % (self.machine.lanes // 2) == 0:
            schedule.vectorize(within)
        if self.operands and extent >= 2 * self.machine.units and not at_load:
            schedule.parallel(blocks)

    @staticmethod
    def _fused_from(schedule: Schedule, loops: list[Any], first: int) -> list[Any]:
        """Loops with those from `first` on as one."""
        last = loops[first:]
        return [*loops[:first], schedule.fuse(*last) if len(last) > 1 else last[0]]

    def _schedule_packing(
        self, schedule: Schedule, writer: Any, dim: int, size: int, at_load: bool
    ) -> None:
        """Copy in pieces that fit the nearest cache: read rows, write the columns of a block.

        What is copied when the library is loaded is not shared out: no threads wait there yet.
        """
        loops = schedule.get_loops(writer)
        extents = [int(schedule.get(loop).extent) for loop in loops]
        part = next((at for at in range(len(loops)) if at != dim and extents[at] > 1), None)
        if part is None:
            return
        blocks, within = schedule.split(loops[dim], [None, size])
        row = math.prod(extents[at] for at in range(part + 1, len(loops)) if at != dim)
        step = divisors(extents[part], max(1, _PACKED_ROW // row))[0]
        parts, inside = schedule.split(loops[part], [None, step])
        rest = [loop for at, loop in enumerate(loops) if at not in (dim, part)]
        schedule.reorder(blocks, parts, within, inside, *rest)
        count = extents[dim] // size
        if math.prod(extents) >= PARALLEL_STEPS and not at_load:
            if count < 2 * self.machine.units:
                blocks = schedule.fuse(blocks, parts)
            schedule.parallel(blocks)

    def _lay_out_result(self, schedule: Schedule, block: Any, tile: Tile) -> None:
        """Put the vectorised axis last in the results' registers."""
        assert self.result is not None
        dim = self.result.dims[tile.vector]
        if self.result.strides[tile.vector] == 1 or dim < 0:
            return

        def last(*index: Any) -> list[Any]:
            rest = [value for position, value in enumerate(index) if position != dim]
            return [*rest, index[dim]]

        schedule.transform_layout(block, ("write", 0), last)

    def _stages(
        self, schedule: Schedule, block: Any, tile: Tile, fuse_consumer: bool
    ) -> list[tuple[Any, bool]]:
        """The blocks to compute at the tile after it, and whether each is to be unrolled."""
        consumers = schedule.get_consumers(block)
        fitting = fuse_consumer and len(consumers) == 1
        fitting = fitting and self._fits(schedule, consumers[0], tile)
        if fitting and not is_costly(schedule.get(consumers[0])):
            return [(consumers[0], True)]
        copy = schedule.cache_write(block, 0, "global")
        return [(copy, True), (consumers[0], False)] if fitting else [(copy, True)]

    def _fits(self, schedule: Schedule, consumer: Any, tile: Tile | None = None) -> bool:
        """Whether a consumer reads each result once, or with a tile all but what was padded."""
        block = schedule.get(consumer)
        axes = axes_of(block)
        if axes is None or not is_elementwise(block):
            return False
        own = [axis for axis in self.axes if not axis.reduce and axis.extent > 1]
        extents = [axis.extent for axis in axes if axis.extent > 1]
        if math.prod(extents) == math.prod(axis.extent for axis in own):
            return True
        if tile is None or len(extents) != len(own):
            return False
        # Less than a whole tile is cut, and no vector: each store would need a condition.
        cut = [(axis, axis.extent - extent) for axis, extent in zip(own, extents, strict=True)]
        return all(
            left == 0 or (axis.position != tile.vector and 0 < left < tile.size(axis))
            for axis, left in cut
        )

    def _parallel(
        self, schedule: Schedule, outer: list[tuple[Any, int]], least: int
    ) -> tuple[Any, int]:
        """Make outer loops parallel from `least` steps on; gives the last loop, and how many."""
        if self.steps < least:
            return outer[-1][0], len(outer)
        return parallel(schedule, outer, self.machine)

    def _finish(
        self, schedule: Schedule, block: Any, depth: int, tile: Tile, unrolled: bool
    ) -> None:
        """Vectorise a block below the tile's loops, unroll the rest: results stay in registers."""
        loops = schedule.get_loops(block)[depth:]
        if not loops:
            return
        *others, last = loops
        extent = int(schedule.get(last).extent)
        along_result = self.result is not None and self.result.strides[tile.vector] == 1
        is_init = extent == tile.lanes
        if (along_result or is_init) and extent % tile.lanes == 0 and tile.lanes > 1:
            if extent > tile.lanes:
                more, last = schedule.split(last, [None, tile.lanes])
                others.append(more)
            schedule.vectorize(last)
        else:
            others.append(last)
        if unrolled:
            for loop in others:
                schedule.unroll(loop)

    def _unroll(self, schedule: Schedule, reduce: list[tuple[Any, int]], body: int) -> None:
        """Unroll the innermost reduction loops while the body stays small."""
        whole = body * math.prod(extent for _, extent in reduce)
        most = _UNROLLED_WHOLE if whole <= _UNROLLED_WHOLE else _UNROLLED
        for loop, extent in reversed(reduce[1:]):
            body *= extent
            if body > most:
                return
            schedule.unroll(loop)
