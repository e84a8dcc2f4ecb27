"""The ten checks that a GPU has to pass before its shares are believed; docs/gpu-sharing.md has why.

    make gpu-check                                   # all ten, a process each; results as JSON
    python -m benchmarks.gpu.checks --only 2,4       # some of them
    python -m benchmarks.gpu.checks --null           # without a GPU: tries the code, proves nothing

Exit code 0: every check passed; 1: one did not; 3: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.check_children import CHILDREN
from benchmarks.gpu.check_faults import fault_containment, mps_as_a_user, numerics_under_caps
from benchmarks.gpu.check_green import (
    concurrency,
    graph_escape,
    interference,
    primary_function,
    sm_identity,
    sm_ladder,
    timer_agreement,
)
from benchmarks.gpu.environment import NO_GPU, RESULTS, require_gpu, write_results
from benchmarks.gpu.lab import Lab, NullLab, answer

CHECK_TIMEOUT_S = 300.0

CHECKS = {
    1: primary_function,
    2: sm_identity,
    3: sm_ladder,
    4: concurrency,
    5: timer_agreement,
    6: graph_escape,
    7: mps_as_a_user,
    8: numerics_under_caps,
    9: fault_containment,
    10: interference,
}


def main() -> None:
    """Run the checks that are asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="numbers, such as 1,2,7")
    parser.add_argument("--null", action="store_true", help="on the null device")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "JSON"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, null=args.null)
        return
    if not require_gpu(args.null):
        sys.exit(NO_GPU)
    lab = NullLab() if args.null else Lab()
    numbers = [int(part) for part in args.only.split(",") if part] or list(CHECKS)
    found = {}
    for number in numbers:
        begun = time.monotonic()
        result = answer(lab.start_child("check", number=number), CHECK_TIMEOUT_S)
        result |= {"check": CHECKS[number].__name__, "wall_s": time.monotonic() - begun}
        found[str(number)] = result
        print(line(number, result), flush=True)
    folder = Path(tempfile.mkdtemp()) if args.null else args.results
    write_results("gpu-checks", {"checks": found}, args.null, folder)
    sys.exit(any(result.get("passed") is False or "error" in result for result in found.values()))


def line(number: int, result: dict[str, Any]) -> str:
    """One check's outcome for people."""
    verdict = {True: "pass", False: "FAIL", None: "----"}[result.get("passed")]
    if "error" in result:
        verdict = "FAIL"
    text = result.get("text") or result.get("error", "")
    return f"{number:2} {verdict} {result['check']}: {text} ({result['wall_s']:.1f} s)"


def child(name: str, arguments: str, null: bool) -> None:
    """One check, or a part of one, in this process."""
    from gpu_aware_tune.cuda_toolchain import preload_runtime

    preload_runtime()
    lab = NullLab() if null else Lab()
    given = json.loads(arguments)
    found = CHECKS[given["number"]](lab) if name == "check" else CHILDREN[name](lab, **given)
    print("ANSWER " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
