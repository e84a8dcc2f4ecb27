"""The device, its shares, and partitions: shares made real."""

from __future__ import annotations

from gpu_aware_tune.partition.attach import partition_for
from gpu_aware_tune.partition.backends import (
    BACKENDS,
    GPU_BACKENDS,
    SIDE_BY_SIDE,
    check_disjoint,
    choose_backend,
    instance_units,
    open_partitions,
    open_slices,
    probe_backends,
    share_of,
)
from gpu_aware_tune.partition.base import Availability, Partition
from gpu_aware_tune.partition.cores import CoresPartition
from gpu_aware_tune.partition.device import Device, find_device, host_mcpu
from gpu_aware_tune.partition.full import FullPartition
from gpu_aware_tune.partition.green import GreenPartition
from gpu_aware_tune.partition.mig import MigPartition
from gpu_aware_tune.partition.mps import MpsPartition
from gpu_aware_tune.partition.null import NullPartition
from gpu_aware_tune.partition.nvml import Nvml, Snapshot, disturbances, own_processes
from gpu_aware_tune.partition.shares import Share
from gpu_aware_tune.partition.topology import cpu_quota, usable_cores

__all__ = [
    "BACKENDS",
    "GPU_BACKENDS",
    "SIDE_BY_SIDE",
    "Availability",
    "CoresPartition",
    "Device",
    "FullPartition",
    "GreenPartition",
    "MigPartition",
    "MpsPartition",
    "NullPartition",
    "Nvml",
    "Partition",
    "Share",
    "Snapshot",
    "check_disjoint",
    "choose_backend",
    "cpu_quota",
    "disturbances",
    "find_device",
    "host_mcpu",
    "instance_units",
    "open_partitions",
    "open_slices",
    "own_processes",
    "partition_for",
    "probe_backends",
    "share_of",
    "usable_cores",
]
