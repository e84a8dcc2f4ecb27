"""The partitions through the real cuda.bindings, on a libcuda that has no GPU behind it.

Every argument passes the bindings' own conversion to C, and every result comes back through it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
from gpu_aware_tune.partition import Share, attach, gpus, partition_for
from gpu_aware_tune.partition.device import from_facts
from gpu_aware_tune.partition.driver import call, started_driver
from gpu_aware_tune.partition.green import plan_partitions

driver = started_driver()
(facts,) = gpus.read_gpus(driver)
assert (facts.name, facts.arch, facts.sm_count, facts.sm_step) == ("NVIDIA Fake", "sm_90a", 132, 8)
assert (facts.max_threads, facts.shared_bytes, facts.registers) == (1024, 49152, 65536), facts
assert facts.green and not facts.mps and facts.uuid.startswith("GPU-07070707-0707")
assert attach.visible_sm_count() == 132

manifest = {"device": "cuda/NVIDIA Fake/sm_90a", "backend": "green"}
for units in (32, 132):
    part = partition_for(manifest, units)
    assert part.evidence()["sms_seen"] == units, part.evidence()
    assert abs(part.sentinel_s() - 5e-6) < 1e-9
    launches = []
    for cold in (False, True):
        timer = part.launch_timer(lambda: launches.append(1), cold)
        assert abs(timer(1, 1)[0] - 5e-6) < 1e-9
        timer(300, 2)
        assert timer.kind == ("events" if cold else "graph")
        timer.close()
    part.sync()
    part.close()

import contextlib
from gpu_aware_tune.library.places import PartitionPlaces
from gpu_aware_tune.partition.gpu import GpuPartition

GpuPartition.timing_context = lambda self: contextlib.nullcontext(self.stream)  # TVM's is too real
places = PartitionPlaces(manifest)
threads = [places.thread_for(units) for units in (16, 64, 16)]
assert threads[0] is threads[2] is not threads[1]
assert [thread.evidence["sms_seen"] for thread in threads] == [16, 64, 16]
assert threads[1].run(lambda: "done") == "done"
places.close()

device = from_facts(facts)
shares = [Share(24, 32, device), Share(48, 64, device), Share(12, 16, device)]
parts = plan_partitions(shares, True)
for part in parts:
    part.enter_worker()
    part.verify()
assert [part.evidence()["sms_seen"] for part in parts] == [32, 64, 16]
assert len({part.stream for part in parts}) == 3
assert len({sm for part in parts for sm in part.units_seen()}) == 112
for part in parts:
    part.close()

from gpu_aware_tune.partition import check_apart, open_slices

slices = open_slices([[Share(48, 64, device), Share(24, 32, device)], [Share(36, 48, device)]],
                     device, "green")
for part in (part for own in slices for part in own):
    part.enter_worker()
    part.verify()
assert [[len(part.units_seen()) for part in own] for own in slices] == [[64, 32], [48]]
assert check_apart(slices)
for own in slices:
    for part in own:
        part.close()

from benchmarks.gpu.lab import Lab

lab = Lab()
assert (lab.device.name, lab.sms) == ("NVIDIA Fake", 132)
with lab.split([16, 64]) as (small, large), lab.whole() as whole:
    assert [len(lane.sm_ids()) for lane in (small, large, whole)] == [16, 64, 132]
    for load in ("compute", "l2", "dram"):
        assert len(small.timed(load, small.rounds_for(load, 1e-3), 3)) == 3
    large.illegal()
    large.wait()
print("all went through")
"""


def test_every_call_passes_the_bindings(mock_gpu: Mapping[str, str]) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.gpu.lab import _cubin

    _cubin("sm_90a")  # kept for the process below, where kernels of real cubins do nothing
    libraries = mock_gpu["LD_LIBRARY_PATH"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{libraries}/libcuda.so.1"],
        env=mock_gpu,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "all went through\n", done.stderr[-2000:]
