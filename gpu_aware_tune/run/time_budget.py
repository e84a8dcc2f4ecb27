"""How `--time` is divided: it is for the whole run, what comes after the search included."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_aware_tune.events import Level, Note
from gpu_aware_tune.finalize.library_build import ROUND_S, ROUNDS
from gpu_aware_tune.run.session import Session

_SPARE_S = 1.0  # workers end, the folder is written
_RETIME_PART = 0.15  # of what is left, for measuring the best again
_SEEDED_RETIME_S = 3.0  # without a limit, for a batch size that starts from another one's kernels
_QUICK_ROUNDS, _FEWEST_ROUNDS = 4, 2
_LEAST_SEARCH_S = 1.0


@dataclass(frozen=True)
class TimeBudget:
    """Seconds of the stages that are left, None where the run has no limit.

    Args:
        search_s: for the baseline schedules and the trials.
        retime_s: for measuring the best again.
        rounds: number of rounds in which the finished libraries are timed.
    """

    search_s: float | None
    retime_s: float | None
    rounds: int


def divide_time(
    session: Session, check_s: float, shares: int, seeded: bool = False
) -> tuple[TimeBudget, list[Note]]:
    """Divide what is left of the run's time.

    Args:
        session: knows the limit and what has passed.
        check_s: that compiling and running the untuned libraries took; the end takes as long again,
            for each share and for the library of all shares.
        shares: how many libraries are made.
        seeded: whether the search starts from what another batch size has found: only its heaviest
            tasks are then measured again.

    Returns:
        The budget, and what to say beforehand where the time is too short.
    """
    left = session.left_s()
    rounds = _QUICK_ROUNDS if session.settings.effort == "quick" else ROUNDS
    if left is None:
        return TimeBudget(None, _SEEDED_RETIME_S if seeded else None, rounds), []
    end_s = check_s * (shares + (shares > 1)) + _SPARE_S
    timing_s = rounds * ROUND_S * shares
    if left < 4 * (end_s + timing_s):
        rounds = _FEWEST_ROUNDS
        timing_s = rounds * ROUND_S * shares
    free = left - end_s - timing_s
    retime_s = max(0.0, _RETIME_PART * free)
    search_s = free - retime_s
    if search_s >= _LEAST_SEARCH_S:
        return TimeBudget(search_s, retime_s, rounds), []
    limit = session.settings.time_s or 0.0
    needed = session.elapsed_s() + end_s + timing_s
    text = (
        f"--time {limit:g}s leaves nothing for a search: import and check took"
        f" {session.elapsed_s():.0f} s, compiling, timing and verifying need about"
        f" {end_s + timing_s:.0f} s more; the untuned library is exported; give at least"
        f" --time {2 * needed:.0f}s to search"
    )
    return TimeBudget(0.0, 0.0, rounds), [Note(text, Level.WARNING)]
