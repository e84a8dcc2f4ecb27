"""Why demands do not fit a device, in one sentence, and what would help."""

from __future__ import annotations

from gpu_aware_tune.planning.grouping import Grouper
from gpu_aware_tune.planning.lanes import Workload


def explain(work: Workload, grouper: Grouper) -> tuple[str, tuple[str, ...]]:
    return "x", ()
