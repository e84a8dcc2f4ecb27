"""Where a loaded library runs for so many units: which thread, on which cores or SMs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import cast

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.manifest import Manifest
from gpu_aware_tune.library.threads import CoreThread, PartitionThread
from gpu_aware_tune.partition import Partition, attach, partition_for
from gpu_aware_tune.partition.topology import allowed_cpus, usable_cores


class CorePlaces:
    """A thread for each set of cores that was asked for."""

    def __init__(self) -> None:
        self._threads: dict[tuple[int, ...], CoreThread] = {}
        self._cores: dict[tuple[frozenset[int], int], tuple[int, ...]] = {}

    def thread_for(self, units: int) -> CoreThread:
        """The thread on so many of the first cores, or on all that may be used."""
        key = (allowed_cpus(), units)  # what may be used is looked up anew only where this changes
        if key not in self._cores:
            self._cores[key] = usable_cores()[:units]
        cores = self._cores[key]
        if cores not in self._threads:
            self._threads[cores] = CoreThread(len(cores), cores)
        return self._threads[cores]

    def stop(self) -> None:
        """End the threads after what they have been given."""
        for thread in self._threads.values():
            thread.stop()

    def close(self) -> None:
        """End the threads after what they have been given, and wait for that."""
        self.stop()
        for thread in self._threads.values():
            thread.join()


class PartitionPlaces:
    """A thread for each partition of a GPU that was asked for.

    Green contexts can be opened at any time, one for each number of SMs. An MPS limit and a MIG
    instance are this process's own for good: there is one partition, whatever is asked for later.

    Args:
        manifest: of the library's folder.
        backend: of the partitions, in place of the manifest's.
    """

    def __init__(self, manifest: Manifest, backend: str | None = None) -> None:
        self._manifest = manifest
        self._backend = backend or manifest.backend or "full"
        self._visible: int | None = None
        self._threads: dict[int | None, PartitionThread] = {}

    def thread_for(self, units: int) -> PartitionThread:
        """The thread inside a partition of so many SMs, or of all that are visible.

        Raises:
            UserError: the backend is unknown, or has no partition of so many SMs.
            SetupError: no GPU is here, or this process would have to be started differently.
        """
        if self._threads and self._backend not in attach.IN_PROCESS:
            return next(iter(self._threads.values()))
        sms = None if self._backend == "full" else self._at_most_visible(units)
        if sms not in self._threads:
            opening = functools.partial(_open, self._manifest, sms, self._backend)
            self._threads[sms] = PartitionThread(opening)
        return self._threads[sms]

    def stop(self) -> None:
        """End the threads after what they have been given."""
        for thread in self._threads.values():
            thread.stop()

    def close(self) -> None:
        """End the threads and wait until the partitions are closed."""
        self.stop()
        for thread in self._threads.values():
            thread.join()

    def _at_most_visible(self, units: int) -> int:
        if self._visible is None:
            self._visible = attach.visible_sm_count()
        return min(units, self._visible or units)  # 0 without a GPU, which opening tells


def places_for(path: Path, manifest: Manifest, backend: str | None) -> CorePlaces | PartitionPlaces:
    """Where the library of a folder can run.

    Raises:
        UserError: a GPU's backend is asked for and the library is for a CPU.
    """
    if not manifest.on_cpu:
        return PartitionPlaces(manifest, backend)
    if backend not in (None, "cores"):
        raise UserError(f"partition {backend!r} is for GPUs, and {path} is for a CPU: leave it out")
    return CorePlaces()


def _open(manifest: Manifest, sms: int | None, backend: str) -> Partition:
    about = {"device": manifest.device, "backend": manifest.backend}
    return cast("Partition", partition_for(about, sms, backend))  # None for a CPU's alone
