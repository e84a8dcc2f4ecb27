"""The small network, tuned for several sizes of its input once for all tests of a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import made_once
from small_network import write_network

from gpu_aware_tune.events import Finished
from gpu_aware_tune.run.jobs import make_jobs
from gpu_aware_tune.tuning import tune_jobs


def tuned_once(
    factory: pytest.TempPathFactory, name: str, network: Mapping[str, Any], **options: Any
) -> tuple[Path, list[Finished]]:
    """A folder with `net.onnx`, `net.tuned` and `db`, and what the runs came to; see `made_once`."""

    def make(folder: Path) -> list[Finished]:
        job = make_jobs(
            [write_network(folder / "net.onnx", **network)],
            target="llvm", effort="quick", trials=4,
            output=folder / "net.tuned", db=folder / "db", **options,
        )  # fmt: skip
        return [event for event in tune_jobs(job) if isinstance(event, Finished)]

    return made_once(factory, name, make)
