"""The ten checks that a GPU has to pass before its shares are believed; docs/gpu-sharing.md has why.

Each runs in a process of its own, which is ended where it hangs. What it found is written to the
results file (`--gpu-results`) at once. The first ones tell whether anything can be measured at all,
the last ones take longest; those for which `--check-seconds` leaves no time fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.environment import environment, gpu_results, write_results
from gpu.check_process import CHECKS
from gpu.lab import Lab, answer

CHECK_TIMEOUT_S = 120.0
_LEAST_S = 10.0  # with less time left a check is not begun
Check = Callable[[int], None]


@pytest.fixture(scope="module")
def check(request: pytest.FixtureRequest) -> Check:
    """Runs a check by its number, writes what was found so far, and fails where it did not pass."""
    path = gpu_results("gpu-checks", request.config.getoption("--gpu-results"))
    about = environment("cuda")
    end = time.monotonic() + request.config.getoption("--check-seconds")
    lab = Lab()
    found: dict[str, dict[str, Any]] = {}

    def run(number: int) -> None:
        result = found[str(number)] = checked(lab, number, end - time.monotonic())
        write_results(path, about, {"checks": found})
        if "error" in result or result["passed"] is False:
            pytest.fail(result.get("error") or result["text"], pytrace=False)
        print(result["text"])
        if result["passed"] is None:
            pytest.skip(f"nothing was learnt: {result['text']}")

    return run


def checked(lab: Lab, number: int, left_s: float) -> dict[str, Any]:
    """What one check found in its process, or why it found nothing."""
    begun = time.monotonic()
    if left_s < _LEAST_S:
        result: dict[str, Any] = {"error": "left out: the time is used up"}
    else:
        child = lab.start_child("check", number=number)
        result = answer(child, min(CHECK_TIMEOUT_S, left_s))
    return {**result, "check": CHECKS[number - 1].__name__, "wall_s": time.monotonic() - begun}


def test_check_01_primary_function(check: Check) -> None:
    """A kernel that TVM loaded in the primary context runs right on a green stream."""
    check(1)


def test_check_02_sm_identity(check: Check) -> None:
    """Groups of 16 SMs are 16 SMs, disjoint, and the same ones in the next process."""
    check(2)


def test_check_04_concurrency(check: Check) -> None:
    """Two halves work at the same time, given enough hardware queues."""
    check(4)


def test_check_05_timer_agreement(check: Check) -> None:
    """TVM's timer, events and graphs agree above 100 us."""
    check(5)


def test_check_03_sm_ladder(check: Check) -> None:
    """A compute-bound kernel's time goes with one over the SMs."""
    check(3)


def test_check_07_mps_as_a_user(check: Check) -> None:
    """A private MPS daemon gives the SMs that its percentage promises, and a missed one shows."""
    check(7)


def test_check_10_interference(check: Check) -> None:
    """A compute neighbour costs little; processes take turns without MPS."""
    check(10)


def test_check_06_graph_escape(check: Check) -> None:
    """Whether TVM's own CUDA graphs leave the partition that they are replayed in."""
    check(6)


def test_check_09_fault_containment(check: Check) -> None:
    """What one illegal access ends: clients of one MPS server, partitions of one process."""
    check(9)


def test_check_08_numerics_under_caps(check: Check) -> None:
    """float16 products are right under MPS percentages and in green contexts of equal size."""
    check(8)
