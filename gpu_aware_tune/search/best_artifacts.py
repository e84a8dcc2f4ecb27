"""The artifacts of the best candidates so far, so that measuring them again needs no second build."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gpu_aware_tune.codegen.build_pool import remove

_MOST = 4  # artifacts for each task and units: as many as are measured again, and one more


class BestArtifacts:
    """Keeps the files of each task's fastest candidates, and removes those of all others."""

    def __init__(self) -> None:
        self._tasks: dict[str, _Task] = {}

    def offer(
        self, task: str, traces: Iterable[str], path: str, seconds: Mapping[int, float | None]
    ) -> None:
        """Keep a measured artifact if it is among the best on some units, else remove it.

        Args:
            task: its task's hash.
            traces: the schedules that it is the code of.
            path: the file.
            seconds: that it took, by units; None where it failed.
        """
        of = self._tasks.setdefault(task, _Task())
        of.paths.update(dict.fromkeys(traces, path))
        for units, taken in seconds.items():
            if taken is not None:
                of.best[units] = sorted([*of.best.get(units, ()), (taken, path)])[:_MOST]
        kept = {path for best in of.best.values() for _, path in best}
        for old in {*of.paths.values()} - kept:
            remove(old)
        of.paths = {trace: path for trace, path in of.paths.items() if path in kept}

    def path_of(self, task: str, trace: str) -> str | None:
        """The artifact of a schedule, if it is here; it stays this object's."""
        return self._tasks[task].paths.get(trace) if task in self._tasks else None

    def clear(self) -> None:
        """Remove every file."""
        for task in self._tasks.values():
            for path in task.paths.values():
                remove(path)
        self._tasks.clear()


@dataclass
class _Task:
    """A task's artifacts: seconds and path of the best by units, and the path of each schedule."""

    best: dict[int, list[tuple[float, str]]] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
