"""Which cores this process may use: one logical CPU per physical core, nearest neighbours first."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from gpu_aware_tune.errors import SetupError

SYSFS_CPU = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")


_unbound: frozenset[int] | None = None  # what this process had before a partition bound a thread


def remember_unbound(cpus: frozenset[int] | None) -> None:
    """Note what this process may really use while its launching thread is bound to a share."""
    global _unbound
    _unbound = cpus


def allowed_cpus() -> frozenset[int]:
    """The logical CPUs the operating system lets this process run on."""
    if _unbound is not None:
        return _unbound
    if not hasattr(os, "sched_getaffinity"):  # pragma: no cover - not Linux
        raise SetupError("binding to cores needs Linux: this system has no sched_setaffinity")
    return frozenset(os.sched_getaffinity(0))


def usable_cores(sysfs: Path = SYSFS_CPU, cgroup: Path = CGROUP) -> tuple[int, ...]:
    """One logical CPU for each physical core that may be used, ordered by package and core.

    Two hardware threads of a core share its vector units, so a kernel gains nothing from the second
    one while its timing suffers. A container's CPU quota caps the count: more threads than that
    would be throttled in mid-kernel.
    """
    groups = physical_cores(allowed_cpus(), sysfs)
    quota = cpu_quota(cgroup)
    cores = tuple(group[0] for group in groups)
    return cores if quota is None else cores[: max(1, int(quota))]


def physical_cores(cpus: Collection[int], sysfs: Path = SYSFS_CPU) -> list[tuple[int, ...]]:
    """Group logical CPUs by physical core, in the order of package and core number."""
    groups: dict[tuple[int, int, str], list[int]] = {}
    for cpu in sorted(cpus):
        topology = sysfs / f"cpu{cpu}" / "topology"
        # Core numbers repeat in some virtual machines; the list of siblings says which CPUs are one
        # core. Without these files every logical CPU counts as a core of its own.
        siblings = _text(topology / "thread_siblings_list") or f"alone {cpu}"
        place = (_number(topology / "physical_package_id"), _number(topology / "core_id"))
        number = cpu if place[1] is None else place[1]
        groups.setdefault((place[0] or 0, number, siblings), []).append(cpu)
    ordered = sorted(groups.items(), key=lambda item: (item[0][:2], item[1]))
    return [tuple(group) for _, group in ordered]


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """CPUs granted by this container's cgroup (version 2 or 1), None where there is no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    quota_us = _number(cgroup / "cpu" / "cpu.cfs_quota_us")
    period_us = _number(cgroup / "cpu" / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and quota_us > 0 and period_us else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.removeprefix("-").isdigit() else None
