"""A stand-in for an NVIDIA GPU: CUDA's libraries, working on the CPU.

    device.c         the GPU: streams, memory, kernels, faults, MPS limits
    driver.c         libcuda            runtime.c        libcudart, as far as TVM uses it
    nvml.c           NVML               nvrtc.cpp        NVRTC: compiles with g++
    mps_control.py   MPS's control program, daemon and commands
    include/         what CUDA source means on a CPU

Everything above these is the real thing: cuda.bindings, pynvml, TVM's CUDA runtime and code
generator, and all of this package. Kernels run thread for thread, slowly; small models do.

    PYTHONPATH=tests python -m stand_in tune model.onnx --gpu-pct 30     # any command
    STAND_IN_MIG=1 PYTHONPATH=tests python -m stand_in tune doctor       # with MIG instances
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NEEDED = ("cc", "g++")


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


def build(folder: Path) -> dict[str, str]:
    """Build the libraries, and return the environment of a process that is to have this GPU.

    They lie where a wheel of NVIDIA's would put them, so that nothing has to know of them.
    """
    from gpu_aware_tune.codegen.cuda_toolchain import find_toolchain

    include = find_toolchain().root / "include"
    root = folder / "nvidia" / "cu13"
    libraries = root / "lib"
    libraries.mkdir(parents=True)
    for name in ("cuda_runtime.h", "cccl/cuda/std/cstdint", "crt/mma.h"):
        header = root / "include" / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text("")
    driver = libraries / "libcuda.so.1"
    flags = ["-w", "-O1", "-shared", "-fPIC", f"-I{include}"]
    _run("cc", *flags, "-Wl,-soname,libcuda.so.1", "-o", driver, HERE / "driver.c",
         HERE / "device.c", "-Wl,-z,defs", "-ldl", "-lpthread")  # fmt: skip
    _run("cc", *flags, "-Wl,-soname,libnvidia-ml.so.1", "-o", libraries / "libnvidia-ml.so.1",
         HERE / "nvml.c")  # fmt: skip
    versions = folder / "versions"
    versions.write_text("libcudart.so.13 { global: cuda*; local: *; };\n")
    _run("cc", *flags, "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={versions}",
         "-o", libraries / "libcudart.so.13", HERE / "runtime.c", driver)  # fmt: skip
    _run("g++", "-w", "-O1", "-shared", "-fPIC", "-Wl,-soname,libnvrtc.so.13",
         "-o", libraries / "libnvrtc.so.13", HERE / "nvrtc.cpp")  # fmt: skip
    control = folder / "nvidia-cuda-mps-control"
    control.write_text(f"#!{sys.executable}\n{(HERE / 'mps_control.py').read_text()}")
    control.chmod(0o755)
    python_path = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        "STAND_IN_INCLUDE": str(HERE / "include"),
    }


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)
