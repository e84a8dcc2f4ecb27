"""Random candidates of a kernel's search space, without a search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm


def random_schedules(
    module: tvm.IRModule, target: tvm.target.Target, space: Any, count: int, seed: int
) -> list[Any]:
    """Schedules of `space` with random decisions, as many of `count` as TVM's checks let through.

    Args:
        module: the kernel, as one PrimFunc named "main".
        target: what it is for.
        space: TVM's space generator, or the name of one.
        count: how many to draw.
        seed: of the decisions.
    """
    from tvm.s_tir import meta_schedule as ms

    context = ms.TuneContext(
        mod=module,
        target=target,
        space_generator=space,
        search_strategy="replay-trace",
        rand_state=seed,
        num_threads=1,
    ).clone()
    context.pre_tuning(
        max_trials=count,
        num_trials_per_iter=count,
        design_spaces=context.generate_design_space(),
        database=ms.database.MemoryDatabase(),
        cost_model=ms.cost_model.RandomModel(),
    )
    return [candidate.sch for candidate in context.generate_measure_candidates() or []]
