"""What the fuzzers share: how many cases, how long one may take, and what may come of it.

FUZZ_CASES sets the number of cases, FUZZ_SEED the first one; a failure names its seed. FUZZ_SECONDS goes
on with as many cases as fit in that time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from gpu_aware_tune.errors import SetupError, UserError

CASES = int(os.environ.get("FUZZ_CASES", "500"))
FIRST = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))  # 0: as many cases as CASES says
LIMIT_S = 5.0


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, also a system call that waits."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def outcome(function: Callable[[Path], None], folder: Path) -> str:
    """ "opened", "refused", or what should not have happened."""
    try:
        with within(LIMIT_S):
            function(folder)
    except (UserError, SetupError) as error:
        text = str(error)
        return "refused" if text and len(text.splitlines()) == 1 else f"not one line: {text!r}"
    except BaseException:
        return traceback.format_exc()
    return "opened"


def seeds() -> Iterator[int]:
    """The cases' seeds: so many, or for so long."""
    if not SECONDS:
        yield from range(FIRST, FIRST + CASES)
        return
    end = time.monotonic() + SECONDS
    for seed in itertools.count(FIRST):
        if time.monotonic() >= end:
            return
        yield seed


def run_cases(run_case: Callable[[int], str]) -> None:
    """Run every case, and fail with the seeds of those that were neither opened nor refused."""
    begun = time.monotonic()
    counts = {"opened": 0, "refused": 0}
    wrong: list[str] = []
    for seed in seeds():
        came = run_case(seed)
        if came in counts:
            counts[came] += 1
        else:
            wrong.append(f"FUZZ_SEED={seed} FUZZ_CASES=1: {came}")
            print(wrong[-1], flush=True)
    cases = sum(counts.values()) + len(wrong)
    print(f"{cases} cases in {time.monotonic() - begun:.1f} s: {counts}, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong[:10])
    if cases >= 100:
        assert min(counts.values()) > 0, "damage that is never noticed, or always"
