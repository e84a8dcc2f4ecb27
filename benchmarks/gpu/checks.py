"""The ten checks that a GPU has to pass before its shares are believed; docs/hardware-status.md has why.

    make gpu-check                                   # all ten, a process each; results as JSON
    python -m benchmarks.gpu.checks --only 2,4       # some of them
    python -m benchmarks.gpu.checks --seconds 240    # those that fit, the most telling ones first
    python -m benchmarks.gpu.checks --null           # without a GPU: tries the code, proves nothing

The results file is written anew after each check. Exit code 0: every check passed; 1: one did not, or
was left out; 3: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.children import die_with_parent, tell
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

CHECK_TIMEOUT_S = 120.0
_LEAST_S = 10.0  # with less time left a check is not begun
# The first ones tell whether anything can be measured at all; the last ones take longest.
_ORDER = (1, 2, 4, 5, 3, 7, 10, 6, 9, 8)

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
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all of them")
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
    numbers = [int(part) for part in args.only.split(",") if part] or list(_ORDER)
    folder = Path(tempfile.mkdtemp()) if args.null else args.results
    end = time.monotonic() + args.seconds
    found: dict[str, dict[str, Any]] = {}
    for number in numbers:
        result = checked(lab, number, end - time.monotonic())
        found[str(number)] = result
        print(line(number, result), flush=True)
        path = write_results("gpu-checks", {"checks": found}, args.null, folder)
    print(f"written to {path}")
    sys.exit(any(result.get("passed") is False or "error" in result for result in found.values()))


def checked(lab: Lab, number: int, left_s: float) -> dict[str, Any]:
    """One check in a process of its own, ended where it hangs."""
    begun = time.monotonic()
    if left_s < _LEAST_S:
        result: dict[str, Any] = {"error": "left out: the time is used up"}
    else:
        child = lab.start_child("check", number=number)
        result = answer(child, min(CHECK_TIMEOUT_S, left_s))
    return {**result, "check": CHECKS[number].__name__, "wall_s": time.monotonic() - begun}


def line(number: int, result: dict[str, Any]) -> str:
    """One check's outcome for people."""
    verdict = {True: "pass", False: "FAIL", None: "----"}[result.get("passed")]
    if "error" in result:
        verdict = "FAIL"
    text = result.get("text") or result.get("error", "")
    return f"{number:2} {verdict} {result['check']}: {text} ({result['wall_s']:.1f} s)"


def child(name: str, arguments: str, null: bool) -> None:
    """One check, or a part of one, in this process."""
    from gpu_aware_tune.codegen.cuda_toolchain import preload_runtime

    die_with_parent()
    preload_runtime()
    lab = NullLab() if null else Lab()
    given = json.loads(arguments)
    found = CHECKS[given["number"]](lab) if name == "check" else CHILDREN[name](lab, **given)
    tell(found)


if __name__ == "__main__":
    main()
