"""How a kernel walks over the channels of its images, and the same kernel on blocks of channels.

The images of a kernel fall into sides: what a convolution reads, with the padding before it, and all
the rest. On one side every block of the kernel walks over the channels of all images along one axis, or
the side cannot be blocked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm.ir.expr import TensorLoad
from tvm.s_tir import SBlock, Schedule
from tvm.sym import Analyzer
from tvm.sym.pattern import detect_linear_equation
from tvm.tirx import LE, Add, BufferStore, IndexMap, IntImm, Mul, PrimFunc

from gpu_aware_tune.kernels.packing import weight_buffers
from gpu_aware_tune.kernels.schedules.access import Axis, axes_of, variables_in
from gpu_aware_tune.kernels.schedules.blocks import is_reduction

_CHANNELS = 1  # the dimension
_RANKS = (3, 4)  # of images and filters: of sound and of pictures


@dataclass(frozen=True)
class Side:
    """Images of a kernel that are all in blocks of channels, or none of them.

    Args:
        parameters: numbers of those that are arguments or results.
        convolved: whether a convolution reads or writes them.
        uniform: whether they can be in blocks.
        axes: by block's name, the position of the axis that walks over the channels.
        places: for each image one block that touches it, "read" or "write", and which one.
    """

    parameters: frozenset[int]
    convolved: bool
    uniform: bool
    axes: dict[str, int]
    places: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Filter:
    """The weights of a convolution: argument `parameter`, number `number` of what `block` reads."""

    parameter: int
    block: str
    number: int
    outputs: int
    inputs: int | None  # positions of the axes of its first two dimensions


class Kernel:
    """A kernel as it was fused, described by its sides."""

    def __init__(self, function: PrimFunc, lanes: int) -> None:
        self.function, self.lanes = function, lanes
        self.blocks = _blocks(function)
        self.filter = self._filter()
        self.sides = self._sides()

    def blocked(self, sides: Collection[Side], filter_dims: Sequence[int]) -> PrimFunc:
        """The kernel with these sides' images in blocks, and these dimensions of its filter."""
        schedule = Schedule(tvm.IRModule({"main": self.function}), error_render_level="fast")
        for block in self.blocks:
            name = str(block.name_hint)
            split = sorted({side.axes[name] for side in sides if name in side.axes})
            if split:
                variable = schedule.get_sblock(name)
                dtype = str(block.iter_vars[0].var.ty)
                halves = _halved(axes_of(block) or [], split, self.lanes)
                index_map = IndexMap.from_func(halves, ndim=len(block.iter_vars), index_dtype=dtype)
                schedule.transform_block_layout(variable, index_map)
        for side in sides:
            for name, way, number in side.places:
                schedule.transform_layout(schedule.get_sblock(name), (way, number), self._image)
        if self.filter is not None and filter_dims:
            block, place = schedule.get_sblock(self.filter.block), ("read", self.filter.number)
            schedule.transform_layout(block, place, filter_map(filter_dims, self.lanes))
        return _decided_by_blocks(schedule.mod["main"], self.lanes)

    def filter_dims(self, sides: Collection[Side]) -> tuple[int, ...]:
        """Which of the first two dimensions of the filter go in blocks with sides, the last one last."""
        if self.filter is None:
            return ()
        split = {side.axes.get(self.filter.block) for side in sides}
        inputs = self.filter.inputs in split - {None}
        if self.filter.outputs not in split:
            # Sums of integers need the axis of a group of terms to be a dimension of the filter.
            dtype = str(self.function.params[self.filter.parameter].dtype)
            return (1,) if inputs and dtype in ("int8", "int16") else ()
        return (1, 0) if inputs else (0,)

    def _image(self, *index: Any) -> list[Any]:
        batch, channel, *rest = index
        return [batch, channel // self.lanes, *rest, channel % self.lanes]

    def _filter(self) -> Filter | None:
        """The kernel's only one; None where there is none, or several."""
        weights = [w for w in weight_buffers(self.function) if len(w.shape) in _RANKS]
        found = []
        for block in filter(is_reduction, self.blocks):
            axes = axes_of(block) or []
            for number, region in enumerate(block.reads):
                if _among(region.source, weights):
                    first, second, *taps = (_alone(block, axes, e.min) for e in region.region)
                    # The weights of several products have an axis of results last, not one of taps.
                    of_taps = all(at is None or axes[at].reduce for at in taps)
                    if first is not None and not axes[first].reduce and of_taps:
                        parameter, name = self._number(region.source), str(block.name_hint)
                        found.append(Filter(parameter, name, number, first, second))
        return found[0] if len(found) == 1 else None

    def _number(self, buffer: Any) -> int:
        for number, parameter in enumerate(self.function.params):
            if parameter.same_as(buffer):
                return number
        return -1

    def _sides(self) -> list[Side]:
        images = self._images()
        if self.filter is None:
            return [self._side(images, convolved=False)] if images else []
        convolution = next(b for b in self.blocks if str(b.name_hint) == self.filter.block)
        read = self._behind(convolution, images)
        axes = axes_of(convolution) or []
        operands = [region.source for region in convolution.reads]
        walked = [_walk(convolution, axes, image, 1) for image in read if _among(image, operands)]
        if any(at is not None and not axes[at].reduce for at in walked):  # depthwise
            return [self._side(images, convolved=True)]
        before = self._side(read, convolved=True)
        if not before.uniform:  # the padding may take another layout than what it pads
            given = [image for image in read if self._number(image) >= 0]
            before = self._side(given, convolved=True)
        return [before, self._side([i for i in images if not _among(i, read)], convolved=True)]

    def _images(self) -> list[Any]:
        """Buffers that hold more than one pixel, the filter left out; of four dimensions if any has."""
        found: list[Any] = []
        for block in self.blocks:
            for region in (*block.reads, *block.writes):
                buffer = region.source
                is_filter = (
                    self.filter is not None and self._number(buffer) == self.filter.parameter
                )
                if len(buffer.shape) in _RANKS and not is_filter and not _among(buffer, found):
                    fixed = all(isinstance(extent, IntImm) for extent in buffer.shape)
                    if not fixed or math.prod(map(int, buffer.shape[2:])) > 1:
                        found.append(buffer)
        rank = max((len(buffer.shape) for buffer in found), default=0)
        return [buffer for buffer in found if len(buffer.shape) == rank]

    def _behind(self, convolution: Any, images: list[Any]) -> list[Any]:
        """The images that a block reads, and those they are made from."""
        found: list[Any] = []
        wanted = [region.source for region in convolution.reads]
        while wanted:
            buffer = wanted.pop()
            if _among(buffer, images) and not _among(buffer, found):
                found.append(buffer)
                for block in self.blocks:
                    if any(region.source.same_as(buffer) for region in block.writes):
                        wanted += [region.source for region in block.reads]
        return found

    def _side(self, images: list[Any], convolved: bool) -> Side:
        places = [self._places(image) for image in images]
        first = tuple(found[0] for found in places)
        numbers = frozenset(self._number(image) for image in images) - {-1}
        blocks = {str(block.name_hint): block for block in self.blocks}
        walked: dict[str, int] = {}
        for image, found in zip(images, places, strict=True):
            whole = _is_multiple(image.shape[_CHANNELS], self.lanes)
            for name in dict.fromkeys(name for name, _, _ in found):
                axes = axes_of(blocks[name]) or []
                axis = _walk(blocks[name], axes, image, self.lanes) if whole else None
                if axis is None or walked.setdefault(name, axis) != axis:
                    return Side(numbers, convolved, False, {}, first)
        return Side(numbers, convolved, True, walked, first)

    def _places(self, image: Any) -> list[tuple[str, str, int]]:
        """Where blocks write and read an image."""
        return [
            (str(block.name_hint), way, number)
            for block in self.blocks
            for way, regions in (("write", block.writes), ("read", block.reads))
            for number, region in enumerate(regions)
            if region.source.same_as(image)
        ]


def _decided_by_blocks(function: PrimFunc, lanes: int) -> PrimFunc:
    """Let conditions on a channel look at its block alone, where they do not divide one.

    `32 <= outer * 16 + lane` is `2 <= outer`: one decision for a whole vector, which a concatenation makes
    for each of its parts.
    """
    inner: list[Any] = []

    def collect(block: SBlock) -> None:
        inner.extend(each.var for each in block.iter_vars if _is_extent(each.dom.extent, lanes))

    tvm_ffi.structural_walk(function.body, (SBlock, collect))

    def by_block(condition: LE) -> Any:
        limit, place = condition.a, condition.b
        if not isinstance(limit, IntImm) or int(limit) % lanes or not isinstance(place, Add):
            return condition
        scaled, lane = place.a, place.b
        if not isinstance(scaled, Mul) or not _is_extent(scaled.b, lanes):
            return condition
        if not any(lane.same_as(variable) for variable in inner):
            return condition
        return LE(IntImm(limit.ty, int(limit) // lanes), scaled.a)

    made: PrimFunc = tvm_ffi.structural_map(function, (LE, by_block))
    return made


def _is_extent(value: Any, lanes: int) -> bool:
    return isinstance(value, IntImm) and int(value) == lanes


def filter_map(dims: Sequence[int], lanes: int) -> Callable[..., list[Any]]:
    """The map of a filter's indices that puts blocks of `lanes` of some dimensions last."""

    def mapped(*index: Any) -> list[Any]:
        outer = [value // lanes if dim in dims else value for dim, value in enumerate(index)]
        return [*outer, *(index[dim] % lanes for dim in dims)]

    return mapped


def _blocks(function: PrimFunc) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(function.body, (SBlock, found.append), order="pre")
    return found[1:]  # the first is the root


def _among(buffer: Any, buffers: Sequence[Any]) -> bool:
    return any(buffer.same_as(other) for other in buffers)


def _halved(axes: Sequence[Axis], split: Collection[int], lanes: int) -> Callable[..., list[Any]]:
    """The map of axes that makes each of `split` two, the inner ones behind those of their kind."""

    def halved(*index: Any) -> list[Any]:
        order = []
        for reduce in (False, True):
            own = [axis.position for axis in axes if axis.reduce == reduce]
            order += [index[at] // lanes if at in split else index[at] for at in own]
            order += [index[at] % lanes for at in own if at in split]
        return order

    return halved


def _alone(block: Any, axes: Sequence[Axis], index: Any) -> int | None:
    """The position of the axis that an index is."""
    for axis in axes:
        if index.same_as(block.iter_vars[axis.position].var):
            return axis.position
    return None


def _is_multiple(extent: Any, lanes: int) -> bool:
    return isinstance(extent, IntImm) and int(extent) % lanes == 0


def _walk(block: Any, axes: Sequence[Axis], image: Any, lanes: int) -> int | None:
    """The axis along which a block walks over an image's channels in whole blocks; None: otherwise."""
    variables = [iter_var.var for iter_var in block.iter_vars]
    if not axes:
        return None
    analyzer = Analyzer()
    for iter_var in block.iter_vars:
        analyzer.bind(iter_var.var, iter_var.dom)
    found: set[int | None] = set()
    for indices in _indices(block, image):
        index = analyzer.simplify(indices[_CHANNELS])
        linear = detect_linear_equation(index, variables)
        if not linear or not all(isinstance(step, IntImm) for step in linear):
            found.add(_walk_in_groups(index, variables, axes, lanes, analyzer))
            continue
        *steps, start = (int(step) for step in linear)
        moving = [axes[at] for at, step in enumerate(steps) if step and axes[at].extent > 1]
        alone = len(moving) == 1 and steps[moving[0].position] == 1
        if not alone or moving[0].extent % lanes or start % lanes:
            return None
        found.add(moving[0].position)
    return found.pop() if len(found) == 1 else None


def _walk_in_groups(
    index: Any, variables: Sequence[Any], axes: Sequence[Axis], lanes: int, analyzer: Analyzer
) -> int | None:
    """The axis that walks within groups of whole blocks, which others choose (as in depth to space)."""
    for axis in axes:
        own = variables[axis.position]
        if axis.extent > 1 and axis.extent % lanes == 0:
            start = analyzer.simplify(index - own)
            steps = analyzer.modular_set(start)
            whole = steps.coeff % lanes == 0 and steps.base % lanes == 0
            if whole and not any(own.same_as(each) for each in variables_in(start)):
                return axis.position
    return None


def _indices(block: Any, image: Any) -> Iterator[list[Any]]:
    nodes: list[Any] = []
    for part in (block.init, block.body):
        if part is not None:
            tvm_ffi.structural_walk(part, (TensorLoad, nodes.append))
            tvm_ffi.structural_walk(part, (BufferStore, nodes.append))
    for node in nodes:
        buffer = node.source if isinstance(node, TensorLoad) else node.buffer
        if buffer.same_as(image):
            yield list(node.indices)
