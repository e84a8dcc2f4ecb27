"""The process of a check, or of a part of one that needs its own: a hang or a fault ends it alone.

python -m gpu.check_process NAME JSON      # a function by its name, its arguments as JSON
"""

from __future__ import annotations

import json
import sys

from benchmarks.scaffold import die_with_parent, tell
from gpu.check_children import CHILDREN
from gpu.check_faults import fault_containment, mps_as_a_user, numerics_under_caps
from gpu.check_green import (
    concurrency,
    graph_escape,
    interference,
    primary_function,
    sm_identity,
    sm_ladder,
    timer_agreement,
)
from gpu.lab import Lab

# In the order of docs/gpu-sharing.md, whose numbers they have.
CHECKS = (
    primary_function,
    sm_identity,
    sm_ladder,
    concurrency,
    timer_agreement,
    graph_escape,
    mps_as_a_user,
    numerics_under_caps,
    fault_containment,
    interference,
)


def main(name: str, arguments: str) -> None:
    """Run the function and tell what it found."""
    from gpu_aware_tune.codegen.cuda_toolchain import preload_runtime

    die_with_parent()
    preload_runtime()
    lab = Lab()
    given = json.loads(arguments)
    tell(CHECKS[given["number"] - 1](lab) if name == "check" else CHILDREN[name](lab, **given))


if __name__ == "__main__":
    main(*sys.argv[1:])
