"""The baseline schedules for CPUs: register tiles for reductions, parallel vector loops else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice

import tvm
from tvm.s_tir import Schedule
from tvm.target import codegen

from gpu_aware_tune.kernels.dot_products import dot_product_for
from gpu_aware_tune.kernels.schedules.blocks import (
    attempt,
    block_names,
    block_of,
    inline_elementwise,
    is_reduction,
    loops_of_axes,
)
from gpu_aware_tune.kernels.schedules.dots import integer_reduction, use_instructions
from gpu_aware_tune.kernels.schedules.elementwise import schedule_elementwise
from gpu_aware_tune.kernels.schedules.padding import pad_product
from gpu_aware_tune.kernels.schedules.partial_sums import split_lanes
from gpu_aware_tune.kernels.schedules.planes import flatten_planes, interleave_rows
from gpu_aware_tune.kernels.schedules.reductions import Reduction
from gpu_aware_tune.kernels.schedules.rows import schedule_rows
from gpu_aware_tune.kernels.schedules.tile_cost import Machine, Tile, costs_for
from gpu_aware_tune.kernels.schedules.winograd import schedule_winograd

# Times what full vectors would take; from there on partial sums in lanes are tried first.
_PARTIAL_SUMS_RATIO = 3.0


def machine_of(target: tvm.target.Target) -> Machine:
    """Give the facts of a CPU target that the schedules depend on."""
    bits = int(codegen.llvm_get_vector_width(target))
    if codegen.target_has_features("avx512f", target):
        lanes, registers = 16, 32
    elif codegen.target_has_features("avx", target):
        lanes, registers = 8, 16
    elif bits >= 512:  # TVM says so of any x86 processor
        lanes, registers = 4, 16
    else:
        lanes, registers = max(4, bits // 32), 32
    units = max(1, int(target.attrs.get("num-cores", 1) or 1))
    costs = costs_for(lanes, str(target.attrs.get("mcpu", "")))
    return Machine(lanes, registers, units, costs, dot_product_for(target, lanes))


def cpu_schedules(module: tvm.IRModule, machine: Machine, most: int) -> Iterator[Schedule]:
    """Schedule every block of a kernel, in up to `most` ways for its heaviest reduction."""
    transformed = [*islice(schedule_winograd(module, machine), most)]
    if transformed:
        yield from (_with_maps(schedule, machine) for schedule in transformed)
        return
    inlined = _inlined(module)
    base, names = _ready(inlined, machine)
    if not names:
        yield _with_maps(base, machine)
        return
    by_stages = (finished(s, names[1:], machine) for s in _reduced(base, names[0], machine))
    yield from islice(chain(_row_by_row(inlined, machine), by_stages), most)


def _inlined(module: tvm.IRModule) -> Schedule:
    schedule = Schedule(module, error_render_level="fast")
    inline_elementwise(schedule)
    return schedule


def _row_by_row(inlined: Schedule, machine: Machine) -> Iterator[Schedule]:
    changed = attempt(inlined, partial(schedule_rows, machine=machine))
    if changed is not inlined:
        yield changed


def prepared(module: tvm.IRModule, machine: Machine) -> tuple[Schedule, list[str]]:
    """A kernel ready for its reductions' tiles, and the names of those, the heaviest first."""
    return _ready(_inlined(module), machine)


def _ready(base: Schedule, machine: Machine) -> tuple[Schedule, list[str]]:
    """See `prepared`, of an inlined kernel; the schedule that is given stays as it is."""
    names = [name for name in block_names(base) if is_reduction(block_of(base, name))]
    for name in names:
        for change in (flatten_planes, interleave_rows):
            base = attempt(base, partial(change, name=name))
        base = pad_product(base, name, machine)
    if names:
        heaviest = max(names, key=lambda name: Reduction(base, name, machine).steps)
        names = [heaviest, *(name for name in names if name != heaviest)]
    return base, names


def finished(schedule: Schedule, names: Sequence[str], machine: Machine) -> Schedule:
    """Schedule a kernel's other reductions as seems best, then its elementwise blocks."""
    for name in names:
        schedule = next(_reduced(schedule, name, machine))
    schedule = _with_maps(schedule, machine)
    use_instructions(schedule)
    return schedule


def _reduced(schedule: Schedule, name: str, machine: Machine) -> Iterator[Schedule]:
    """Schedule one reduction in every way that TVM accepts, the promising ones first.

    The last one is the schedule as it was, where nothing was accepted.
    """
    found = False
    for summed in _summed_together(schedule, name, machine):
        found = True
        yield summed
    if found:
        return
    reduction = Reduction(schedule, name, machine)
    tiles = reduction.tiles()
    ideal = reduction.steps / machine.lanes / machine.units
    if not tiles or tiles[0].cycles > _PARTIAL_SUMS_RATIO * ideal:
        split = attempt(schedule, partial(split_lanes, name=name, machine=machine))
        if split is not schedule:
            for part in (f"{name}_rf", name):
                split = next(_tiled(split, Reduction(split, part, machine)), split)
            found = True
            yield split
    rows = list(_in_rows(schedule, reduction))
    if rows and (not tiles or reduction.row_cycles() < tiles[0].cycles):
        found = True
        yield rows.pop()
    for tiled in _tiled(schedule, reduction):
        found = True
        yield tiled
    if not found:
        yield schedule


def _summed_together(schedule: Schedule, name: str, machine: Machine) -> Iterator[Schedule]:
    reduction = integer_reduction(schedule, name, machine)
    if reduction is not None:
        yield from _tiled(schedule, reduction)


def _in_rows(schedule: Schedule, reduction: Reduction) -> Iterator[Schedule]:
    for fuse_consumer in (True, False):
        tried = attempt(schedule, partial(reduction.apply_rows, fuse_consumer=fuse_consumer))
        if tried is not schedule:
            yield tried
            return


def _tiled(schedule: Schedule, reduction: Reduction) -> Iterator[Schedule]:
    for tile in reduction.tiles():
        tried = with_tile(schedule, reduction, tile)
        if tried is not schedule:
            yield tried


def with_tile(schedule: Schedule, reduction: Reduction, tile: Tile) -> Schedule:
    """Schedule a reduction with a tile; the schedule as it was where TVM refuses."""
    for fuse_consumer in (True, False):
        apply = partial(reduction.apply, tile=tile, fuse_consumer=fuse_consumer)
        tried = attempt(schedule, apply)
        if tried is not schedule:
            return tried
    return schedule


def _with_maps(schedule: Schedule, machine: Machine) -> Schedule:
    """Schedule what is left: elementwise blocks whose loops nobody has touched."""
    for name in block_names(schedule):
        if loops_of_axes(schedule, name) is not None:
            schedule = attempt(schedule, partial(schedule_elementwise, name=name, machine=machine))
    return schedule
