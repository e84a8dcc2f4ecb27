"""Weights in the layout that each kernel wants: packed once, when a library is loaded.

A kernel's weights never change, so a schedule may read them from a copy in a layout of its own. The
copy is a block marked with `PACKING`, at the top of the kernel:

    mark_weights     says in each kernel which of its arguments are weights
    without_packing  a kernel that takes them packed already, for measuring
    pack_at_load     moves the copies of all kernels out of `main` into the library's function `PACK`
    packed           calls that function

TVM's search adds such copies by itself to the arguments that are marked (its post-processor
`RewriteLayout`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.ir.expr import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize, Schedule
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
from tvm.tirx import BufferStore, DeclBuffer, IntImm, PrimFunc, SeqStmt

LAYOUT_FREE = "layout_free_buffers"  # the attributes' names are TVM's
PACKING = "meta_schedule.layout_rewrite_preproc"
PACK = "main_transform_params"


def mark_weights(module: tvm.IRModule) -> tvm.IRModule:
    """Say in each kernel which of its arguments are weights that may be laid out anew.

    Args:
        module: a fused module; the parameters of `main` from its attribute `num_input` on are
            weights.

    Returns:
        The module with the attribute `LAYOUT_FREE` on those of its kernels that have such an
        argument: a weight in every call, with two axes at least, read in one place of the kernel.
    """
    main = module["main"]
    weights = list(main.params)[int(main.attrs["num_input"]) :]
    marked: dict[str, set[int]] = {}
    for function in module.functions.values():
        if isinstance(function, relax.Function):
            for name, numbers in _weights_of_calls(function, weights):
                marked[name] = marked.get(name, numbers) & numbers
    changed = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    for name, numbers in marked.items():
        kernel = module[name]
        fitting = [number for number in sorted(numbers) if _may_move(kernel, number)]
        if fitting:
            variable = module.get_global_var(name)
            changed.update_func(variable, kernel.with_attr(LAYOUT_FREE, fitting))
    return changed


def weight_buffers(kernel: PrimFunc) -> list[Any]:
    """Give the buffers of a kernel that `mark_weights` has marked."""
    numbers = kernel.attrs.get(LAYOUT_FREE) if kernel.attrs is not None else None
    return [kernel.params[int(number)] for number in numbers or ()]


def mark_packing(schedule: Schedule, copy: Any, weight: Any) -> bool:
    """Mark a block as the copy of a weight, to be made when the library is loaded.

    Args:
        schedule: of a kernel.
        copy: the block, which `cache_read` gave.
        weight: the buffer it reads.

    Returns:
        Whether that can be done; if not, the copy is made at every call.
    """
    if not any(weight.same_as(buffer) for buffer in weight_buffers(schedule.mod["main"])):
        return False
    block = schedule.get(copy)
    store = block.body
    if not isinstance(store, BufferStore) or not isinstance(store.value, TensorLoad):
        return False
    variables = [iter_var.var for iter_var in block.iter_vars]
    indices = list(store.value.indices)
    same = len(indices) == len(variables) and all(
        index.same_as(variable) for index, variable in zip(indices, variables, strict=True)
    )
    if not same or _elements(block.writes[0].source) != _elements(weight):
        return False
    schedule.annotate(copy, PACKING, 1)
    return True


def without_packing(module: tvm.IRModule) -> tvm.IRModule:
    """Give a scheduled kernel that takes its weights packed.

    Its arguments keep their shapes, so that one set of buffers serves all candidates of a task; a
    packed weight's elements are in another order.
    """
    before = module["main"]
    after = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module)["main"]
    views = [
        DeclBuffer(packed, data=plain.data)
        for plain, packed in zip(before.params, after.params, strict=True)
        if not plain.same_as(packed)
    ]
    if not views:
        return module
    root = after.body.block
    viewed = SBlock(
        root.iter_vars,
        root.reads,
        root.writes,
        root.name_hint,
        SeqStmt([*views, root.body]),
        root.init,
        root.alloc_buffers,
        root.match_buffers,
        root.annotations,
    )
    body = SBlockRealize([], IntImm("bool", 1), viewed)
    kernel = PrimFunc(before.params, body, before.ret_type, attrs=after.attrs)
    return tvm.IRModule({"main": kernel}, attrs=module.attrs)


def pack_at_load(module: tvm.IRModule) -> tvm.IRModule:
    """Move the packing out of `main` into the function `PACK`.

    `PACK` takes the list of all weights and gives what `main` then takes in their place.
    """
    packing = {variable: kernel for variable, kernel in module.functions.items() if _packs(kernel)}
    others = {
        variable: function
        for variable, function in module.functions.items()
        if isinstance(function, PrimFunc) and variable not in packing
    }
    if packing:
        # TVM's pass refuses kernels of other forms than it expects, even where it has nothing to do.
        rest = {v: f for v, f in module.functions.items() if v not in others}
        split = relax.transform.SplitLayoutRewritePreproc()(tvm.IRModule(rest, attrs=module.attrs))
        module = tvm.IRModule({**dict(split.functions), **others}, attrs=module.attrs)
    # Only what is in a dataflow block is moved; a model with an If has none at first.
    stages = [relax.transform.ConvertToDataflow(), relax.transform.LiftTransformParams()]
    return tvm.transform.Sequential(stages)(module)


def packed(machine: relax.VirtualMachine, weights: Iterable[Any], entry: str = "main") -> list[Any]:
    """Give the weights as a library's `main` takes them, from how they are stored.

    Args:
        machine: with the library loaded.
        weights: as stored, on the device.
        entry: "main", or where a library holds several shares "main_2" for 2 units.
    """
    given = list(weights)
    name = PACK + entry.removeprefix("main")
    return list(machine[name](given)) if machine.module.implements_function(name) else given


def _weights_of_calls(function: relax.Function, weights: list[Any]) -> list[tuple[str, set[int]]]:
    """The kernels that a function calls, each with the numbers of the arguments that are weights."""
    call_tir = tvm.ir.Op.get("relax.call_tir")
    calls: list[tuple[str, set[int]]] = []

    def visit(node: Any) -> None:
        if not isinstance(node, tvm.ir.Call) or not node.args:
            return
        if not isinstance(node.args[0], tvm.ir.GlobalVar):
            return
        arguments = list(node.args[1]) if node.op.same_as(call_tir) else []
        numbers = {
            number
            for number, argument in enumerate(arguments)
            if any(argument.same_as(weight) for weight in weights)
        }
        calls.append((str(node.args[0].name_hint), numbers))

    relax.analysis.post_order_visit(function.body, visit)
    return calls


def _may_move(kernel: PrimFunc, number: int) -> bool:
    """Whether another layout of an argument can matter, and is one for all of its readers."""
    buffer = kernel.params[number]
    if not all(isinstance(extent, IntImm) for extent in buffer.shape):
        return False
    readers: list[Any] = []

    def visit(block: Any) -> None:
        if any(region.source.same_as(buffer) for region in block.reads):
            readers.append(block)

    tvm_ffi.structural_walk(kernel.body, (SBlock, visit))
    return len(readers) == 1 and sum(int(extent) > 1 for extent in buffer.shape) > 1


def _packs(function: Any) -> bool:
    """Whether a function is a kernel with a block marked as packing."""
    if not isinstance(function, PrimFunc):
        return False
    found: list[Any] = []

    def visit(block: Any) -> None:
        if PACKING in block.annotations:
            found.append(block)

    tvm_ffi.structural_walk(function.body, (SBlock, visit))
    return bool(found)


def _elements(buffer: Any) -> int:
    return math.prod(int(extent) for extent in buffer.shape)
