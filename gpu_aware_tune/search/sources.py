"""A pipeline from outside: what a search needs of it, where candidates come from, other machines."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from gpu_aware_tune.codegen.build_pool import Built, remove
from gpu_aware_tune.measure import SEARCH, TimingPolicy
from gpu_aware_tune.search.candidates import Candidate, NewTask

if TYPE_CHECKING:
    from gpu_aware_tune.search.pipeline import Outcome


class CandidateSource:
    """Where the pipeline's candidates come from while it runs: this one has none.

    A subclass overrides what it knows better.
    """

    def next_task(self, busy: Collection[str]) -> str | None:
        """The task to draft for, or None for no more; `busy` are those whose searcher is at work."""
        return None

    def accept(self, task: str, drafted: Sequence[Candidate]) -> Sequence[Candidate]:
        """Which of a draft's candidates are to be built here."""
        return drafted

    def exhausted(self, task: str) -> None:
        """Take note that a task's space has nothing new."""

    def lost(self, task: str, text: str) -> None:
        """Take note that the search itself died on a task, with how it ended."""

    def warn(self, text: str) -> None:
        """Take note of what is worth telling people, such as a machine that is gone."""

    def best_s(self, task: str) -> Mapping[int, float]:
        """The best seconds of a task by units, for stopping early."""
        return {}

    def stop(self) -> bool:
        """Whether to end now, leaving what is under way; asked in every turn of the loop."""
        return False


class ArtifactSink:
    """What other machines bring, and where artifacts go that are not measured here: none, nowhere."""

    def candidates(self) -> Iterable[Candidate]:
        """Candidates that have come in since this was last asked."""
        return ()

    def artifacts(self) -> Iterable[tuple[Candidate, Built]]:
        """Artifacts that were built elsewhere and have come in since this was last asked."""
        return ()

    def take(self, candidate: Candidate, built: Built) -> None:
        """Take an artifact for which there is no slice; the file is the sink's own."""
        remove(built.path)

    def wait(self) -> bool:
        """Whether more is still to come when nothing is left to do; may sleep."""
        return False


class CandidatePipeline(Protocol):
    """What a search needs of a pipeline: one machine's, or that of a cluster."""

    def add_task(self, task: NewTask) -> None:
        """Make a task known to the search."""

    def tell(self, candidate: Candidate, seconds: float | None) -> None:
        """Let the search learn what a candidate came to."""

    def run(
        self,
        candidates: Iterable[Candidate],
        source: CandidateSource | None = None,
        timing: TimingPolicy = SEARCH,
        alone: bool = False,
    ) -> Iterator[Outcome]:
        """Give an outcome for each candidate, the given ones first and then the drafted ones."""

    def core_seconds(self) -> dict[str, float]:
        """What the workers have used so far."""

    @property
    def cores(self) -> int:
        """How many cores they use."""

    @property
    def builds_in_flight(self) -> int:
        """Builds under way."""

    @property
    def waiting_to_measure(self) -> int:
        """Artifacts that wait for a measuring worker."""

    @property
    def slices(self) -> Sequence[tuple[str, str | None]]:
        """Each slice's name and the task that it measures now, if any."""
