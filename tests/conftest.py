"""What all tiers share: the command line as a subprocess, and the models of the onnx wheel."""

from __future__ import annotations

import fcntl
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mock_gpu.in_process import MockGpu
    from serve_fleet import Oracle

ROOT = Path(__file__).parent.parent

RunTune = Callable[..., "subprocess.CompletedProcess[str]"]


def made_once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]
) -> tuple[Path, Any]:
    """A folder that the tests of all of pytest-xdist's workers share, made by the first that needs it.

    Args:
        factory: pytest's.
        name: of the folder.
        make: fills it; what it returns is pickled.

    Returns:
        The folder, and what `make` returned.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    answer = folder.with_suffix(".pickle")
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answer.exists():
            answer.write_bytes(pickle.dumps(make(folder)))
    return folder, pickle.loads(answer.read_bytes())


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
def mock_gpu() -> Mapping[str, str]:
    """The environment of processes that have the mock GPU."""
    import mock_gpu

    if lacks := mock_gpu.lacks():
        pytest.skip(f"the mock GPU cannot be built: {lacks}")
    return mock_gpu.environment()


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch) -> MockGpu:
    """The mock GPU in this process."""
    from mock_gpu.in_process import MockGpu

    return MockGpu(monkeypatch)


@pytest.fixture
def mps_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mock's MPS control program on the PATH."""
    from mock_gpu import write_control

    write_control(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Tuned folders to serve: one model at batch sizes 1 and 4. Nobody changes them."""
    from serve_fleet import write_folder

    root = tmp_path_factory.mktemp("serve")
    return write_folder(root / "one"), write_folder(root / "four", batch=4)


@pytest.fixture(scope="session")
def oracle(folders: tuple[Path, Path]) -> Oracle:
    """What the model of `folders` must answer."""
    from serve_fleet import Oracle

    return Oracle(folders[0])


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
