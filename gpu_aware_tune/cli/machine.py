"""Facts about this machine that decide whether tuning works here, each with what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gpu_aware_tune.errors import SetupError, TuneError
from gpu_aware_tune.partition import cpu_quota
from gpu_aware_tune.partition.device import cpu_name
from gpu_aware_tune.partition.linking import find_compiler, find_linker

IMPORT_TIMEOUT_S = 120.0
MIN_SHM_MB = 64
MIN_DISK_MB = 1024


@dataclass(frozen=True)
class Check:
    """One fact; `status` is "ok", "info" (not needed), "warn", or "fail" (no tuning on a CPU)."""

    name: str
    status: str
    value: str
    fix: str = ""


def checks(db: Path) -> Iterator[Check]:
    """Gives every fact, the cheap ones first."""
    yield from _system()
    yield from _toolchain()
    yield from _packages()
    yield _tvm_starts()
    yield _cuda_compiler()
    yield from _partitions()
    yield from _storage(db)


def _system() -> Iterator[Check]:
    version = platform.python_version()
    if (3, 11) <= sys.version_info < (3, 14):
        yield Check("python", "ok", f"{version}, {sys.executable}")
    else:
        yield Check("python", "fail", version, "use Python 3.11, 3.12 or 3.13")
    yield Check("system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    allowed, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    shown = f"{cpu_name()}, {allowed} of {cores} cores usable"
    quota = cpu_quota()
    if quota is not None and quota < allowed:
        fix = "timings disturb each other beyond the quota: pin the process, e.g. with taskset"
        yield Check("cpu", "warn", f"{shown}, quota {quota:g} cores", fix)
    else:
        yield Check("cpu", "ok", shown)


def _toolchain() -> Iterator[Check]:
    try:
        name = find_compiler()
        yield Check("compiler", "ok", f"{name}: {_first_line(name, '--version')}")
    except SetupError as error:
        what, _, fix = str(error).partition(": ")
        yield Check("compiler", "fail", what, fix)
    try:
        (linker,) = find_linker(packs=True)
        yield Check("linker", "ok", f"{linker}: {_first_line(linker, '--version')}")
    except SetupError:
        yield Check("linker", "warn", "no ld: linking takes 20 ms, not 4", "install binutils")


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return (done.stdout or done.stderr).strip().splitlines()[0]


def installed(package: str) -> str | None:
    """Returns the installed version of a package, None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def required(package: str) -> str:
    """Returns the version our own metadata pins, "" where any version does."""
    for requirement in metadata.requires("gpu-aware-tune") or []:
        name, pinned, version = requirement.partition(";")[0].strip().partition("==")
        if name == package and pinned:
            return version.strip()
    return ""


def _packages() -> Iterator[Check]:
    yield package_check("apache-tvm", "the compiler")
    yield ffi_check(installed("apache-tvm"), installed("apache-tvm-ffi"))
    yield xgboost_check(installed("xgboost"), installed("xgboost-cpu"))
    for package, purpose in (
        ("numpy", "arrays"),
        ("onnx", "reads models"),
        ("onnxruntime", "folds models, checks results"),
    ):
        yield package_check(package, purpose)


def package_check(package: str, purpose: str) -> Check:
    """Says whether a needed package is there in the version that was tested."""
    version, pin = installed(package), _pin_or_none(package)
    install = f"pip install {package}" + (f"=={pin}" if pin else "")
    if version is None:
        return Check(package, "fail", f"not installed ({purpose})", install)
    if pin and version != pin:
        return Check(package, "warn", f"{version}, tested with {pin}", install)
    return Check(package, "ok", version)


def _pin_or_none(package: str) -> str | None:
    try:
        return required(package) or None
    except metadata.PackageNotFoundError:
        return None  # run from a checkout that is not installed


