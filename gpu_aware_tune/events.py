"""What a tuning run tells its caller while it goes on; `progress.py` draws these, pipelines consume them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar


class Level(StrEnum):
    """How much a note matters."""

    INFO = "info"
    WARNING = "warning"


class StageName(StrEnum):
    """The stages of the main path, in their order."""

    MODEL = "model"
    KNEE = "knee"
    RECORDS = "records"
    CHECK = "check"
    SEARCH = "search"
    RETIME = "retime"
    LIBRARY = "library"
    VERIFY = "verify"


class Origin(StrEnum):
    """Where a candidate comes from."""

    BASELINE = "default"  # a baseline schedule
    SEED = "seed"  # records of other units or devices
    SEARCH = "search"
    UNSCHEDULED = "plain"  # plain loops, where nothing else ran


class StoppedBy(StrEnum):
    """Why a search ended."""

    TRIALS = "trials"
    TIME = "time"
    PATIENCE = "patience"
    SPACE = "space"
    INTERRUPT = "interrupt"


@dataclass(frozen=True)
class Note:
    """One line worth reading once, such as a fall-back that was taken and why."""

    text: str
    level: Level = Level.INFO


@dataclass(frozen=True)
class Stage:
    """A stage of the main path begins."""

    name: StageName
    text: str


@dataclass(frozen=True)
class TaskPlan:
    """One task as the run sees it before the first trial.

    `known` counts the trials of earlier runs that the record store holds on all of the asked units.
    """

    name: str
    hash: str
    weight: int
    flops: float
    planned_trials: int
    known: int


@dataclass(frozen=True)
class Planned:
    """What will be done: tasks, shares (units really got) and the budget."""

    model: str
    device: str
    shares: tuple[str, ...]  # "30 % of 132 SMs = 32 SMs"
    units: tuple[int, ...]
    backend: str
    tasks: tuple[TaskPlan, ...]
    trials: int
    time_s: float | None
    dry_run: bool = False


@dataclass(frozen=True)
class Trial:
    """One candidate was built and measured (or failed) on every share asked for.

    `seconds` maps units to the kernel's seconds, None where that share stopped or failed.
    """

    task: str
    origin: Origin
    seconds: Mapping[int, float | None]
    failure: str | None = None


@dataclass(frozen=True)
class Progress:
    """The state of one model's run, sent after every batch of trials.

    Latencies are sums of weight x best kernel seconds over the tasks, per units. `failures`, builds
    and `slices` are of the whole run: each slice's name and the task it measures now, if any.
    """

    model: str
    elapsed_s: float
    trials_done: int
    trials_total: int
    trials_per_min: float
    untuned_s: Mapping[int, float]
    best_s: Mapping[int, float]
    failures: Mapping[str, int]
    eta_s: float | None
    builds_in_flight: int = 0
    waiting_to_measure: int = 0
    slices: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """One row of the closing table: a task on one share."""

    name: str
    units: int
    weight: int
    trials: int
    untuned_s: float | None
    tuned_s: float | None
    origin: Origin  # of the candidate that won


@dataclass(frozen=True)
class ShareResult:
    """Model latency on one share, before and after, measured as a whole library.

    `loss` is what one set of kernels for all shares costs here, as a part of the summed latency of
    the share's own kernels; None where each share has its own.
    """

    share: str
    units: int
    untuned_s: float | None
    tuned_s: float | None
    verified: bool
    max_error: float | None
    loss: float | None = None


@dataclass(frozen=True)
class Reordered:
    """How often measuring alone changed which kernel of a task is the best, and by how much.

    `regret` is what the kernel that looked best before would have cost on top of the best one, as a
    part of the latter: the largest of all tasks.
    """

    tasks: int  # measured again
    changed: int
    regret: float


@dataclass(frozen=True)
class Finished:
    """The run of one model is over and its library is on disk; one for each model.

    `core_seconds` says where the cores' time went in the whole run: search, build, measure, main,
    idle. `reordered` says how the order of kernels changed when they were measured again, alone.
    """

    model: str
    output: Path | None
    tasks: tuple[TaskResult, ...]
    shares: tuple[ShareResult, ...]
    trials: int
    elapsed_s: float
    interrupted: bool
    failures: Mapping[str, int] = field(default_factory=dict)
    core_seconds: Mapping[str, float] = field(default_factory=dict)
    stopped_by: StoppedBy = StoppedBy.TRIALS
    reordered: Reordered | None = None


Event = Note | Stage | Planned | Trial | Progress | Finished

Result = TypeVar("Result")


def result_of(stage: Generator[Event, None, Result]) -> Result:
    """Run a stage to its end, leave its events aside, and return what it returns."""
    while True:
        try:
            next(stage)
        except StopIteration as end:
            returned: Result = end.value
            return returned
