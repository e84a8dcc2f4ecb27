"""The partition that a finished library opens in the process that uses it."""

from __future__ import annotations

import re

import pytest
from mock_gpu.devices import fake_gpu
from mock_gpu.in_process import MockGpu

from gpu_aware_tune.errors import SetupError, TuneError, UserError
from gpu_aware_tune.partition import attach, mps, partition_for, share_of

GREEN = {"device": "cuda/NVIDIA H200/sm_90a", "backend": "green"}


def test_the_library_runs_where_its_manifest_says(gpu_here: MockGpu) -> None:
    part = partition_for(GREEN, 32)
    assert part is not None
    assert (part.backend, part.evidence()["sms_seen"]) == ("green", 32)
    part.close()
    whole = partition_for(GREEN)
    assert whole is not None
    assert (whole.backend, whole.share.units) == ("full", 132)
    whole.close()
    assert gpu_here.alive() == []


def test_what_limits_the_process_already_is_taken_as_it_is(
    gpu_here: MockGpu, mps_control: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (client,) = mps.start_partitions([share_of(fake_gpu(), 30, "mps")])
    for name, value in client.env().items():
        monkeypatch.setenv(name, value)
    part = partition_for({**GREEN, "backend": "mps"})
    assert part is not None and part.share.units == attach.visible_sm_count() == 38
    part.close()
    client.close()
    assert gpu_here.alive() == []


def test_a_library_for_cores_needs_none() -> None:
    assert partition_for({"device": "llvm/AMD EPYC/znver4", "backend": "cores"}) is None


@pytest.mark.parametrize(
    ("units", "backend", "kind", "text"),
    [
        (200, "green", UserError, "200 SMs were asked for; this process sees 132"),
        (0, "green", UserError, "0 SMs were asked for"),
        (20, "green", UserError, "multiples of 8 from 8 on"),
        (32, "full", UserError, "full is all 132 SMs, not 32"),
        (32, "cores", UserError, "allowed: green, full, mps, mig"),
        (32, "mps", SetupError, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=25"),
        (32, "mig", SetupError, "CUDA_VISIBLE_DEVICES=MIG-"),
    ],
)
def test_what_cannot_be_opened_here_says_what_can(
    gpu_here: MockGpu, units: int, backend: str, kind: type[TuneError], text: str
) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        partition_for(GREEN, units, backend)
    assert gpu_here.alive() == []


def test_a_partition_that_fails_its_check_is_closed(gpu_here: MockGpu) -> None:
    gpu_here.set(lost=2)
    with pytest.raises(SetupError, match="30 SMs where 32"):
        partition_for(GREEN, 32)
    assert gpu_here.alive() == []


def test_without_a_gpu(gpu_here: MockGpu) -> None:
    with pytest.raises(SetupError, match="no GPU 3"):
        partition_for(GREEN, 32, index=3)
    gpu_here.set(fail="cuInit=100")
    assert attach.visible_sm_count() == 0
    with pytest.raises(SetupError, match="cuInit"):
        partition_for(GREEN, 32)