def ffi_check(tvm: str | None, ffi: str | None) -> Check:
    """Knows the pair of versions that crashes on import."""
    if ffi is None:
        return package_check("apache-tvm-ffi", "TVM's calls from Python")
    if (tvm or "").startswith("0.27.") and ffi.startswith("0.1.15"):
        fix = "pip install apache-tvm-ffi==0.1.14.post1"
        return Check("apache-tvm-ffi", "fail", f"{ffi} crashes with TVM {tvm}", fix)
    return package_check("apache-tvm-ffi", "TVM's calls from Python")


def xgboost_check(full: str | None, cpu: str | None) -> Check:
    """Knows that two distributions give the same module, and that one is needlessly large."""
    if full and cpu:
        fix = "pip uninstall -y xgboost xgboost-cpu && pip install xgboost-cpu"
        return Check("xgboost", "warn", f"xgboost {full} and xgboost-cpu {cpu} overlap", fix)
    if cpu:
        return Check("xgboost", "ok", f"xgboost-cpu {cpu}")
    if full:
        fix = "optional: xgboost-cpu does the same without 350 MB of NCCL"
        return Check("xgboost", "ok", f"xgboost {full}", fix)
    return Check("xgboost", "fail", "not installed (the cost model)", "pip install xgboost-cpu")


def _tvm_starts() -> Check:
    """Imports TVM in a process of its own: versions that clash end in a crash, not in an error."""
    program = "import tvm; tvm.target.Target('llvm'); print(tvm.__version__)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=IMPORT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Check("tvm starts", "fail", f"no answer in {IMPORT_TIMEOUT_S:g} s", "see the load")
    if done.returncode == 0:
        return Check("tvm starts", "ok", f"version {done.stdout.strip()} with LLVM")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    fix = "pip install --force-reinstall the versions that `pip install gpu-aware-tune` asks for"
    return Check("tvm starts", "fail", last[:200], fix)


def _cuda_compiler() -> Check:
    from gpu_aware_tune.codegen.cuda_toolchain import find_toolchain

    try:
        found = find_toolchain()
    except SetupError as error:
        what, _, fix = str(error).rpartition(": ")
        return Check("cuda compiler", "info", what, f"to compile for NVIDIA GPUs: {fix}")
    return Check("cuda compiler", "ok", f"NVRTC {'.'.join(map(str, found.version))}, {found.root}")


def _partitions() -> Iterator[Check]:
    from gpu_aware_tune.partition import find_device, probe_backends

    try:
        device, note = find_device("auto", 0, None)
        yield Check(
            "device", "ok", f"{device.name}, {device.units_total} {device.unit}s", note or ""
        )
    except TuneError as error:
        what, _, fix = str(error).partition(": ")
        yield Check("device", "fail", what, fix)
    for found in probe_backends():
        yield Check(f"partition {found.backend}", "ok" if found.ok else "info", found.reason)


def _storage(db: Path) -> Iterator[Check]:
    shm = Path("/dev/shm")
    if shm.is_dir():
        enough = _free_mb(shm) >= MIN_SHM_MB
        fix = "" if enough else "give the container more, e.g. docker run --shm-size=1g"
        yield Check("/dev/shm", "ok" if enough else "warn", f"{_free_mb(shm)} MB free", fix)
    else:
        yield Check("/dev/shm", "warn", "missing: artifacts go to disk", "mount a tmpfs there")
    for name, folder in (("temporary files", Path(tempfile.gettempdir())), ("records", db)):
        yield folder_check(name, folder)


def folder_check(name: str, folder: Path) -> Check:
    """Says whether a folder can be written and has room."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".tune-", dir=existing):
            free_mb = _free_mb(existing)
    except OSError as error:
        fix = "give another folder with --db" if name == "records" else "set TMPDIR"
        return Check(name, "fail", f"{folder}: {error.strerror}", fix)
    if free_mb < MIN_DISK_MB:
        return Check(name, "warn", f"{folder}: {free_mb} MB free", "free some space")
    return Check(name, "ok", f"{folder}: {free_mb} MB free")


def _free_mb(folder: Path) -> int:
    return shutil.disk_usage(folder).free >> 20
