"""The device a model is tuned for: a GPU, this machine's CPU, or a GPU that is elsewhere."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.partition.gpu_query import GpuFacts, granularity, query_gpus
from gpu_aware_tune.partition.topology import usable_cores

TARGETS = ("auto", "cuda", "llvm")

# SMs of the usual card of an architecture: what a share comes to when kernels are only built, on a
# machine without the card. A device that is here is always asked instead.
NOMINAL_SMS: Mapping[str, int] = MappingProxyType(
    {
        "sm_75": 40,
        "sm_80": 108,
        "sm_86": 84,
        "sm_89": 142,
        "sm_90": 132,
        "sm_90a": 132,
        "sm_100a": 148,
        "sm_103a": 160,
        "sm_120a": 188,
    }
)

NEEDS_GPU = "measuring needs an NVIDIA GPU and none is usable here"


@dataclass(frozen=True)
class Device:
    """One thing that kernels run on; `units_total` counts its cores or SMs.

    A device with `measurable=False` is known by its architecture only: kernels can be built for it,
    not timed.
    """

    kind: str  # "llvm", "cuda", or "null" in tests
    index: int
    name: str
    arch: str  # "znver4", "sm_90a"
    units_total: int
    unit: str  # "core" or "SM"
    uuid: str = ""
    unit_min: int = 1  # smallest share a GPU's split can give
    unit_step: int = 1  # granularity of that split
    measurable: bool = True
    max_threads: int = 1024  # of a block; these four of GPUs only
    shared_bytes: int = 49152  # of a block that does not opt in to more
    registers: int = 65536
    warp_size: int = 32

    @property
    def key(self) -> str:
        """The device column of a record: what two machines must have in common to share numbers."""
        return "/".join(part.replace("/", "-") for part in (self.kind, self.name, self.arch))

    def target(self, units: int) -> dict[str, Any]:
        """The JSON of a `tvm.target.Target` for `units` units of this device.

        No host is named: a record's target must not change with the CPU a GPU happens to sit next
        to.
        """
        if self.kind != "cuda":
            target: dict[str, Any] = {"kind": "llvm", "num-cores": units}
            return target if self.kind == "null" else {**target, "mcpu": self.arch}
        return {
            "kind": "cuda",
            "arch": self.arch,
            "max_num_threads": self.max_threads,
            "max_threads_per_block": self.max_threads,
            "thread_warp_size": self.warp_size,
            "registers_per_block": self.registers,
            # What a kernel gets without opting in: TVM's shared buffers are static ones.
            "max_shared_memory_per_block": self.shared_bytes,
        }

    def require_measurable(self) -> None:
        """Raise a `SetupError` saying what is missing where kernels cannot be timed."""
        if not self.measurable:
            raise SetupError(
                f"{NEEDS_GPU}: kernels for {self.arch} can be built on this machine but not timed; "
                "run where the GPU is, add --dry-run, or tune for the CPU with --target llvm"
            )


def find_device(target: str, index: int, arch: str | None) -> tuple[Device, str | None]:
    """Find the device asked for, and one line worth telling where `auto` fell back to the CPU."""
    if target == "null":  # the fake device of the tests; not offered to users
        return Device("null", 0, "null", "null", 10, "core"), None
    if target not in TARGETS:
        raise UserError(f"--target {target!r} is not known; allowed: {', '.join(TARGETS)}")
    if target == "llvm":
        return _cpu(index, arch), None
    if target == "cuda":
        return _gpu(index, arch), None
    gpus, reason = query_gpus()
    if gpus or (arch or "").startswith("sm_"):
        return _gpu(index, arch), None
    device = _cpu(index, arch)
    cores = f"{device.units_total} core{'s' if device.units_total > 1 else ''}"
    return (
        device,
        f"no NVIDIA GPU is usable ({reason}): tuning for the CPU, {cores} of {device.name}",
    )


@functools.cache
def host_mcpu() -> str:
    """LLVM's name for this machine's CPU; imports TVM."""
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def _cpu(index: int, arch: str | None) -> Device:
    if index != 0:
        raise UserError(f"--device {index}: the CPU is one device, number 0")
    if arch is not None:
        _check_mcpu(arch)
    cores = len(usable_cores())
    return Device("llvm", 0, cpu_name(), arch or host_mcpu(), cores, "core")


def _check_mcpu(arch: str) -> None:
    from tvm.target import Target, codegen

    known = sorted(str(name) for name in codegen.llvm_get_cpu_archlist(Target("llvm")))
    if arch not in known:
        near = [name for name in known if name[:4] == arch[:4]] or [host_mcpu()]
        raise UserError(
            f"--arch {arch!r} is not a CPU that LLVM knows; near it: {', '.join(near[:8])}; "
            f"this machine is {host_mcpu()} (the default)"
        )


def _gpu(index: int, arch: str | None) -> Device:
    if arch is not None and not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
        raise UserError(
            f"--arch {arch!r} is not a CUDA architecture; allowed: {', '.join(NOMINAL_SMS)}"
        )
    gpus, reason = query_gpus()
    if not gpus:
        return _absent_gpu(index, arch, reason)
    if not 0 <= index < len(gpus):
        numbers = ", ".join(str(gpu.index) for gpu in gpus)
        raise UserError(f"--device {index}: this machine's GPUs are {numbers}")
    gpu = gpus[index]
    if arch is not None and arch.rstrip("af") != gpu.arch.rstrip("af"):
        raise UserError(f"--arch {arch}: GPU {index} ({gpu.name}) is {gpu.arch}; leave --arch out")
    return from_facts(gpu, arch)


def _absent_gpu(index: int, arch: str | None, reason: str) -> Device:
    if arch is None:
        raise SetupError(
            f"no NVIDIA GPU is usable ({reason}); use --target llvm to tune for the CPU, or give "
            "--arch sm_90a to build kernels for a GPU that is elsewhere"
        )
    if arch not in NOMINAL_SMS:
        raise UserError(
            f"--arch {arch!r} cannot be built for without its GPU; "
            f"allowed: {', '.join(NOMINAL_SMS)}"
        )
    least, step = granularity(None, int(re.sub(r"\D", "", arch)) // 10)
    return Device(
        kind="cuda",
        index=index,
        name=f"absent {arch}",
        arch=arch,
        units_total=NOMINAL_SMS[arch],
        unit="SM",
        unit_min=least,
        unit_step=step,
        measurable=False,
    )


def from_facts(gpu: GpuFacts, arch: str | None = None) -> Device:
    """The `Device` of a GPU whose facts were read from its driver."""
    return Device(
        kind="cuda",
        index=gpu.index,
        name=gpu.name,
        arch=arch or gpu.arch,
        units_total=gpu.sm_count,
        unit="SM",
        uuid=gpu.uuid,
        unit_min=gpu.sm_min,
        unit_step=gpu.sm_step,
        max_threads=gpu.max_threads,
        shared_bytes=gpu.shared_bytes,
        registers=gpu.registers,
        warp_size=gpu.warp_size,
    )


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's trade name, without core counts and clock rates: equal chips, equal names."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return "CPU"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found.group(1) if found else "CPU"
    name = re.sub(r"\((R|TM|tm|r)\)|@.*$|\b\d+-Core Processor\b|\bCPU\b|\bProcessor\b", " ", name)
    return " ".join(name.split()) or "CPU"
