"""The baseline schedules for GPUs: TVM's own rules (dlight), which need no search."""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm.s_tir import Schedule, dlight

from gpu_aware_tune.kernels.traces import TraceError, apply_trace, trace_to_json


def gpu_schedules(module: tvm.IRModule, target: tvm.target.Target, most: int) -> list[Schedule]:
    """Give what TVM's rules make of a kernel, the most special rule first."""
    rules = (
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    found: list[Schedule] = []
    for rule in rules:
        schedule = _applied(rule, module, target)
        if schedule is not None and len(found) < most:
            found.append(schedule)
    return found


def _applied(
    rule: dlight.ScheduleRule, module: tvm.IRModule, target: tvm.target.Target
) -> Schedule | None:
    """What a rule makes of a kernel, replayed from its trace; None where that is not the same."""
    with target:
        try:
            made = rule.apply(module["main"], target, False)
        except Exception:  # a rule that cannot handle a kernel raises any of TVM's errors
            return None
    if made is None:
        return None
    try:
        replayed = apply_trace(trace_to_json(made.trace), module)
    except TraceError:
        return None
    # A rule that also rewrote the function by other means leaves no trace of that.
    return replayed if tvm_ffi.structural_equal(replayed.mod, made.mod) else None
