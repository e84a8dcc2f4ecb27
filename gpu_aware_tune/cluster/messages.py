"""What the driver and the machines of a cluster tell each other."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field

from gpu_aware_tune.measure import TimingPolicy
from gpu_aware_tune.measure.measurement import Measurement
from gpu_aware_tune.search.candidates import Candidate, NewTask
from gpu_aware_tune.search.pipeline import TaskSpec
from gpu_aware_tune.search.pools import PoolSettings


@dataclass(frozen=True)
class NodeSetup:
    """What a machine needs to know before it can work for a run.

    Args:
        pools: what its workers are started with; the device is looked for anew on the machine.
        tasks: what is going to be measured, by hash.
        modules: JSON of each task's unscheduled module.
        arch: the architecture that was asked for, or None.
        versions: of this package and of TVM; a machine with others would measure other things.
        exclusive: nothing else may run where it measures.
        platform: of the driver; a machine of another one cannot build for the run's devices.
    """

    pools: PoolSettings
    tasks: Mapping[str, TaskSpec]
    modules: Mapping[str, str]
    arch: str | None
    versions: tuple[str, str]
    exclusive: bool = False
    platform: str = field(default_factory=sysconfig.get_platform)


@dataclass(frozen=True)
class Begin:
    """To a node: what follows belongs to this run of the pipeline."""

    run: int
    timing: TimingPolicy
    alone: bool


@dataclass(frozen=True)
class Numbered(Candidate):
    """A candidate under the number that its result comes back with."""

    id: int = -1


@dataclass(frozen=True)
class Work:
    """To a node: build and measure this; `best_s` are the best seconds of its task by units.

    A node that only builds sends back what it `Made`.
    """

    candidate: Numbered
    best_s: Mapping[int, float]


@dataclass(frozen=True)
class Artifact:
    """The bytes of a built candidate's library (20 to 200 kB), and their digest (`builder.Built`)."""

    data: bytes
    digest: str


@dataclass(frozen=True)
class Measure:
    """To a node: measure this, which was built elsewhere."""

    candidate: Numbered
    artifact: Artifact
    best_s: Mapping[int, float]


@dataclass(frozen=True)
class Ask:
    """To a node: draft for a task; `new` comes with the first request, before it knows the task."""

    task: str
    new: NewTask | None = None


@dataclass(frozen=True)
class Learn:
    """To a node: what one of the candidates it drafted came to."""

    task: str
    number: int
    seconds: float | None


@dataclass(frozen=True)
class End:
    """To a node: drop what is left of the run."""


@dataclass(frozen=True)
class Stop:
    """To a node: end every worker."""


ToNode = Begin | Work | Measure | Ask | Learn | End | Stop


@dataclass(frozen=True)
class Ready:
    """From a node: its workers stand.

    Args:
        capacity: how many candidates at a time keep them at work.
        searchers: how many tasks it can draft for at the same time.
        cores: how many it uses.
        text: one line about it for people.
        lacks: why it only builds; empty: it measures too.
    """

    capacity: int
    searchers: int
    cores: int
    text: str
    lacks: str = ""


@dataclass(frozen=True)
class Measured:
    """From a node: the result of a candidate, by its number."""

    id: int
    measurements: Mapping[int, Measurement]


@dataclass(frozen=True)
class Made:
    """From a node that only builds: the artifact of a candidate, by its number."""

    id: int
    artifact: Artifact


@dataclass(frozen=True)
class DraftRequest:
    """From a node: candidates of a task that nobody has begun with; none: its space is exhausted."""

    run: int
    task: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class SearchLost:
    """From a node: the search died on a task."""

    run: int
    task: str
    text: str


@dataclass(frozen=True)
class Gone:
    """From a node, or said of it: it works no more.

    `refused` tells a machine that cannot work for this run from one that something happened to;
    `can_build`: it could without its GPU.
    """

    text: str
    refused: bool = False
    can_build: bool = False


FromNode = Ready | Measured | Made | DraftRequest | SearchLost | Gone


@dataclass(frozen=True)
class Status:
    """What a node is doing, for the progress display."""

    builds: int = 0
    waiting_to_measure: int = 0
    slices: tuple[tuple[str, str | None], ...] = ()
    core_s: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Batch:
    """The answer to a poll."""

    messages: tuple[FromNode, ...]
    status: Status
