"""The artifacts of the best candidates so far, so that measuring them again needs no second build."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gpu_aware_tune.codegen.build_pool import remove

_MOST = 4  # artifacts for each task and units: as many as are measured again, and one more


class BestArtifacts:
    """Keeps the files of each task's fastest candidates, and removes those of all others."""

    def __init__(self) -> None:
        self._best: dict[tuple[str, int], list[tuple[float, str]]] = {}  # seconds and path
        self._paths: dict[tuple[str, str], str] = {}  # by task and trace

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
        dropped: set[str] = set()
        for units, taken in seconds.items():
            if taken is None:
                continue
            best = self._best.setdefault((task, units), [])
            best.append((taken, path))
            best.sort()
            dropped.update(old for _, old in best[_MOST:])
            del best[_MOST:]
        self._paths.update({(task, trace): path for trace in traces})
        for old in dropped | {path}:
            if not self._is_best(task, old):
                self._forget(task, old)

    def path_of(self, task: str, trace: str) -> str | None:
        """The artifact of a schedule, if it is here; it stays this object's."""
        return self._paths.get((task, trace))

    def clear(self) -> None:
        """Remove every file."""
        for path in self._paths.values():
            remove(path)
        self._paths.clear()
        self._best.clear()

    def _is_best(self, task: str, path: str) -> bool:
        lists = (best for (name, _), best in self._best.items() if name == task)
        return any(path == kept for best in lists for _, kept in best)

    def _forget(self, task: str, path: str) -> None:
        remove(path)
        self._paths = {key: kept for key, kept in self._paths.items() if kept != path}
