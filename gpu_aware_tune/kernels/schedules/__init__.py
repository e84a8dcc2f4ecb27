"""Baseline schedules: what a kernel runs with before anything was searched.

A baseline schedule is candidate 0 of its task: recorded like any other, and what a library falls
back to. It is traced, so it can be stored and applied again with `traces.apply_trace`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm
    from tvm.s_tir import Schedule


MOST_BASELINES = 3  # baseline schedules of a kernel that are measured before anything is searched


def baseline_schedules(
    module: tvm.IRModule, target: tvm.target.Target, most: int = MOST_BASELINES
) -> list[Schedule]:
    """Give up to `most` alternatives, the one expected to be fastest first: candidate 0.

    Args:
        module: one PrimFunc named "main", not scheduled; left as it is.
        target: what the kernel is for; its `num-cores` decides how loops are shared out.
        most: how many.

    Returns:
        Traced schedules; none where the unscheduled kernel is all there is.
    """
    if str(target.kind.name) == "llvm":
        from gpu_aware_tune.kernels.schedules.cpu import cpu_schedules, machine_of

        found = list(cpu_schedules(module, machine_of(target), most))
    else:
        from gpu_aware_tune.kernels.schedules.gpu import gpu_schedules

        found = gpu_schedules(module, target, most)
    return [schedule for schedule in found if len(schedule.trace.insts) > 0]
