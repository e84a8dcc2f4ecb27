"""What every partition backend offers, and nothing about how it is done."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Protocol

from gpu_aware_tune.partition.shares import Share


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used on this machine, and why (not)."""

    backend: str
    ok: bool
    reason: str


class LaunchTimer(Protocol):
    """Times launches on one share; `partition.timer.StreamTimer` is the one for GPUs."""

    @property
    def kind(self) -> str:
        """How the last samples came about: "events" or "graph"."""

    def __call__(self, number: int, repeat: int) -> list[float]:
        """Seconds of one launch, `repeat` times measured over `number` launches."""

    def close(self) -> None:
        """Give back what it holds."""


class Partition(ABC):
    """A share made real. The parent opens it and pickles it to the measuring worker, which enters
    and verifies it.

    The order of calls in the worker process: environment `env()` set, then `enter_worker()` once
    before TVM runs anything, `verify()`, then any number of `with partition.timing_context():
    launch` and `sync()`, then `close()`. All of them on one thread, since TVM keeps both its
    current stream and its thread pool per thread. Partitions with `one_worker=True` may be entered
    side by side in one process; `timing_context()` switches.
    """

    backend: ClassVar[str]
    one_worker: ClassVar[bool] = True
    # Workers of several partitions would take turns on the device, so that slices need one worker.
    slices_share_worker: ClassVar[bool] = False
    faults_last: ClassVar[bool] = False  # an error may leave the worker's process unusable
    cores: tuple[int, ...] = ()  # logical CPUs bound to; empty where no core is
    tvm_device: str = "cpu"  # tvm.device(tvm_device, ordinal) in the worker
    ordinal: int = 0  # the number by which the worker process knows the device

    def __init__(self, share: Share) -> None:
        self.share = share
        # In the parent: what has to be replaced together when one worker's fault ends the others.
        self.fault_group: list[Any] = []

    @property
    def stream(self) -> int | None:
        """The raw CUDA stream that launches must use, None where the default one is right."""
        return None

    def env(self) -> dict[str, str]:
        """Variables the worker needs before it starts or, if forked, before it uses the device."""
        return {}

    @abstractmethod
    def enter_worker(self) -> None:
        """Make the share real in this process; raises `SetupError` where that fails."""

    @abstractmethod
    def verify(self) -> None:
        """Raise `SetupError` when what this process got is not what `share` promises."""

    def timing_context(self) -> contextlib.AbstractContextManager[object]:
        """Everything launched inside runs on this share."""
        return contextlib.nullcontext()

    def sync(self) -> None:  # noqa: B027 - nothing to wait for on a CPU
        """Wait until everything launched on this share is done."""

    def launch_timer(self, launch: Callable[[], object], cold: bool = False) -> LaunchTimer | None:
        """A timer for launches on this share; None where TVM's own is right."""
        return None

    def sentinel_s(self) -> float | None:
        """Seconds of a fixed kernel on this share now; None where there is none."""
        return None

    def evidence(self) -> dict[str, Any]:
        """What `verify` saw, for the run's records."""
        return {"backend": self.backend, "units": self.share.units}

    def units_seen(self) -> Collection[int]:
        """The numbers of the units that `verify` saw; empty where units have none."""
        return self.cores

    def before_kill(self, pid: int) -> None:  # noqa: B027 - most backends need nothing
        """In the parent: prepare for the end of a worker that hangs."""

    def close(self) -> None:  # noqa: B027 - some backends hold nothing
        """Put back whatever this process changed; safe to call twice."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "fault_group": []}

    def __enter__(self) -> Partition:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.share.describe()})"
