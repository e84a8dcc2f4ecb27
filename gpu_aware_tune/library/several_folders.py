"""A library whose folder holds further folders, with code for other sizes of the inputs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from gpu_aware_tune.library.checks import check_versions
from gpu_aware_tune.library.loaded import Library
from gpu_aware_tune.library.manifest import Manifest, read_manifest


class SeveralFolders(Library):
    """What libraries of several batch sizes or shapes have in common.

    `use` and `preload` are for all sizes, `benchmark` for the first one. The code of a further size is
    opened when it is used, with the first one's threads and, where equal, weights.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        units: int | None,
        partition: str | None,
        further: Sequence[Path],
    ) -> None:
        """Open the first size for a share; `further` are the other sizes' folders."""
        super().__init__(path, manifest, units, partition)
        self._further = tuple(further)
        self._units_asked = units
        self._opened: dict[Path, Library] = {}
        self._opening = threading.Lock()

    def use(self, units: int | None = None) -> Library:
        """Switch to the code for a share, at every size; see `Library.use`."""
        super().use(units)
        with self._opening:
            self._units_asked = units
            for library in self._opened.values():
                library.use(units)
        return self

    def preload(self) -> Library:
        """Open the code of every share and size; see `Library.preload`."""
        super().preload()
        for folder in self._further:
            self._at(folder).preload()
        return self

    def close(self) -> None:
        """End the threads; see `Library.close`."""
        with self._opening:
            for library in self._opened.values():
                library.close()
        super().close()

    def _at(self, folder: Path) -> Library:
        """The library of a further size."""
        with self._opening:
            self._check_open()
            if folder not in self._opened:
                manifest = read_manifest(folder)
                check_versions(folder, manifest)
                self._opened[folder] = Library(
                    folder, manifest, self._units_asked, self._partition, beside=self
                )
            return self._opened[folder]
