"""How a block walks over its buffers: its axes, and how far each moves every buffer's index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm
import tvm_ffi
from tvm.ir.expr import TensorLoad
from tvm.sym import Analyzer
from tvm.sym.pattern import detect_linear_equation
from tvm.tirx import FloorDiv, IntImm, Var

_SPATIAL, _REDUCE = 0, 2  # tirx.IterVar's kDataPar and kCommReduce


@dataclass(frozen=True)
class Axis:
    """One iteration variable of a block."""

    position: int
    name: str
    extent: int
    reduce: bool


@dataclass(frozen=True)
class Access:
    """How one buffer is indexed by a block's axes; the tuples go by the axes' positions.

    Args:
        buffer: the buffer.
        elements: how many it holds.
        itemsize: bytes of one.
        strides: elements moved by one step of the axis; None where the index is not linear in it.
        granules: steps of the axis during which the index stays the same (`f // 8` gives 8), or 1.
        dims: the dimension that is indexed by the axis alone, or -1.
    """

    buffer: Any
    elements: int
    itemsize: int
    strides: tuple[int | None, ...]
    granules: tuple[int, ...]
    dims: tuple[int, ...]

    def uses(self, axis: Axis) -> bool:
        """Whether another element is read when the axis moves."""
        return self.strides[axis.position] != 0


def axes_of(block: Any) -> list[Axis] | None:
    """Give a block's axes; None where an extent is no constant or an axis of another kind."""
    axes = []
    for position, iter_var in enumerate(block.iter_vars):
        extent, kind = iter_var.dom.extent, int(iter_var.iter_type)
        if not isinstance(extent, IntImm) or kind not in (_SPATIAL, _REDUCE):
            return None
        axes.append(Axis(position, str(iter_var.var.name), int(extent), kind == _REDUCE))
    return axes


def accesses_of(block: Any, regions: Sequence[Any]) -> list[Access] | None:
    """Give how a block indexes the buffers of `regions`; None where a shape is no constant."""
    variables = [iter_var.var for iter_var in block.iter_vars]
    if not all(isinstance(extent, IntImm) for region in regions for extent in region.source.shape):
        return None
    analyzer = Analyzer()
    for iter_var in block.iter_vars:
        analyzer.bind(iter_var.var, iter_var.dom)
    return [_access(block, variables, region, analyzer) for region in regions]


def _access(block: Any, variables: list[Any], region: Any, analyzer: Any) -> Access:
    """How a region's buffer is indexed; where the region is more than one element, by its loads."""
    if all(_is_one(extent.extent) for extent in region.region):
        return _indexed(
            variables, region.source, [extent.min for extent in region.region], analyzer
        )
    found = [
        _indexed(variables, region.source, list(load.indices), analyzer)
        for load in loads_of(block)
        if load.source.same_as(region.source)
    ]
    unknown = _indexed(variables, region.source, [], analyzer)
    nowhere = tuple(None for _ in variables)
    if not found:
        return replace(unknown, strides=nowhere)
    strides = tuple(
        steps[0] if all(step == steps[0] for step in steps) else None
        for steps in zip(*(access.strides for access in found), strict=True)
    )
    return replace(found[0], strides=strides, granules=unknown.granules)


def loads_of(block: Any) -> list[Any]:
    """Give the loads of a block's body."""
    found: list[Any] = []
    tvm_ffi.structural_walk(block.body, (TensorLoad, found.append))
    return found


def _is_one(extent: Any) -> bool:
    return isinstance(extent, IntImm) and int(extent) == 1


def _indexed(variables: list[Any], buffer: Any, indices: list[Any], analyzer: Any) -> Access:
    shape = [int(extent) for extent in buffer.shape]
    steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # In the indices' own type: a cast in between would hide that they are linear.
    dtype = str(variables[0].ty) if variables else "int64"
    offset: Any = IntImm(dtype, 0)
    for index, step in zip(indices, steps, strict=False):
        offset = offset + index * IntImm(dtype, step)
    # As one sum, because (k // 13, k % 13) into rows of 13 is linear in k only then.
    strides = _strides(analyzer.simplify(offset), variables)
    granules = [1] * len(variables)
    dims = [-1] * len(variables)
    for position, variable in enumerate(variables):
        for dim, index in enumerate(indices):
            if index.same_as(variable):
                dims[position] = dim
            if strides[position] is None:
                granules[position] = max(granules[position], _granule(index, variable))
    itemsize = max(1, tvm.DataType(str(buffer.dtype)).bits // 8)
    return Access(buffer, math.prod(shape), itemsize, tuple(strides), tuple(granules), tuple(dims))


def _strides(offset: Any, variables: list[Any]) -> list[int | None]:
    """Steps of a flat index per step of each variable; None where it is not linear in it."""
    linear = detect_linear_equation(offset, variables)
    if linear:
        return [int(step) if isinstance(step, IntImm) else None for step in linear[:-1]]
    # Not linear as a whole: try each variable with the others held.
    found: list[int | None] = []
    used = variables_in(offset)
    for variable in variables:
        if not any(variable.same_as(other) for other in used):
            found.append(0)
            continue
        alone = detect_linear_equation(offset, [variable])
        found.append(int(alone[0]) if alone and isinstance(alone[0], IntImm) else None)
    return found


def variables_in(expression: Any) -> list[Any]:
    """Give the variables an expression reads, each as often as it reads it."""
    found: list[Any] = []
    tvm_ffi.structural_walk(expression, (Var, lambda variable: found.append(variable)))
    return found


def _granule(index: Any, variable: Any) -> int:
    """The steps of a variable during which an index stays the same, by `variable // n`.

    Of `(block * 16 + variable) // 24` it stays so for 8 steps from each multiple of 8: the channels of a
    vector of a convolution in groups of 24 then read the same group.
    """
    found: list[int] = []

    def visit(node: Any) -> None:
        if isinstance(node.b, IntImm) and (steps := _steps_alone(node.a, variable)) is not None:
            found.append(math.gcd(int(node.b), *steps))

    tvm_ffi.structural_walk(index, (FloorDiv, visit))
    uses = sum(variable.same_as(other) for other in variables_in(index))
    return min(found) if found and len(found) == uses else 1


def _steps_alone(sum_: Any, variable: Any) -> list[int] | None:
    """What else is in a linear sum in which a variable counts once; None for anything else."""
    if sum_.same_as(variable):
        return []
    used = variables_in(sum_)
    others = [each for each in used if not each.same_as(variable)]
    if len(others) != len(used) - 1:
        return None
    linear = detect_linear_equation(sum_, [variable, *others])
    if not linear or not all(isinstance(step, IntImm) for step in linear):
        return None
    own, *rest = (int(step) for step in linear)
    return rest if own == 1 else None
