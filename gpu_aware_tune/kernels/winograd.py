"""3x3 convolutions with 16 multiplications for four results, not 36 (Winograd's minimal filtering).

Results are computed in tiles of 2x2. A tile reads 4x4 pixels of each channel; these and the filters are
transformed, multiplied point by point and summed over the channels, which is a matrix product for each of
the 16 points, and the sums are transformed back. The filters are transformed once, with the import.

The kernel says so with three blocks in the place of one, which are annotated with their `Role`.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, F(2x2, 3x3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import tvm_ffi
from tvm import te
from tvm.ir.expr import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize
from tvm.tirx import Add, BufferStore, IntImm, Mul, PrimFunc, Select, SeqStmt, Var

from gpu_aware_tune.kernels.schedules.access import Access, Axis, accesses_of, axes_of

ROLE = "gpu_aware_tune.winograd"
SIZE = 2  # results of a tile along each side
POINTS = 4  # pixels that they depend on
_TAPS = 3

_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))
_FILTER = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


class Role(StrEnum):
    """What a block of such a kernel computes."""

    INPUT = "input"
    PRODUCT = "product"
    OUTPUT = "output"


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution over blocks of channels, with steps of one pixel.

    Args:
        block: its name.
        image: what it reads, (batch, channel blocks, height + 2, width + 2, lanes).
        parameter: number of the kernel's argument that is the filter, (output blocks, input blocks, 3, 3,
            lanes, lanes).
        result: what it writes, (batch, channel blocks, height, width, lanes).
    """

    block: str
    image: Any
    parameter: int
    result: Any

    @property
    def inputs(self) -> int:
        """Channels of the image."""
        return _extent(self.image, 1) * _extent(self.image, 4)

    @property
    def outputs(self) -> int:
        """Channels of the result."""
        return _extent(self.result, 1) * _extent(self.result, 4)

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Images, and tiles of one along its height and width."""
        batch, height, width = (_extent(self.result, dim) for dim in (0, 2, 3))
        return batch, -(-height // SIZE), -(-width // SIZE)


def convolution_of(function: PrimFunc) -> Convolution | None:
    """The 3x3 convolution of a kernel; None where it has none, or one of another kind."""
    found: list[SBlock] = []

    def visit(block: SBlock) -> None:
        if block.init is not None:
            found.append(block)

    tvm_ffi.structural_walk(function.body, (SBlock, visit))
    return _convolution(function, found[0]) if len(found) == 1 else None


def with_winograd(function: PrimFunc, convolution: Convolution) -> PrimFunc:
    """A kernel that computes its convolution so, and takes its filter as `transformed` makes it."""
    made = _blocks(convolution)
    image, filter_, result = made.params
    new = {image: convolution.image, result: convolution.result}
    body = tvm_ffi.structural_map(made.body, (Var, lambda variable: new.get(variable, variable)))
    root = function.body.block
    statements = []
    for statement in root.body.seq if isinstance(root.body, SeqStmt) else [root.body]:
        is_convolution = _holds(statement, convolution.block)
        statements += list(body.block.body.seq) if is_convolution else [statement]
    changed = SBlock(
        root.iter_vars,
        root.reads,
        root.writes,
        root.name_hint,
        SeqStmt(statements),
        root.init,
        [*root.alloc_buffers, *body.block.alloc_buffers],
        root.match_buffers,
        root.annotations,
    )
    params = list(function.params)
    params[convolution.parameter] = filter_
    realize = SBlockRealize([], IntImm("bool", 1), changed)
    return PrimFunc(params, realize, function.ret_type, attrs=function.attrs)


def transformed(filters: np.ndarray) -> np.ndarray:
    """Filters as the kernel takes them.

    Args:
        filters: (output blocks, input blocks, 3, 3, input lanes, output lanes).

    Returns:
        (4, 4, output blocks, input blocks, input lanes, output lanes), computed in float64.
    """
    points = np.einsum("at,oitukl,bu->aboikl", _FILTER, filters.astype(np.float64), _FILTER)
    return np.ascontiguousarray(points.astype(filters.dtype))


def roles_of(function: PrimFunc) -> dict[Role, str]:
    """The names of a kernel's blocks by role; empty where it computes no convolution so."""
    found: dict[Role, str] = {}

    def visit(block: SBlock) -> None:
        if ROLE in block.annotations:
            found[Role(str(block.annotations[ROLE]))] = str(block.name_hint)

    tvm_ffi.structural_walk(function.body, (SBlock, visit))
    return found


def _convolution(function: PrimFunc, block: SBlock) -> Convolution | None:
    store, axes = block.body, axes_of(block)
    if not isinstance(store, BufferStore) or axes is None or len(axes) != 9:
        return None
    if [axis.reduce for axis in axes] != [False] * 5 + [True] * 4 or len(block.reads) != 2:
        return None
    operands, results = accesses_of(block, block.reads), accesses_of(block, block.writes)
    if operands is None or results is None or not _sums_products(store):
        return None
    n, oc, h, w, ol, ic, kh, kw, il = axes
    image, filter_ = operands
    numbers = [i for i, each in enumerate(function.params) if each.same_as(filter_.buffer)]
    fits = (
        len(numbers) == 1
        and kh.extent == kw.extent == _TAPS
        and _walks(results[0], axes, [(n,), (oc,), (h,), (w,), (ol,)], [0] * 5)
        and _walks(image, axes, [(n,), (ic,), (h, kh), (w, kw), (il,)], [0, 0, 2, 2, 0])
        and _walks(filter_, axes, [(oc,), (ic,), (kh,), (kw,), (il,), (ol,)], [0] * 6)
    )
    if not fits:
        return None
    return Convolution(str(block.name_hint), image.buffer, numbers[0], results[0].buffer)


