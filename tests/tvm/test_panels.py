"""Operands stored tile by tile: where they are, what they cost, and that the results are the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import tvm
from test_schedules import conv, f32, kernels
from tiny_library import target
from tvm.relax import op

from gpu_aware_tune.finalize.kernel_check import verify_kernel
from gpu_aware_tune.kernels.packing import PACKING
from gpu_aware_tune.kernels.schedules import baseline_schedules
from gpu_aware_tune.kernels.schedules.blocks import (
    attempt,
    block_names,
    block_of,
    inline_elementwise,
)
from gpu_aware_tune.kernels.schedules.blocks import is_reduction as reduces
from gpu_aware_tune.kernels.schedules.planes import flatten_planes
from gpu_aware_tune.kernels.schedules.reductions import Reduction
from gpu_aware_tune.kernels.schedules.tile_cost import Machine, Tile
from gpu_aware_tune.kernels.traces import trace_to_json

MACHINE = Machine(16, 32, 2)
PRODUCT = (lambda e, x, w, b: op.add(e(op.matmul(x, w)), b), f32(24, 96), f32(96, 192), f32(192))
IMAGE = (conv(), f32(1, 96, 16, 16), f32(32, 96, 1, 1), f32(1, 32, 1, 1))


def tiled(module: tvm.IRModule) -> list[tuple[Tile, tvm.s_tir.Schedule]]:
    """A kernel with each of its cheapest tiles that copy an operand tile by tile."""
    base = tvm.s_tir.Schedule(module)
    inline_elementwise(base)
    (name,) = (name for name in block_names(base) if reduces(block_of(base, name)))
    base = attempt(base, partial(flatten_planes, name=name))
    reduction = Reduction(base, name, MACHINE)
    found = []
    for tile in [tile for tile in reduction.tiles() if tile.panels][:4]:
        change = partial(reduction.apply, tile=tile, fuse_consumer=True)
        schedule = attempt(base, change)
        assert schedule is not base, tile
        found.append((tile, schedule))
    return found


@pytest.mark.parametrize("case", [PRODUCT, IMAGE])
@pytest.mark.parametrize("inputs", [1, 3])
def test_panels_compute_the_same(case: tuple[Any, ...], inputs: int) -> None:
    make, *specs = case
    (module,) = kernels(make, *specs, inputs=inputs)
    found = tiled(module)
    assert found
    for tile, schedule in found:
        check = verify_kernel(module, trace_to_json(schedule.trace), target(), seed=1)
        assert check.ok, (tile, check)


def test_weights_of_a_product_are_stored_in_panels_at_load() -> None:
    make, *specs = PRODUCT
    (module,) = kernels(make, *specs, inputs=1)
    (schedule,) = baseline_schedules(module, target(), most=1)
    assert PACKING in trace_to_json(schedule.trace)
    (copied,) = (
        buffer for buffer in schedule.mod["main"].body.block.alloc_buffers if len(buffer.shape) == 3
    )
    panels, terms, columns = (int(extent) for extent in copied.shape)
    assert (panels * columns, terms) == (192, 96)
    assert panels > 1


def test_a_copy_of_an_input_reads_its_rows_by_cache_lines() -> None:
    make, *specs = IMAGE
    (module,) = kernels(make, *specs)
    for tile, schedule in tiled(module):
        if not any(number == 0 for number, _ in tile.panels):
            continue
        (copy,) = (name for name in block_names(schedule) if name.endswith("_global"))
        loops = schedule.get_loops(schedule.get_sblock(copy))
        extents = [int(schedule.get(loop).extent) for loop in loops]
        assert extents[-2] * extents[-1] == 256
        return
    pytest.fail("no tile copies the image")


def test_rows_a_power_of_two_apart_cost_more_unless_they_are_copied() -> None:
    make, *_ = IMAGE
    cycles = {}
    for width in (128, 120):
        specs = f32(1, 512, width, width), f32(512, 512, 1, 1), f32(1, 512, 1, 1)
        (module,) = kernels(make, *specs, inputs=1)
        base = tvm.s_tir.Schedule(module)
        inline_elementwise(base)
        (name,) = (name for name in block_names(base) if reduces(block_of(base, name)))
        flatten_planes(base, name)
        tiles = Reduction(base, name, MACHINE).tiles()
        plain = min(t.cycles for t in tiles if not any(n == 0 for n, _ in t.panels))
        copied = min(t.cycles for t in tiles if any(n == 0 for n, _ in t.panels))
        cycles[width] = plain / copied
    assert cycles[128] > 1.2
    assert cycles[120] < 1.1
