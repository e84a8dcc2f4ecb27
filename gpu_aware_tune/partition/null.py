"""A partition that is none: it keeps the rules of the others and touches nothing; for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import ClassVar

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.base import Partition
from gpu_aware_tune.partition.shares import Share


class NullPartition(Partition):
    """Counts what is asked of it.

    Args:
        share: what it stands for.
        verified_units: another number than the share's makes `verify` refuse.
        seen: the numbers of its units.
    """

    backend: ClassVar[str] = "null"

    def __init__(
        self, share: Share, verified_units: int | None = None, seen: Collection[int] = ()
    ) -> None:
        super().__init__(share)
        self._seen = tuple(seen)
        self.calls: list[str] = []
        self._verified_units = share.units if verified_units is None else verified_units
        self._inside = False

    def env(self) -> dict[str, str]:
        """Names the units, so that a worker's environment can be looked at."""
        return {"GPU_AWARE_TUNE_NULL_UNITS": str(self.share.units)}

    def enter_worker(self) -> None:
        """Note that it was entered."""
        self._inside = True
        self.calls.append("enter_worker")

    def verify(self) -> None:
        """Refuse when told to at construction."""
        self._check_inside()
        self.calls.append("verify")
        if self._verified_units != self.share.units:
            raise SetupError(f"{self._verified_units} units where {self.share.units} were promised")

    def units_seen(self) -> tuple[int, ...]:
        """What it was told at construction."""
        return self._seen

    @contextlib.contextmanager
    def timing_context(self) -> Iterator[None]:
        """Note that something was launched."""
        self._check_inside()
        self.calls.append("timing")
        yield

    def sync(self) -> None:
        """Note that it was waited for."""
        self._check_inside()
        self.calls.append("sync")

    def close(self) -> None:
        """Note that it was left."""
        if self._inside:
            self.calls.append("close")
        self._inside = False

    def _check_inside(self) -> None:
        if not self._inside:
            raise SetupError(
                "this process has not entered the partition: call enter_worker() first"
            )