def _sums_products(store: BufferStore) -> bool:
    """Whether a block adds products of two float32 values to what it stores."""
    value = store.value
    if not isinstance(value, Add) or not isinstance(value.b, Mul):
        return False
    factors = value.b.a, value.b.b
    loads = isinstance(value.a, TensorLoad) and all(isinstance(f, TensorLoad) for f in factors)
    return loads and str(store.buffer.dtype) == str(value.b.ty.dtype) == "float32"


def _walks(
    access: Access, axes: Sequence[Axis], dims: Sequence[Sequence[Axis]], more: Sequence[int]
) -> bool:
    """Whether each dimension of a buffer is the sum of these axes, and as long as they need.

    Args:
        access: how the buffer is indexed.
        axes: all of the block.
        dims: the axes of each dimension.
        more: how much longer each dimension is than its first axis; no more, so that indices start at 0.
    """
    shape = [int(extent) for extent in access.buffer.shape]
    if shape != [own[0].extent + longer for own, longer in zip(dims, more, strict=True)]:
        return False
    expected = dict.fromkeys((axis.position for axis in axes), 0)
    step = 1
    for extent, own in zip(reversed(shape), reversed(dims), strict=True):
        expected.update({axis.position: step for axis in own})
        step *= extent
    return all(
        access.strides[axis.position] == expected[axis.position] for axis in axes if axis.extent > 1
    )


def _blocks(convolution: Convolution) -> PrimFunc:
    """A kernel of the three blocks alone, which takes image, filter and result."""
    batch, outer, height, width, lanes = (_extent(convolution.result, dim) for dim in range(5))
    inner, rows, columns = (_extent(convolution.image, dim) for dim in (1, 2, 3))
    _, down, across = convolution.tiles
    name = convolution.block

    def longs(*extents: int) -> list[IntImm]:
        return [IntImm("int64", extent) for extent in extents]

    image = te.placeholder(longs(batch, inner, rows, columns, lanes), name="image")
    filters = te.placeholder(
        longs(POINTS, POINTS, outer, inner, lanes, lanes), name=f"{name}_filter"
    )

    def pixels(n: Any, a: Any, b: Any, y: Any, x: Any, block: Any, lane: Any) -> Any:
        def pixel(i: int, j: int) -> Any:
            # An odd image ends within a tile; what lies beyond is part of no result that is kept.
            row, column = SIZE * y + i, SIZE * x + j
            row = te.min(row, rows - 1) if SIZE * down + 2 > rows else row
            column = te.min(column, columns - 1) if SIZE * across + 2 > columns else column
            return image[n, block, row, column, lane]

        return _transform(_INPUT, a, b, pixel)

    shape = longs(batch, POINTS, POINTS, down, across, inner, lanes)
    points = te.compute(shape, pixels, name=f"{name}_input", attrs={ROLE: str(Role.INPUT)})
    block, lane = (
        te.reduce_axis((0, IntImm("int64", inner)), "block"),
        te.reduce_axis((0, IntImm("int64", lanes)), "lane"),
    )

    def summed(n: Any, a: Any, b: Any, o: Any, y: Any, x: Any, i: Any) -> Any:
        product = points[n, a, b, y, x, block, lane] * filters[a, b, o, block, lane, i]
        return te.sum(product, axis=[block, lane])

    shape = longs(batch, POINTS, POINTS, outer, down, across, lanes)
    sums = te.compute(shape, summed, name=f"{name}_product", attrs={ROLE: str(Role.PRODUCT)})

    def results(n: Any, o: Any, h: Any, w: Any, i: Any) -> Any:
        def point(a: int, b: int) -> Any:
            return sums[n, a, b, o, h // SIZE, w // SIZE, i]

        return _transform(_OUTPUT, h % SIZE, w % SIZE, point)

    shape = longs(batch, outer, height, width, lanes)
    result = te.compute(shape, results, name=name, attrs={ROLE: str(Role.OUTPUT)})
    return te.create_prim_func([image, filters, result], index_dtype_override="int64")


def _transform(matrix: Sequence[Sequence[int]], a: Any, b: Any, value: Any) -> Any:
    """Element (a, b) of `matrix @ values @ matrix.T`, by a choice that unrolling decides."""

    def element(down: Sequence[int], across: Sequence[int]) -> Any:
        return _weighted(across, lambda j: _weighted(down, lambda i: value(i, j)))

    return _choice(a, [_choice(b, [element(down, across) for across in matrix]) for down in matrix])


def _weighted(weights: Sequence[int], term: Callable[[int], Any]) -> Any:
    """The sum of terms with weights of 1, 0 and -1, which begins with one of weight 1."""
    first = weights.index(1)
    total = term(first)
    for at, weight in enumerate(weights):
        if at != first and weight:
            total = total + term(at) if weight > 0 else total - term(at)
    return total


def _choice(index: Any, values: Sequence[Any]) -> Any:
    """The value with that index."""
    *others, chosen = values
    for at in reversed(range(len(others))):
        chosen = Select(index == at, others[at], chosen)
    return chosen


def _holds(statement: Any, block: str) -> bool:
    found: list[bool] = []
    tvm_ffi.structural_walk(
        statement, (SBlock, lambda each: found.append(str(each.name_hint) == block))
    )
    return any(found)


def _extent(buffer: Any, dim: int) -> int:
    return int(buffer.shape[dim])
