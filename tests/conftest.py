"""What all tiers share: the command line as a subprocess, and the models of the onnx wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RunTune = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run_tune() -> RunTune:
    """Runs `tune ARGS` as a process of its own, the way a user does."""

    def run(
        *args: str | Path,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *map(str, args)],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of processes that have the stand-in GPU."""
    import stand_in

    if lacks := stand_in.lacks():
        pytest.skip(f"the stand-in GPU cannot be built: {lacks}")
    return stand_in.build(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture(scope="session")
def light_model() -> Callable[[str], Path]:
    """Gives the path of a light model of the onnx wheel: `light_model("squeezenet")`."""
    import onnx

    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"

    def path(name: str) -> Path:
        found = folder / f"light_{name}.onnx"
        assert found.is_file(), f"the onnx wheel has no {found}"
        return found

    return path
