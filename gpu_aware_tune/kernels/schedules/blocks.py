"""What the CPU schedules need of blocks: their names, what kind they are, and inlining."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import tvm_ffi
from tvm.ir import Call
from tvm.ir.expr import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize, Schedule
from tvm.tirx import BufferStore, Select, Var
from tvm_ffi import WalkResult

from gpu_aware_tune.kernels.schedules.access import accesses_of, axes_of, loads_of, variables_in

_SERIAL = 0  # tirx.ForKind
# Elements that one value may be computed from. Each that is split off several concatenated tensors, or
# joined of several split ones, comes from all of them: unlimited, a chain of such steps of eight parts
# each multiplies by eight with each step, and takes minutes to schedule.
_LARGEST = 64
# Calls that cost tens of instructions an element: never computed twice to save a pass over memory.
_COSTLY = ("exp", "log", "erf", "tanh", "sigmoid", "pow", "sin", "cos", "tan", "sqrt", "hypot")


def attempt(schedule: Schedule, change: Callable[[Schedule], None]) -> Schedule:
    """Apply a change of several steps, or none of it where TVM refuses a step."""
    changed = schedule.copy()
    try:
        change(changed)
    except Exception:  # TVM refuses with ScheduleError, ValueError, RuntimeError and others
        return schedule
    return changed


def block_names(schedule: Schedule) -> list[str]:
    """Give the names of all blocks in program order, the root left out (whatever its name is)."""
    names: list[str] = []
    body = schedule.mod["main"].body
    tvm_ffi.structural_walk(
        body, (SBlock, lambda block: names.append(str(block.name_hint))), order="pre"
    )
    return names[1:]


def block_of(schedule: Schedule, name: str) -> Any:
    """Give a block itself (not the schedule's variable for it)."""
    return schedule.get(schedule.get_sblock(name))


def realize_of(schedule: Schedule, name: str) -> Any:
    """Give what binds a block's axes to its loops."""
    realizes: list[Any] = []

    def visit(realize: Any) -> None:
        if realize.block.name_hint == name:
            realizes.append(realize)

    tvm_ffi.structural_walk(schedule.mod["main"].body, (SBlockRealize, visit))
    return realizes[0]


def loops_of_axes(schedule: Schedule, name: str) -> list[Any] | None:
    """Give the loop behind each axis of a block; None where an axis is not exactly one loop.

    Nor where a loop has been scheduled: a block that is computed inside another one's parallel loop
    may have one loop for each axis all the same, and parallel loops must not be nested.
    """
    loops = schedule.get_loops(schedule.get_sblock(name))
    if any(int(schedule.get(loop).kind) != _SERIAL for loop in loops):
        return None
    variables = [schedule.get(loop).loop_var for loop in loops]
    found = []
    for value in realize_of(schedule, name).iter_values:
        matching = [
            loop for loop, variable in zip(loops, variables, strict=True) if value.same_as(variable)
        ]
        if len(matching) != 1:
            return None
        found.append(matching[0])
    return found if len(found) == len(loops) else None


def is_reduction(block: Any) -> bool:
    """Whether a block accumulates over at least one axis."""
    axes = axes_of(block)
    return axes is not None and block.init is not None and any(axis.reduce for axis in axes)


def is_elementwise(block: Any) -> bool:
    """Whether a block computes each element of one buffer by itself."""
    axes = axes_of(block)
    return (
        axes is not None
        and isinstance(block.body, BufferStore)
        and not any(axis.reduce for axis in axes)
    )


def inline_elementwise(schedule: Schedule, kept: Collection[str] = ()) -> None:
    """Compute elementwise blocks inside their consumers wherever that costs nothing.

    Args:
        schedule: of a kernel.
        kept: names of blocks to leave.
    """
    for name in block_names(schedule):
        if name in kept:
            continue
        variable = schedule.get_sblock(name)
        block = schedule.get(variable)
        consumers = [schedule.get(consumer) for consumer in schedule.get_consumers(variable)]
        if (
            is_elementwise(block)
            and consumers
            and all(_may_inline(block, c, consumers) for c in consumers)
        ):
            try:
                schedule.compute_inline(variable)
            except Exception:  # a block that refuses stays a stage of its own
                continue


def _may_inline(block: Any, consumer: Any, consumers: list[Any]) -> bool:
    """Whether an elementwise block should be computed inside one of its consumers."""
    written = block.writes[0].source
    if is_elementwise(consumer):
        if _grows_too_large(block, consumer):
            return False
        is_work = len(loads_of(block)) > 1 or is_costly(block)
        repeats = is_work and _reads(consumer, written) > 1
        if (repeats or _transposes(block)) and _gathers(consumer, written):
            return False
        return len(consumers) == 1 or not is_costly(block)
    value = block.body.value
    if isinstance(value, TensorLoad):
        return True
    # A reduction reads most elements often; what each reads once is computed on the way, unless
    # a condition (padding) would keep the inner loop from being vectorised.
    axes, accesses = axes_of(consumer), accesses_of(consumer, consumer.reads)
    if axes is None or accesses is None or is_costly(block) or conditions_of(block):
        return False
    steps = 1
    for axis in axes:
        steps *= axis.extent
    return all(a.elements >= steps for a in accesses if a.buffer.same_as(written))


def _grows_too_large(block: Any, consumer: Any) -> bool:
    """Whether a consumer would compute each value from too many elements."""
    own = len(loads_of(block))
    if own <= 1:  # in place of what it was read from
        return False
    times = _reads(consumer, block.writes[0].source)
    return len(loads_of(consumer)) + times * (own - 1) > _LARGEST


def _reads(block: Any, buffer: Any) -> int:
    """How often a block's expression reads a buffer."""
    return sum(load.source.same_as(buffer) for load in loads_of(block))


def _transposes(block: Any) -> bool:
    """Whether a block reads a buffer along another axis than it writes its result along."""
    axes, accesses = axes_of(block) or [], accesses_of(block, [*block.reads, *block.writes])
    if not accesses:
        return False
    *reads, write = accesses
    along = [axis for axis in axes if axis.extent > 1 and write.strides[axis.position] == 1]
    return any(
        read.strides[axis.position] not in (0, 1) and 1 in read.strides
        for read in reads
        for axis in along
    )


def _gathers(consumer: Any, buffer: Any) -> bool:
    """Whether a block reads elements of a buffer that it computes the places of, as Resize does.

    It reads each several times: what it reads should lie side by side, and not be computed each time.
    """
    axes, accesses = axes_of(consumer) or [], accesses_of(consumer, consumer.reads) or []
    return any(
        access.strides[axis.position] is None
        for access in accesses
        if access.buffer.same_as(buffer)
        for axis in axes
        if axis.extent > 1
    )


def is_costly(block: Any) -> bool:
    """Whether computing a block's values twice costs more than a pass over memory."""
    return any(_name(call).startswith(_COSTLY) for call in _calls(block))


def conditions_of(block: Any) -> list[Any]:
    """Give the conditions by which a block's value is chosen."""
    found = [call.args[0] for call in _calls(block) if _name(call) == "if_then_else"]
    tvm_ffi.structural_walk(block.body, (Select, lambda select: found.append(select.condition)))
    return found


def deciding_variables(block: Any) -> list[Any]:
    """Give the variables that a block branches by.

    Where it branches by its place, as a concatenation does, what it compares with what it has read is a
    choice between two values that vectors make as well.
    """
    branches = [call.args[0] for call in _calls(block) if _name(call) == "if_then_else"]
    found: list[Any] = []

    def own(node: Any) -> WalkResult | None:
        if isinstance(node, TensorLoad):
            return WalkResult.SKIP
        if isinstance(node, Var):
            found.append(node)
        return None

    for condition in branches:
        tvm_ffi.structural_walk(condition, (object, own), order="pre")
    if found:
        return found
    return [variable for condition in conditions_of(block) for variable in variables_in(condition)]


def _calls(block: Any) -> list[Any]:
    calls: list[Any] = []
    tvm_ffi.structural_walk(block.body, (Call, calls.append))
    return calls


def _name(call: Any) -> str:
    return str(getattr(call.op, "name", "")).rpartition(".")[2]
