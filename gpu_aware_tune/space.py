"""The search space: TVM's own rules for the target, without candidates whose code would explode.

Compile time is spent very unevenly: on two cores 10 % of squeezenet's candidates took 45 % of it (one
over three minutes), all of them unrolled into thousands of statements and none near the best. Their
size can be told from the schedule in 0.3 ms, before anything is lowered, so they are turned down
while TVM draws its population.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm

MAX_STATEMENTS = 600.0  # after unrolling; a vector of 16 lanes counts as one
_LANES = 16
_SERIAL, _PARALLEL, _VECTORIZED, _UNROLLED = 0, 1, 2, 3


def make_space(module: tvm.IRModule, target: tvm.target.Target) -> Any:
    """The space generator for one task.

    Source: `PostOrderApply` with the rules that TVM picks for the target, plus one post-processor
    that turns schedules of more than `MAX_STATEMENTS` statements down (CPU targets only).
    """
    from tvm.s_tir import meta_schedule as ms

    if target.kind.name != "llvm":
        return "post-order-apply"
    picked = ms.TuneContext(
        mod=module, target=target, space_generator="post-order-apply", num_threads=1
    ).space_generator
    return ms.space_generator.PostOrderApply(
        sch_rules=list(picked.sch_rules),
        postprocs=[*picked.postprocs, _size_limit()],
        mutator_probs=dict(picked.mutator_probs.items()),
    )


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
