"""Baseline schedule of a sum of products of integers: several terms a step, by one instruction.

The tiles are those of any reduction whose weights are packed, with the terms in groups of two or four: each
lane holds one result, a step adds the products of a group to it. For that the weights of a group lie side by
side, for all lanes of a vector; and so do the neighbours of the image that all lanes share.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm.s_tir import SBlock, Schedule
from tvm.tirx import For

from gpu_aware_tune.kernels.dot_products import register_intrinsics
from gpu_aware_tune.kernels.schedules.access import Access, Axis
from gpu_aware_tune.kernels.schedules.reductions import Reduction
from gpu_aware_tune.kernels.schedules.tile_cost import Machine, Tile

_MARK = "gpu_aware_tune.instruction"


class IntegerReduction(Reduction):
    """A reduction whose terms are products of the integers that the machine's instruction takes.

    Raises:
        ValueError: the block is not of that kind, or its terms do not come in groups.
    """

    def __init__(self, schedule: Schedule, name: str, machine: Machine) -> None:
        super().__init__(schedule, name, machine)
        if machine.dots is None:
            raise ValueError("the machine has no instruction for sums of integers")
        self.instruction = machine.dots
        image, weights = machine.dots.types
        types = [str(operand.buffer.dtype) for operand in self.operands]
        if self.result is None or sorted(types) != sorted(machine.dots.types):
            raise ValueError(f"{name} sums no products of {image} and {weights}")
        filters = [n for n in self.weights if types[n] == weights]
        if str(self.result.buffer.dtype) != "int32" or len(filters) != 1:
            raise ValueError(f"{name} sums no products with weights")
        self.filter = filters[0]
        self.image = 1 - self.filter
        self.terms = self._in_groups()
        self.vector = self._in_lanes()

    def tiles(self) -> list[Tile]:
        """The tiles that the instruction can fill, best first."""
        found: dict[tuple[int, ...], Tile] = {}
        for tile in super().tiles():
            whole = tile.lanes == self.machine.lanes and tile.vector == self.vector.position
            alone = all(number == self.filter for number, _ in tile.panels)
            if whole and tile.passes == 1 and alone:
                found.setdefault(tile.counts, tile)
        return list(found.values())

    def _in_groups(self) -> Axis:
        """The axis whose terms are summed in groups: where they lie side by side, if anywhere."""
        image, weights = self.operands[self.image], self.operands[self.filter]
        fitting = [
            axis
            for axis in self.axes
            if axis.reduce
            and axis.extent % self.instruction.terms == 0
            and all(operand.dims[axis.position] >= 0 for operand in (image, weights))
        ]
        if not fitting:
            raise ValueError(f"the terms of {self.name} do not come in groups")
        return min(fitting, key=lambda axis: image.strides[axis.position] != 1)

    def _in_lanes(self) -> Axis:
        """The axis whose results fill vectors: where they lie side by side, if anywhere."""
        image, weights = self.operands[self.image], self.operands[self.filter]
        result = self.result
        assert result is not None
        fitting = [
            axis
            for axis in self.axes
            if not axis.reduce
            and axis.extent % self.machine.lanes == 0
            and weights.dims[axis.position] >= 0
            and not image.uses(axis)
        ]
        if not fitting:
            raise ValueError(f"the results of {self.name} fill no vectors")
        return min(fitting, key=lambda axis: result.strides[axis.position] != 1)

    def _store_operands(self, schedule: Schedule, tile: Tile) -> None:
        image, weights = self.operands[self.image], self.operands[self.filter]
        writer, at_load = self._writer(schedule, self.filter)
        if at_load is not None:
            dim = weights.dims[self.vector.position]
            self._schedule_packing(schedule, writer, dim, self.machine.lanes, at_load)
        schedule.transform_layout(writer, ("write", 0), self._in_vectors(weights))
        if image.strides[self.terms.position] != 1:
            writer, _ = self._writer(schedule, self.image)
            schedule.transform_layout(writer, ("write", 0), self._side_by_side(image))

    def _in_vectors(self, weights: Access) -> Any:
        """The map of a filter's indices that puts what one step reads side by side."""
        lane, term = weights.dims[self.vector.position], weights.dims[self.terms.position]
        lanes, terms = self.machine.lanes, self.instruction.terms

        def vectors(*index: Any) -> list[Any]:
            rest = [value for dim, value in enumerate(index) if dim not in (lane, term)]
            blocks = [index[lane] // lanes, *rest, index[term] // terms]
            return [*blocks, index[lane] % lanes, index[term] % terms]

        return vectors

    def _side_by_side(self, image: Access) -> Any:
        """The map of an image's indices that puts the terms of a group last."""
        term, terms = image.dims[self.terms.position], self.instruction.terms

        def groups(*index: Any) -> list[Any]:
            outer = [value // terms if dim == term else value for dim, value in enumerate(index)]
            return [*outer, index[term] % terms]

        return groups

    def _terms(
        self, schedule: Schedule, loops: list[Any]
    ) -> tuple[list[tuple[Any, int]], list[Any]]:
        reduce = []
        within = []
        for axis in self.axes:
            if axis.position == self.terms.position:
                terms = self.instruction.terms
                steps, group = schedule.split(loops[axis.position], [None, terms])
                reduce.append((steps, axis.extent // terms))
                within.append(group)
            elif axis.reduce:
                reduce.append((loops[axis.position], axis.extent))
        return reduce, within

    def _use_instruction(self, schedule: Schedule, vector: Any) -> None:
        """Mark the loop over lanes for `use_instructions`, if that will be able to replace it."""
        register_intrinsics()
        schedule.annotate(vector, _MARK, self.instruction.name)
        use_instructions(schedule.copy())


def use_instructions(schedule: Schedule) -> None:
    """Replace the marked loops by instructions: the last step, as TVM cannot copy a schedule after it."""
    for name in _marked(schedule):
        for loop in schedule.get_loops(schedule.get_sblock(name)):
            intrinsic = schedule.get(loop).annotations.get(_MARK)
            if intrinsic is not None:
                schedule.unannotate(loop, _MARK)
                schedule.tensorize(loop, str(intrinsic))
                break


def _marked(schedule: Schedule) -> list[str]:
    """The names of the blocks in marked loops."""
    found: list[str] = []

    def visit(loop: For) -> None:
        if _MARK in loop.annotations:
            tvm_ffi.structural_walk(
                loop.body, (SBlock, lambda block: found.append(str(block.name_hint)))
            )

    tvm_ffi.structural_walk(schedule.mod["main"].body, (For, visit))
    return found


def integer_reduction(schedule: Schedule, name: str, machine: Machine) -> IntegerReduction | None:
    """A reduction block as a sum of products of integers; None where it is none."""
    try:
        return IntegerReduction(schedule, name, machine)
    except ValueError:
        return None
