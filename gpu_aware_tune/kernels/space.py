"""The search space: TVM's own rules for the target, without candidates whose code would explode.

Compile time is spent very unevenly: on two cores 10 % of squeezenet's candidates took 45 % of it (one
over three minutes), all of them unrolled into thousands of statements and none near the best. Their
size can be told from the schedule in 0.3 ms, before anything is lowered, so they are turned down
while TVM draws its population.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpu_aware_tune.kernels.tf32 import is_marked, tensor_core_rule
from gpu_aware_tune.workers.warm import load_intrinsics

if TYPE_CHECKING:
    import tvm

MAX_STATEMENTS = 600.0  # after unrolling; a vector of 16 lanes counts as one
_TVM_BLOCKS = 256  # AutoBind's limit of the grid, whatever the card
_LANES = 16
_SERIAL, _PARALLEL, _VECTORIZED, _UNROLLED = 0, 1, 2, 3


def make_space(module: tvm.IRModule, target: tvm.target.Target, units: int = 0) -> Any:
    """The space generator for one task: `PostOrderApply` with the rules that TVM picks for a target.

    On a CPU one post-processor more turns schedules of over `MAX_STATEMENTS` statements down. On a
    GPU the picked rules know tensor cores for float16 and int8, and take limits of shared memory,
    threads and registers from `target`. The one that depends on the number of SMs is replaced by one
    made for `units`, and where a kernel may use TF32 (see `tf32`) a rule for that is added.

    Args:
        module: the task.
        target: what it is tuned for.
        units: the SMs of the share; 0 leaves TVM's own assumption of 256 blocks.
    """
    from tvm.s_tir import meta_schedule as ms

    load_intrinsics(target.kind.name)
    on_cpu = target.kind.name == "llvm"
    may_round = is_marked(module["main"])
    if not on_cpu and not units and not may_round:
        return "post-order-apply"
    picked = ms.TuneContext(
        mod=module, target=target, space_generator="post-order-apply", num_threads=1
    ).space_generator
    rules, postprocs = list(picked.sch_rules), list(picked.postprocs)
    if on_cpu:
        postprocs.append(_size_limit())
    elif units:
        bind = ms.schedule_rule.AutoBind(
            max_threadblocks=whole_waves(units),
            max_threads_per_block=int(target.attrs["max_threads_per_block"]),
        )
        rules = [bind if _is_auto_bind(rule) else rule for rule in rules]
    if may_round:
        # In front of TVM's tiling, which leaves alone what is tiled already.
        first = next(number for number, rule in enumerate(rules) if _is_tiling(rule))
        rules.insert(first, tensor_core_rule())
    return ms.space_generator.PostOrderApply(
        sch_rules=rules,
        postprocs=postprocs,
        mutator_probs=dict(picked.mutator_probs.items()),
    )


def whole_waves(units: int) -> int:
    """The grid limit next to TVM's 256 blocks that fills `units` SMs a whole number of times.

    Two blocks of 1024 threads fit on an SM; a limit that leaves the last wave half empty makes
    elementwise kernels wait for a few SMs.
    """
    wave = 2 * units
    return max(1, round(_TVM_BLOCKS / wave)) * wave


def _is_auto_bind(rule: Any) -> bool:
    from tvm.s_tir import meta_schedule as ms

    return isinstance(rule, ms.schedule_rule.AutoBind)


def _is_tiling(rule: Any) -> bool:
    from tvm.s_tir import meta_schedule as ms

    return isinstance(rule, ms.schedule_rule.MultiLevelTiling)


def statements(module: tvm.IRModule) -> float:
    """How many statements a scheduled module unrolls to."""
    return sum(_expand(function.body, 0)[0] for function in module.functions.values())


def _size_limit() -> Any:
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.postproc import PyPostproc

    @derived_object
    class SizeLimit(PyPostproc):
        def _initialize_with_tune_context(self, context: Any) -> None:
            pass  # depends on the schedule alone

        def apply(self, sch: Any) -> bool:
            return statements(sch.mod) <= MAX_STATEMENTS

        def clone(self) -> Any:
            return SizeLimit()

    return SizeLimit()


def _expand(node: Any, unroll: int) -> tuple[float, float]:
    """(statements after unrolling, steps of the loops inside) of one TIR statement.

    Args:
        node: the statement.
        unroll: TVM's `pragma_auto_unroll_max_step` in force: loops of at most so many steps unroll.
    """
    kind = type(node).__name__
    if kind == "For":
        return _expand_loop(node, unroll)
    if kind == "SBlockRealize":
        return _expand(node.block, unroll)
    if kind == "SBlock":
        size, steps = _expand(node.body, unroll)
        if node.init is not None:
            size += _expand(node.init, unroll)[0]
        return size, steps
    if kind == "SeqStmt":
        parts = [_expand(part, unroll) for part in node.seq]
        return sum(size for size, _ in parts), max(steps for _, steps in parts)
    if hasattr(node, "body"):
        return _expand(node.body, unroll)
    return 1.0, 1.0


def _expand_loop(node: Any, unroll: int) -> tuple[float, float]:
    for key, value in node.annotations.items():
        if str(key) == "pragma_auto_unroll_max_step":
            unroll = int(value)
    try:
        extent = int(node.extent)
    except TypeError:  # a symbolic extent is never unrolled
        return _expand(node.body, unroll)
    size, steps = _expand(node.body, unroll)
    kind = int(node.kind)
    if kind == _VECTORIZED:
        return size * max(1.0, extent / _LANES), steps
    if kind == _UNROLLED or (kind == _SERIAL and steps * extent <= unroll):
        return size * extent, steps * extent
    return size, steps * extent
