"""TVM beside torch, and the toolkit's wheels in a folder that PYTHONPATH names, as on a GPU machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from gpu_aware_tune.codegen.build_pool import serve
from gpu_aware_tune.codegen.cuda_toolchain import find_toolchain
from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.workers import WorkerHost, pool

TORCH = """
import pathlib
class cuda:
    class Stream: pass
    @staticmethod
    def is_available():
        pathlib.Path(__file__).with_name("asked").touch()  # the real one calls cuInit here
        return False
class Tensor:
    __dlpack_c_exchange_api__ = None
class dtype: pass
from . import version
"""


COMPILE = """
from gpu_aware_tune.codegen.cuda_toolchain import compile_cubin, find_toolchain
assert compile_cubin('extern "C" __global__ void k(float *p) { *p = 1; }', "sm_90a")[1:4] == b"ELF"
print(find_toolchain().root)
"""


def write_torch(folder: Path) -> Path:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(TORCH)
    (folder / "torch" / "version.py").write_text("cuda = '13.0'\n")
    return folder / "torch" / "asked"


def python(program: str, path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    env.pop("TVM_FFI_DISABLE_TORCH_C_DLPACK", None)
    return subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )


def test_a_worker_host_does_not_start_cuda_through_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA that is started before the fork is of no use to any worker."""
    asked = write_torch(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("TVM_FFI_DISABLE_TORCH_C_DLPACK", raising=False)
    with WorkerHost() as host:
        worker = host.spawn(serve, {"kind": "llvm"})
        worker.kill()
    assert not asked.exists()


@pytest.mark.parametrize("flags", [0, os.ST_NOEXEC])
def test_artifacts_lie_where_they_can_be_loaded_from(
    monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    """Docker's /dev/shm may be large, and does not let libraries be loaded."""
    monkeypatch.setattr(
        os, "statvfs", lambda _: SimpleNamespace(f_flag=flags, f_bavail=1 << 20, f_frsize=1 << 12)
    )
    folder = pool._scratch_folder()
    folder.rmdir()
    assert folder.is_relative_to("/dev/shm") is (flags == 0)


def test_torch_can_be_imported_afterwards(tmp_path: Path) -> None:
    asked = write_torch(tmp_path)
    done = python(
        "from gpu_aware_tune.workers.warm import load_tvm; load_tvm(); import sys\n"
        "assert 'torch' not in sys.modules; import torch; torch.cuda.is_available()",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert asked.exists(), "the stand-in for torch was not imported"


def test_the_toolkit_is_found_where_only_pythonpath_says() -> None:
    """The bindings themselves look into the interpreter's own site-packages only."""
    try:
        site = find_toolchain().root.parents[1]
    except SetupError as error:
        pytest.skip(str(error))
    bare = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    if sys.prefix == sys.base_prefix or not bare.exists():
        pytest.skip("this interpreter's site-packages are its own")
    env = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [bare, "-c", COMPILE],
        env={**env, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(site / "nvidia" / "cu13"), done.stderr[-2000:]
