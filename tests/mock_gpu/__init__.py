"""A mock of an NVIDIA GPU: CUDA's libraries, working on the CPU.

    device.h         what can be made wrong with it, by variables of the environment
    device.c         the GPU: streams, memory, kernels, faults, MPS limits
    driver.c         libcuda            runtime.c        libcudart, as far as TVM uses it
    nvml.c           NVML               nvrtc.cpp        NVRTC: compiles with g++
    mps_control.py   MPS's control program, daemon and commands
    include/         what CUDA source means on a CPU
    in_process.py    libcuda and NVML in the process of a test, which sets the variables as it goes
    devices.py       devices and partitions of tests that touch no GPU

Everything above these is the real thing: cuda.bindings, pynvml, TVM's CUDA runtime and code
generator, and all of this package. Kernels run thread for thread, slowly; small models do.

    PYTHONPATH=tests python -m mock_gpu tune model.onnx --gpu-pct 30     # any command
    MOCK_GPU_MIG=32,60 PYTHONPATH=tests python -m mock_gpu tune doctor   # with MIG instances
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NEEDED = ("cc", "g++")
_SOURCES = ("device.h", "device.c", "driver.c", "runtime.c", "nvml.c", "nvrtc.cpp")
_CONTROL = "nvidia-cuda-mps-control"


def lacks() -> str:
    """What is missing to build it, or an empty text."""
    from gpu_aware_tune.codegen.cuda_toolchain import find_toolchain
    from gpu_aware_tune.errors import SetupError

    try:
        find_toolchain()  # its headers declare what the libraries define
    except SetupError as error:
        return str(error)
    if platform.machine() != "x86_64":
        return f"it is written for x86_64, not {platform.machine()}"
    return ", ".join(f"{name} is missing" for name in NEEDED if shutil.which(name) is None)


def build() -> Path:
    """Build the libraries, once for each state of their sources, and return their folder.

    They lie where a wheel of NVIDIA's would put them, so that nothing has to know of them.
    """
    text = b"".join((HERE / name).read_bytes() for name in (*_SOURCES, "__init__.py"))
    name = f"mock-gpu-{os.getuid()}-{hashlib.sha256(text).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    if folder.is_dir() and folder.stat().st_uid == os.getuid():
        return folder
    fresh = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    try:
        _build(fresh)
        fresh.rename(folder)
    except OSError:  # another process was faster
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def environment() -> dict[str, str]:
    """The environment of a process that is to have this GPU."""
    folder = build()
    write_control(folder)
    python_path = [str(folder), str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "MOCK_GPU": "1",
        "MOCK_GPU_INCLUDE": str(HERE / "include"),
        "LD_LIBRARY_PATH": str(libraries(folder)),
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
    }


def libraries(folder: Path) -> Path:
    """Where the libraries of a build lie."""
    return folder / "nvidia" / "cu13" / "lib"


def write_control(folder: Path) -> Path:
    """Write MPS's control program, for this interpreter, into a folder that is on the PATH."""
    program = folder / _CONTROL
    fresh = folder / f"{_CONTROL}.{os.getpid()}"
    fresh.write_text(f"#!{sys.executable}\n{(HERE / 'mps_control.py').read_text()}")
    fresh.chmod(0o755)
    fresh.replace(program)
    return program


def _build(folder: Path) -> None:
    from gpu_aware_tune.codegen.cuda_toolchain import find_toolchain

    include = find_toolchain().root / "include"
    root = folder / "nvidia" / "cu13"
    target = libraries(folder)
    target.mkdir(parents=True)
    for name in ("cuda_runtime.h", "cccl/cuda/std/cstdint", "crt/mma.h"):
        header = root / "include" / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text("")
    driver = target / "libcuda.so.1"
    flags = ["-w", "-O1", "-shared", "-fPIC", f"-I{include}"]
    _run("cc", *flags, "-Wl,-soname,libcuda.so.1", "-o", driver, HERE / "driver.c",
         HERE / "device.c", "-Wl,-z,defs", "-ldl", "-lpthread")  # fmt: skip
    _run("cc", *flags, "-Wl,-soname,libnvidia-ml.so.1", "-o", target / "libnvidia-ml.so.1",
         HERE / "nvml.c")  # fmt: skip
    versions = folder / "versions"
    versions.write_text("libcudart.so.13 { global: cuda*; local: *; };\n")
    _run("cc", *flags, "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={versions}",
         "-o", target / "libcudart.so.13", HERE / "runtime.c", driver)  # fmt: skip
    _run("g++", "-w", "-O1", "-shared", "-fPIC", "-Wl,-soname,libnvrtc.so.13",
         "-o", target / "libnvrtc.so.13", HERE / "nvrtc.cpp")  # fmt: skip


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)
