"""Which backends there are, which one a run uses and why, and opening partitions with it.

A new backend is a subclass of `Partition` (for GPUs of `GpuPartition`) in a module of its own, one entry
in `_BACKENDS`, its name in `settings.PARTITIONS` and, if it has `open_slices`, in `SIDE_BY_SIDE`; to load
libraries in it, `attach.py`. Tests fail where one of them is missing.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu_aware_tune.errors import SetupError, TuneError, UserError
from gpu_aware_tune.partition import cores, green, mig, mps
from gpu_aware_tune.partition.base import Availability, Partition
from gpu_aware_tune.partition.device import Device
from gpu_aware_tune.partition.full import FullPartition
from gpu_aware_tune.partition.gpu_query import query_gpus
from gpu_aware_tune.partition.null import NullPartition
from gpu_aware_tune.partition.shares import (
    Share,
    check_percent,
    core_units,
    green_units,
    mps_units,
)
from gpu_aware_tune.partition.topology import usable_cores

Shares = Sequence[Share]


@dataclass(frozen=True)
class Backend:
    """One way to make shares of a device real.

    Args:
        kind: of device that it is for.
        probe: GPU number -> one phrase for what it offers here; raises `TuneError` with the reason
            where it cannot be had.
        units: (percent, device) -> the units that such a share comes to.
        open: (shares, disjoint) -> a partition for each; `disjoint`: no unit in common.
        open_slices: (shares of each slice, largest first) -> a partition for each, slices without a
            common unit; None where two slices cannot be measured at the same time.
    """

    kind: str
    probe: Callable[[int], str]
    units: Callable[[int, Device], int]
    open: Callable[[Shares, bool], Sequence[Partition]]
    open_slices: Callable[[Sequence[Shares]], Sequence[Sequence[Partition]]] | None = None


def probe_backends(index: int = 0) -> list[Availability]:
    """What each backend says about this machine, GPU number `index`; never raises."""
    return [_probe(backend, index) for backend in BACKENDS]


def choose_backend(
    device: Device,
    wanted: str = "auto",
    percents: Sequence[int] = (100,),
    side_by_side: bool = False,
) -> tuple[str, str]:
    """The backend to use on `device` and one phrase saying why; raises when it cannot be had.

    Args:
        device: where the shares are.
        wanted: one of `BACKENDS`, or "auto".
        percents: the shares.
        side_by_side: `auto` prefers a backend whose shares can be measured at the same time.
    """
    allowed = [name for name, backend in _BACKENDS.items() if backend.kind == device.kind]
    if wanted != "auto":
        if wanted not in allowed:
            raise UserError(
                f"--partition {wanted!r} does not fit {device.name}; "
                f"allowed: auto, {', '.join(allowed)}"
            )
        if not device.measurable:
            return wanted, "asked for; not opened without the GPU"
        _require(wanted, device.index)
        return wanted, "asked for"
    if len(allowed) == 1:
        return allowed[0], "the only one for this device"
    if not device.measurable:
        return "green", "what a GPU would use"
    if all(percent == 100 for percent in percents):
        return "full", "the whole GPU needs no partition"
    found = [check for check in probe_backends(device.index) if check.backend in allowed]
    usable = [check for check in found if check.ok and check.backend != "full"]
    if not usable:
        reasons = "; ".join(f"{check.backend}: {check.reason}" for check in found if not check.ok)
        raise SetupError(f"no partition backend works on {device.name}: {reasons}")
    if side_by_side:
        usable.sort(key=lambda check: SIDE_BY_SIDE.index(check.backend))
    return usable[0].backend, f"the best one available: {usable[0].reason}"


def share_of(device: Device, percent: int, backend: str = "auto") -> Share:
    """The share that `percent` of a device comes to under a backend (already chosen, or "auto")."""
    check_percent(percent)
    if backend == "auto":
        backend, _ = choose_backend(device, percents=(percent,))
    if backend not in _BACKENDS:
        raise UserError(
            f"--partition {backend!r} is not known; allowed: auto, {', '.join(BACKENDS)}"
        )
    return Share(percent, _BACKENDS[backend].units(percent, device), device)


def open_partitions(
    shares: Shares, device: Device, backend: str = "auto", *, disjoint: bool = False
) -> list[Partition]:
    """Open one partition for each share, in their order, all of one backend.

    Args:
        shares: what to open; they may overlap, being measured one after the other, unless
            `disjoint`.
        device: the device of all of them.
        backend: one of `BACKENDS`, or "auto".
        disjoint: the shares will be measured at the same time and must have no unit in common.

    Raises:
        UserError: the backend does not fit the device.
        SetupError: the backend or the device cannot be had here, with the reason.
    """
    device.require_measurable()
    backend, _ = choose_backend(device, backend, [share.percent for share in shares])
    return list(_BACKENDS[backend].open(shares, disjoint))


def open_slices(slices: Sequence[Shares], device: Device, backend: str) -> list[list[Partition]]:
    """Open disjoint slices of a device, and in each of them a partition for each of its shares.

    An MPS client is limited in how many SMs it uses, not in which: slices under MPS are disjoint as
    far as the driver spreads them, and the hashes in `Partition.evidence` tell.

    Args:
        slices: the shares of each slice, the largest first.
        device: the device of all of them.
        backend: one of `BACKENDS`, already chosen.

    Raises:
        SetupError: the slices do not fit, or cannot be had here.
    """
    if len(slices) == 1:
        return [open_partitions(slices[0], device, backend)]
    opened = _BACKENDS[backend].open_slices
    if opened is None:
        raise SetupError(f"backend {backend} cannot measure several slices at the same time")
    device.require_measurable()
    return [list(own) for own in opened(slices)]


def check_disjoint(slices: Sequence[Sequence[Partition]]) -> bool:
    """Whether all slices tell which units they run on; call it after `Partition.verify`.

    Raises:
        SetupError: two of them run on the same unit.
    """
    owners: dict[int, Partition] = {}
    told = True
    for partitions in slices:
        own = {unit: each for each in partitions for unit in each.units_seen()}
        if both := sorted(own.keys() & owners.keys()):
            raise SetupError(
                f"{own[both[0]]} and {owners[both[0]]} of another slice both run on "
                f"{own[both[0]].share.device.unit} {both[0]} and {len(both) - 1} more: slices "
                "must not overlap; use --slices 1 or another --partition"
            )
        owners.update(own)
        told = told and bool(own)
    return told


def instance_units(device: Device, backend: str) -> list[int] | None:
    """The units of each part of a device that is divided for good; None where it is not (not MIG)."""
    if backend != "mig" or not device.measurable:
        return None
    return [instance.sm_count for instance in mig.find_instances(device.index)]


def _require(backend: str, index: int) -> None:
    if backend in BACKENDS and not (check := _probe(backend, index)).ok:
        raise SetupError(f"--partition {backend} is not available: {check.reason}")


def _probe(backend: str, index: int) -> Availability:
    try:
        return Availability(backend, True, _BACKENDS[backend].probe(index))
    except TuneError as error:
        return Availability(backend, False, str(error))
    except Exception as error:  # a broken driver must not break `tune doctor`
        return Availability(backend, False, f"{type(error).__name__}: {error}"[:200])


def _cores_reason(_index: int) -> str:
    count = len(usable_cores())
    return f"{count} physical core{'s' if count > 1 else ''}"


def _gpu_reason(index: int) -> str:
    gpus, reason = query_gpus()
    if not 0 <= index < len(gpus):
        raise SetupError(reason or f"there is no GPU {index}")
    return f"{gpus[index].name}, {gpus[index].sm_count} SMs"


def _mig_reason(index: int) -> str:
    _gpu_reason(index)
    instances = mig.find_instances(index)
    return "instances with " + ", ".join(str(instance.sm_count) for instance in instances) + " SMs"


def _green_reason(index: int) -> str:
    _gpu_reason(index)
    gpu = query_gpus()[0][index]
    if not gpu.green:
        raise SetupError(f"green contexts need CUDA 12.4, the driver has {gpu.driver_version}")
    if gpu.mps:
        raise SetupError("the GPU is reached through MPS, under which a green context may grow")
    return f"green contexts in steps of {gpu.sm_step} SMs"


def _mps_reason(index: int) -> str:
    if shutil.which(mps.CONTROL) is None:
        mps.find_control()
    _gpu_reason(index)
    if query_gpus()[0][index].mps:
        raise SetupError("this process already runs under another MPS daemon")
    return f"{mps.CONTROL} is there"


def _core_share(percent: int, device: Device) -> int:
    return core_units(percent, device.units_total)


def _open_cores(shares: Shares, disjoint: bool) -> list[Partition]:
    units = [share.units for share in shares]
    chosen = cores.choose_cores(units, disjoint)
    pairs = zip(shares, chosen, strict=True)
    return [cores.CoresPartition(share, own) for share, own in pairs]


def _core_slices(slices: Sequence[Shares]) -> list[list[Partition]]:
    places = cores.choose_cores([shares[0].units for shares in slices], disjoint=True)
    return [
        [cores.CoresPartition(share, own[: share.units]) for share in shares]
        for shares, own in zip(slices, places, strict=True)
    ]


def _null_slices(slices: Sequence[Shares]) -> list[list[Partition]]:
    ends = list(itertools.accumulate(shares[0].units for shares in slices))
    return [
        [NullPartition(share, seen=range(end - shares[0].units, end)[: share.units])
         for share in shares]
        for shares, end in zip(slices, ends, strict=True)
    ]  # fmt: skip


def _mig_share(percent: int, device: Device) -> int:
    wanted = percent * device.units_total // 100
    return mig.choose_instance(mig.find_instances(device.index), wanted).sm_count


def _mps_share(percent: int, device: Device) -> int:
    return mps_units(percent, device.units_total)


def _full_share(percent: int, device: Device) -> int:
    if percent != 100:
        raise UserError(
            f"--partition full is the whole GPU; {percent} % needs {', '.join(GPU_BACKENDS[:-1])}"
        )
    return device.units_total


def _open_full(shares: Shares, disjoint: bool) -> list[Partition]:
    if disjoint and len(shares) > 1:
        raise SetupError("backend full is one share: it cannot hold several side by side")
    return [FullPartition(share) for share in shares]


def _one_after_another(
    opened: Callable[[Shares], Sequence[Partition]],
) -> Callable[[Sequence[Shares]], list[list[Partition]]]:
    """Slices of a backend that places each share by itself."""

    def open_all(slices: Sequence[Shares]) -> list[list[Partition]]:
        partitions = iter(opened([share for shares in slices for share in shares]))
        return [[next(partitions) for _ in shares] for shares in slices]

    return open_all


# Those of a device in the order in which `auto` prefers them.
_BACKENDS = {
    "cores": Backend("llvm", _cores_reason, _core_share, _open_cores, _core_slices),
    "mig": Backend(
        "cuda", _mig_reason, _mig_share, mig.place,
        _one_after_another(lambda shares: mig.place(shares, True)),
    ),
    "green": Backend(
        "cuda", _green_reason, green_units, green.plan_partitions, green.place_slices
    ),
    "mps": Backend(
        "cuda", _mps_reason, _mps_share, lambda shares, _disjoint: mps.start_partitions(shares),
        _one_after_another(mps.start_partitions),
    ),
    "full": Backend("cuda", _gpu_reason, _full_share, _open_full),
    "null": Backend(
        "null", lambda _index: "for tests", _core_share,
        lambda shares, _disjoint: [NullPartition(share) for share in shares], _null_slices,
    ),
}  # fmt: skip
BACKENDS = tuple(name for name, backend in _BACKENDS.items() if backend.kind != "null")
GPU_BACKENDS = tuple(name for name, backend in _BACKENDS.items() if backend.kind == "cuda")
# Backends whose partitions measure at the same time, in the order in which `auto` then prefers them:
# green contexts do so in one process (`Partition.slices_share_worker`), which a fault ends for all.
SIDE_BY_SIDE = ("cores", "null", "mig", "mps", "green")
