"""The pipeline of a run that is spread over machines: what `pipeline.Pipeline` is for one of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from gpu_aware_tune.cluster.ledger import PendingCandidates, SearchOwnership
from gpu_aware_tune.cluster.members import Member
from gpu_aware_tune.cluster.messages import (
    Ask,
    Batch,
    Begin,
    DraftRequest,
    End,
    FromNode,
    Gone,
    Learn,
    Made,
    Measure,
    Measured,
    Numbered,
    Ready,
    SearchLost,
    Work,
)
from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure import SEARCH, TimingPolicy
from gpu_aware_tune.measure.measurement import FailureKind, Measurement
from gpu_aware_tune.search.candidates import Candidate, NewTask
from gpu_aware_tune.search.pipeline import Outcome, TaskSpec
from gpu_aware_tune.search.sources import CandidateSource

_WAIT_S = 0.1
_PATIENCE_S = 60.0  # for machines that start slowly, once one works
_CHUNK = 4  # candidates in a row for one machine, so that its buffers serve several
_AHEAD = 2  # what is built elsewhere or waits, for each candidate the measuring machines hold

_KEPT = "what was measured is kept: run the same command again"


class Cluster(Protocol):
    """What is needed of `Members`."""

    @property
    def active(self) -> list[Member]:
        """Those that can be given work."""

    @property
    def starting(self) -> int:
        """How many may become active, of those that may measure."""

    def refresh(self, at_once: bool = False) -> None:
        """Look for machines that have joined."""

    def receive(self, wait_s: float) -> Iterator[tuple[Member, Batch | Gone]]:
        """What members tell."""

    def flush(self) -> None:
        """Send what was queued."""

    def close(self) -> None:
        """End every member."""


class ClusterPipeline:
    """Hands candidates out to machines and drafts on them, as their room and the search want it.

    A task is drafted for on one machine, whose cost model learns from all of its results; the
    candidates are built wherever there is room, and measured there too, if the device is there. What
    is built elsewhere is passed on to a machine that measures, ahead of candidates. What a machine
    had that is gone goes to the others.

    Args:
        members: the machines.
        tasks: every task a candidate may belong to, by hash.
    """

    def __init__(self, members: Cluster, tasks: Mapping[str, TaskSpec]) -> None:
        self._members = members
        self._tasks = dict(tasks)
        self._ledger = PendingCandidates()
        self._searches = SearchOwnership()
        self._asked: dict[str, Member] = {}  # drafts under way, by task
        self._begin: Begin | None = None
        self._run = 0
        self._core_s: Counter[str] = Counter()  # of machines that are gone

    def wait(self) -> list[str]:
        """Wait until every machine works or has refused to, or some measure; gives a line for each.

        Those that are known to only build are not waited for.

        Raises:
            SetupError: none of them measures.
        """
        source = _Lines()
        lines = source.lines
        self._members.refresh(at_once=True)
        patience = time.monotonic() + _PATIENCE_S
        while self._members.starting and not (self._measuring and time.monotonic() > patience):
            for member, news in self._members.receive(_WAIT_S):
                for _ in self._take(member, news, source):
                    pass
            self._members.refresh()
        if not self._measuring:
            why = "; ".join(lines) or "none has the device"
            raise SetupError(f"no machine of the Ray cluster can measure: {why}")
        return lines

    def add_task(self, task: NewTask) -> None:
        """Make a task known to the search."""
        self._searches.add(task)

    def tell(self, candidate: Candidate, seconds: float | None) -> None:
        """Let the search learn what a candidate came to; None: it failed."""
        self._searches.learn(candidate, seconds)
        owner = self._searches.owner(candidate.task)
        for member in self._members.active:
            if member.key == owner and candidate.number >= 0:
                member.send(Learn(candidate.task, candidate.number, seconds))

    def run(
        self,
        candidates: Iterable[Candidate],
        source: CandidateSource | None = None,
        timing: TimingPolicy = SEARCH,
        alone: bool = False,
    ) -> Iterator[Outcome]:
        """Give an outcome for each candidate; see `pipeline.Pipeline.run`.

        Raises:
            SetupError: no machine is left that measures.
        """
        source = source or CandidateSource()
        self._run += 1
        self._begin = Begin(self._run, timing, alone)
        self._ledger.add(candidates)
        for member in self._members.active:
            member.send(self._begin)
        try:
            while not source.stop():
                self._pass_on(source)
                self._ask(source)
                self._hand_out(source)
                self._members.flush()
                if self._measuring and not self._ledger.open() and not self._asked:
                    return
                for member, news in self._members.receive(_WAIT_S):
                    yield from self._take(member, news, source)
                self._members.refresh()
                if not self._measuring and not self._members.starting:
                    raise SetupError(
                        f"no machine of the Ray cluster is left to measure on; {_KEPT}"
                    )
        finally:
            self._end()

    @property
    def builds_in_flight(self) -> int:
        """Builds under way, on all machines."""
        return sum(member.status.builds for member in self._members.active)

    @property
    def waiting_to_measure(self) -> int:
        """Artifacts that wait for a measuring worker, on all machines."""
        there = sum(member.status.waiting_to_measure for member in self._members.active)
        return there + self._ledger.made

    @property
    def slices(self) -> list[tuple[str, str | None]]:
        """Each slice's machine and name, and the hash of the task that it measures now, if any."""
        return [
            (f"{member.name}: {name}", task)
            for member in self._members.active
            for name, task in member.status.slices
        ]

    @property
    def cores(self) -> int:
        """The cores of all machines."""
        return sum(member.ready.cores for member in self._members.active if member.ready)

    def core_seconds(self) -> dict[str, float]:
        """What the workers of all machines have used so far, in core seconds."""
        total = Counter(self._core_s)
        for member in self._members.active:
            total.update(member.status.core_s or {})
        return {name: total[name] for name in ("search", "build", "measure")}

    def close(self) -> None:
        """End the workers of every machine."""
        self._members.close()

    def __enter__(self) -> ClusterPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _measuring(self) -> list[Member]:
        return [member for member in self._members.active if member.measures]

    @property
    def _building(self) -> list[Member]:
        return [member for member in self._members.active if not member.measures]

    def _room(self, member: Member) -> int:
        """How many more a machine can take."""
        room = member.ready.capacity - self._ledger.load(member.key) if member.ready else 0
        return room if member.measures else min(room, self._ahead())

    def _ahead(self) -> int:
        """How many more may be built elsewhere before measuring has to catch up."""
        most = _AHEAD * sum(member.ready.capacity for member in self._measuring if member.ready)
        under_way = sum(self._ledger.load(member.key) for member in self._building)
        return most - under_way - self._ledger.made

    def _roomiest(self, members: Sequence[Member]) -> tuple[Member | None, int]:
        """The machine with the most room, and how many it is given at a time."""
        member = max(members, key=self._room, default=None)
        count = min(_CHUNK, self._room(member)) if member else 0
        return (member, count) if count > 0 else (None, 0)

    def _wanted(self) -> int:
        """How many candidates the machines can take together."""
        elsewhere = min(sum(map(self._room, self._building)), self._ahead())
        return sum(map(self._room, self._measuring)) + max(0, elsewhere)

    def _ask(self, source: CandidateSource) -> None:
        """Request drafts while the machines have room that no waiting candidate will take."""
        while self._wanted() > self._ledger.waiting:
            places = {task: self._searcher(task) for task in self._searches.tasks}
            task = source.next_task([task for task, member in places.items() if member is None])
            member = places.get(task) if task is not None else None
            if task is None or member is None:
                return
            member.send(Ask(task, self._searches.take(task, member.key)))
            self._asked[task] = member

    def _searcher(self, task: str) -> Member | None:
        """Who drafts for a task: the machine that looks after it, else the one with fewest tasks.

        Of equal ones a machine that only builds, where no measurement waits for the search.
        """
        owner = self._searches.owner(task)
        free = [
            member
            for member in self._members.active
            if owner in (None, member.key) and self._free(member, task)
        ]
        return min(free, key=lambda m: (len(self._searches.owned(m.key)), m.measures), default=None)

    def _free(self, member: Member, task: str) -> bool:
        """Whether the searcher that a task has on a machine is not at work (`Pipeline` numbers them)."""
        count = member.ready.searchers if member.ready else 1
        return all(
            other is not member or int(busy) % count != int(task) % count
            for busy, other in self._asked.items()
        )

    def _pass_on(self, source: CandidateSource) -> None:
        """Give artifacts to machines that measure."""
        while self._ledger.made:
            member, count = self._roomiest(self._measuring)
            if member is None:
                return
            for number, candidate, artifact in self._ledger.pass_on(member.key, count):
                known = dict(source.best_s(candidate.task))
                member.send(Measure(_numbered(candidate, number), artifact, known))

    def _hand_out(self, source: CandidateSource) -> None:
        """Give candidates to any machine."""
        while self._ledger.waiting:
            member, count = self._roomiest(self._members.active)
            if member is None:
                return
            for number, candidate in self._ledger.give(member.key, count):
                known = dict(source.best_s(candidate.task))
                member.send(Work(_numbered(candidate, number), known))

    def _take(
        self, member: Member, news: Batch | Gone, source: CandidateSource
    ) -> Iterator[Outcome]:
        if isinstance(news, Gone):
            yield from self._lose(member, news.text, source)
            return
        for message in news.messages:
            yield from self._hear(member, message, source)

    def _hear(
        self, member: Member, message: FromNode, source: CandidateSource
    ) -> Iterator[Outcome]:
        if isinstance(message, Measured):
            candidate = self._ledger.finish(message.id)
            if candidate is not None:
                yield Outcome(candidate, message.measurements)
        elif isinstance(message, Made):
            self._ledger.keep(message.id, message.artifact)
        elif isinstance(message, Ready):
            does = (
                f"builds for this run: {message.lacks};" if message.lacks else "works for this run:"
            )
            source.warn(f"{member.name} {does} {message.text}")
            if self._begin is not None:
                member.send(self._begin)
        elif isinstance(message, DraftRequest) and message.run == self._run:
            self._asked.pop(message.task, None)
            if message.candidates:
                accepted = source.accept(message.task, message.candidates)
                self._searches.drafted(accepted)
                self._ledger.add(accepted)
            else:
                source.exhausted(message.task)
        elif isinstance(message, SearchLost) and message.run == self._run:
            self._asked.pop(message.task, None)
            self._ledger.orphan(self._beside(member, message.task))
            source.lost(message.task, message.text)

    def _beside(self, member: Member, task: str) -> list[str]:
        """The tasks that have the same searcher as a task."""
        count = member.ready.searchers if member.ready else 1
        owned = self._searches.owned(member.key)
        return [other for other in owned if int(other) % count == int(task) % count]

    def _lose(self, member: Member, text: str, source: CandidateSource) -> Iterator[Outcome]:
        """A machine is gone: its candidates and its tasks' searches go elsewhere."""
        self._core_s.update(member.status.core_s or {})
        self._asked = {task: other for task, other in self._asked.items() if other is not member}
        self._ledger.orphan(self._searches.forget(member.key))
        elsewhere = "" if member.ready is None else "; its work goes elsewhere"
        source.warn(f"{member.name} does not work for this run ({text}){elsewhere}")
        for candidate in self._ledger.lose(member.key):
            failed = Measurement.failed(FailureKind.LOST, f"on two machines that were lost; {text}")
            yield Outcome(candidate, dict.fromkeys(self._tasks[candidate.task].units, failed))

    def _end(self) -> None:
        """Forget what is under way (after a stop, or at the end)."""
        self._ledger.clear()
        self._asked.clear()
        self._begin = None
        for member in self._members.active:
            member.send(End())
        self._members.flush()


def _numbered(candidate: Candidate, number: int) -> Numbered:
    facts = (candidate.task, candidate.trace, candidate.origin, candidate.number)
    return Numbered(*facts, id=number)


class _Lines(CandidateSource):
    """Collects what is said of machines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)
