"""What a search minimises when a model is tuned for several shares, and what is then chosen.

A candidate's score is its seconds on each share relative to the best there, combined: the largest
ratio with `robust`, else their mean. The choice: with `share`, the fastest kernel of each share; with
`robust` and `mean`, one set of kernels for all shares, which loses least against each share's own, at
worst or on average; with `throughput`, as `share`, but only the library of the share with which a
device full of instances serves most requests is kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from gpu_aware_tune.records.store import Record
from gpu_aware_tune.settings import Objective


def combined(ratios: Iterable[float], objective: Objective) -> float:
    """One number of a kernel's seconds on each share, relative to the best there; 1 is best."""
    return max(ratios) if objective == Objective.ROBUST else statistics.fmean(ratios)


def usable(records: Mapping[int, Sequence[Record]]) -> dict[str, dict[int, float]]:
    """Seconds by trace and units of the kernels that ran and are right."""
    seconds: dict[str, dict[int, float]] = {}
    for units, found in records.items():
        for record in found:
            if record.usable and record.best_s is not None:
                seconds.setdefault(record.trace, {})[units] = record.best_s
    return seconds


def one_for_all(
    seconds: Mapping[str, Mapping[int, float]], objective: Objective
) -> list[tuple[str, float]]:
    """Rank kernels that shall serve every share.

    Args:
        seconds: of each kernel (by trace) on each of the units.
        objective: "robust" takes the worst share, all others the mean.

    Returns:
        (trace, combined relative seconds), best first; kernels that lack a share are left out.
    """
    units = {count for by_units in seconds.values() for count in by_units}
    best = {u: min(by[u] for by in seconds.values() if u in by) for u in units}
    ranked = [
        (trace, combined([by_units[u] / best[u] for u in sorted(units)], objective))
        for trace, by_units in seconds.items()
        if set(by_units) == units
    ]
    return sorted(ranked, key=lambda pair: pair[1])


def most_throughput(latency_s: Mapping[int, float], total: int) -> tuple[int, dict[int, float]]:
    """Which share serves most requests a second on a device full of instances.

    Args:
        latency_s: of one instance on so many units.
        total: units of the device.

    Returns:
        Its units, and the requests a second of each: (total // units) / latency.
    """
    rates = {units: (total // units) / seconds for units, seconds in latency_s.items()}
    return max(rates, key=lambda units: rates[units]), rates
