"""Which candidate waits, which is on what machine, and what becomes of a lost machine's; knows no Ray."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from gpu_aware_tune.cluster.messages import Artifact
from gpu_aware_tune.search.candidates import Candidate, NewTask

_LOSSES = 2  # a candidate that was on so many machines when they died is not tried again
_KNOWN = 64  # measured schedules that a search which moves starts from


@dataclasses.dataclass
class _Entry:
    candidate: Candidate
    losses: int = 0
    node: str = ""
    artifact: Artifact | None = None  # kept until it is measured: its machine may be lost


class PendingCandidates:
    """Every candidate of a run of the pipeline that has no outcome yet.

    One is given to a machine that builds and measures it, or to one that only builds it; then its
    artifact is kept here until it is given to a machine that measures it.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Entry] = deque()
        self._made: deque[_Entry] = deque()
        self._given: dict[int, _Entry] = {}
        self._loads: Counter[str] = Counter()
        self._ids = itertools.count()

    def add(self, candidates: Iterable[Candidate]) -> None:
        """Take candidates that nobody works on."""
        self._waiting.extend(_Entry(candidate) for candidate in candidates)

    @property
    def waiting(self) -> int:
        """How many nobody has built or is building."""
        return len(self._waiting)

    @property
    def made(self) -> int:
        """How many artifacts wait for a machine that measures."""
        return len(self._made)

    def open(self) -> int:
        """How many have no outcome."""
        return len(self._waiting) + len(self._made) + len(self._given)

    def load(self, node: str) -> int:
        """How many a machine has."""
        return self._loads[node]

    def give(self, node: str, count: int) -> list[tuple[int, Candidate]]:
        """Hand out the next ones to a machine, each with a number of its own."""
        given = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        return [(self._number(node, entry), entry.candidate) for entry in given]

    def keep(self, number: int, artifact: Artifact) -> None:
        """A candidate was built where it cannot be measured; one that was given up is dropped."""
        entry = self._take(number)
        if entry is not None:
            entry.artifact = artifact
            self._made.append(entry)

    def pass_on(self, node: str, count: int) -> list[tuple[int, Candidate, Artifact]]:
        """Hand out the next artifacts to a machine that measures, each with a new number."""
        given = []
        for _ in range(min(count, len(self._made))):
            entry = self._made.popleft()
            assert entry.artifact is not None
            given.append((self._number(node, entry), entry.candidate, entry.artifact))
        return given

    def finish(self, number: int) -> Candidate | None:
        """Take out one that has its outcome; None for one that was given up or is elsewhere now."""
        entry = self._take(number)
        return entry.candidate if entry else None

    def lose(self, node: str) -> list[Candidate]:
        """A machine is gone: its candidates go first to others; gives those not to be tried again."""
        lost = []
        for number in [n for n, entry in self._given.items() if entry.node == node]:
            entry = self._given.pop(number)
            entry.losses += 1
            if entry.losses >= _LOSSES:
                lost.append(entry.candidate)
            else:
                (self._made if entry.artifact else self._waiting).appendleft(entry)
        del self._loads[node]
        return lost

    def orphan(self, tasks: Sequence[str]) -> None:
        """The searcher that drafted some tasks' candidates is gone: nobody else knows its numbers."""
        for entry in (*self._waiting, *self._made, *self._given.values()):
            if entry.candidate.task in tasks:
                entry.candidate = dataclasses.replace(entry.candidate, number=-1)

    def clear(self) -> None:
        """Forget everything; outcomes that still come are of no interest."""
        self._waiting.clear()
        self._made.clear()
        self._given.clear()
        self._loads.clear()

    def _number(self, node: str, entry: _Entry) -> int:
        number = next(self._ids)
        entry.node = node
        self._given[number] = entry
        self._loads[node] += 1
        return number

    def _take(self, number: int) -> _Entry | None:
        entry = self._given.pop(number, None)
        if entry is not None:
            self._loads[entry.node] -= 1
        return entry


class SearchOwnership:
    """Which machine's searcher looks after which task, and what it is given when it takes one over."""

    def __init__(self) -> None:
        self._new: dict[str, NewTask] = {}
        self._scores: dict[str, dict[str, float]] = {}
        self._tried: dict[str, dict[str, None]] = {}
        self._owner: dict[str, str] = {}

    def add(self, task: NewTask) -> None:
        """Make a task known; nobody looks after it yet."""
        self._new[task.task] = task
        self._scores[task.task] = dict(task.known)
        self._tried[task.task] = dict.fromkeys(task.tried)

    @property
    def tasks(self) -> Iterable[str]:
        """Every task that can be drafted for."""
        return self._new

    def owner(self, task: str) -> str | None:
        """The machine that looks after a task."""
        return self._owner.get(task)

    def owned(self, node: str) -> list[str]:
        """The tasks that a machine looks after."""
        return [task for task, owner in self._owner.items() if owner == node]

    def take(self, task: str, node: str) -> NewTask | None:
        """Let a machine look after a task; what it has to be told first, None if it knows the task."""
        if self._owner.get(task) == node:
            return None
        self._owner[task] = node
        scores = sorted(self._scores[task].items(), key=lambda item: item[1])
        tried = tuple(self._tried[task])
        return dataclasses.replace(self._new[task], known=tuple(scores[:_KNOWN]), tried=tried)

    def forget(self, node: str) -> list[str]:
        """A machine is gone; the tasks that it looked after are anybody's."""
        tasks = self.owned(node)
        for task in tasks:
            del self._owner[task]
        return tasks

    def drafted(self, candidates: Sequence[Candidate]) -> None:
        """Remember what will be built, so that no other searcher drafts it again."""
        for candidate in candidates:
            self._tried[candidate.task][candidate.trace] = None

    def learn(self, candidate: Candidate, seconds: float | None) -> None:
        """Remember a result for a searcher that may have to take over."""
        if candidate.task in self._scores and candidate.trace and seconds is not None:
            self._scores[candidate.task][candidate.trace] = seconds
