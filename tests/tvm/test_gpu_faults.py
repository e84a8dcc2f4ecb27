"""What a fault on a GPU does to its worker, with the GPU's errors played by a fake partition."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure import Job, Measurer, Together
from gpu_aware_tune.measure.timing import SEARCH
from gpu_aware_tune.partition import MigPartition, Share, find_device, open_partitions, share_of
from gpu_aware_tune.partition.mig import MigInstance
from gpu_aware_tune.testing import fake_gpu, null_device
from gpu_aware_tune.testing_launch import FaultyPartition
from gpu_aware_tune.workers import WorkerHost

BODIES = {"good": "return 0;", "loop": "for (;;) ;", "crash": "*(volatile int *)0 = 1;"}


@pytest.fixture(scope="module")
def host() -> Iterator[WorkerHost]:
    with WorkerHost() as made:
        yield made


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shared libraries whose function "main" does what `BODIES` says."""
    folder = tmp_path_factory.mktemp("artifacts")
    found = {}
    for name, body in BODIES.items():
        source, library = folder / f"{name}.c", folder / f"{name}.so"
        source.write_text(
            "#include <stdint.h>\n"
            f"int __tvm_ffi_main(void *a, void *b, int32_t c, void *d) {{ {body} return 0; }}\n"
        )
        subprocess.run(["cc", "-shared", "-fPIC", "-O0", "-o", library, source], check=True)
        found[name] = str(library)
    return found


def job(path: str) -> Job:
    return Job(path, (((4,), "float32"),), "task", None, SEARCH)


def faulty(tmp_path: Path, count: int) -> list[FaultyPartition]:
    device = null_device()
    return [
        FaultyPartition(Share(10 * n, n, device), tmp_path / f"f{n}") for n in range(1, 1 + count)
    ]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("700 CUDA_ERROR_ILLEGAL_ADDRESS", "run"),
        ("2 CUDA:out of memory", "memory"),
        ("46 CUDA_ERROR_DEVICE_UNAVAILABLE", "run"),
    ],
)
def test_after_an_error_the_worker_is_another_one(
    host: WorkerHost, artifacts: dict[str, str], tmp_path: Path, fault: str, kind: str
) -> None:
    (part,) = faulty(tmp_path, 1)
    measurer = Measurer(host, part, 20, 1 << 30)
    measurer.open()
    assert measurer.evidence == {"backend": "null", "units": 1}
    assert measurer._worker is not None
    first = measurer._worker.pid
    (tmp_path / "f1").write_text(fault)
    failed = measurer.measure(job(artifacts["good"]))
    assert failed.failure is not None and failed.failure.kind == kind
    assert fault.partition(" ")[2] in failed.failure.text
    after = measurer.measure(job(artifacts["good"]))
    assert after.failure is None and after.seconds is not None
    assert measurer._worker is not None and measurer._worker.pid != first
    measurer.close()


def test_a_fault_that_reaches_other_clients_replaces_their_workers(
    host: WorkerHost, artifacts: dict[str, str], tmp_path: Path
) -> None:
    parts = faulty(tmp_path, 3)
    group: list[Measurer] = []
    for part in parts[:2]:
        part.fault_group = group  # as the clients of one MPS server have it
    measurers = [Measurer(host, part, 20, 1 << 30) for part in parts]
    for measurer in measurers:
        measurer.open()
    (tmp_path / "f1").write_text("700 CUDA_ERROR_ILLEGAL_ADDRESS")
    assert measurers[0].measure(job(artifacts["good"])).failure is not None
    assert [measurer._worker is None for measurer in measurers] == [True, True, False]
    for measurer in measurers:
        assert measurer.measure(job(artifacts["good"])).failure is None
        measurer.close()
    assert group == []


def test_shares_together_fail_together_and_go_on(
    host: WorkerHost, artifacts: dict[str, str], tmp_path: Path
) -> None:
    together = Together(host, faulty(tmp_path, 3), timeout_s=2)
    quiet = together.measure([job(artifacts["good"])] * 3)
    assert [m.failure for m in quiet] == [None] * 3
    assert all("together" in m.how for m in quiet)
    (tmp_path / "f2").write_text("700 CUDA_ERROR_ILLEGAL_ADDRESS")
    failed = [m.failure for m in together.measure([job(artifacts["good"])] * 3)]
    assert [f.kind for f in failed if f] == ["crash", "run", "crash"]
    assert all(m.failure is None for m in together.measure([job(artifacts["good"])] * 3))
    for name, kind in (("loop", "timeout"), ("crash", "crash")):
        jobs = [job(artifacts["good"]), job(artifacts[name]), job(artifacts["good"])]
        assert {m.failure.kind for m in together.measure(jobs) if m.failure} == {kind}
    assert all(m.failure is None for m in together.measure([job(artifacts["good"])] * 3))
    together.close()


def test_disjoint_cores_measure_together(host: WorkerHost, artifacts: dict[str, str]) -> None:
    device, _ = find_device("llvm", 0, None)
    if device.units_total < 2:
        pytest.skip("two shares need two cores")
    shares = [share_of(device, 100 // device.units_total)] * 2
    parts = open_partitions(shares, device, disjoint=True)
    together = Together(host, parts, timeout_s=20)
    results = together.measure([job(artifacts["good"])] * 2)
    assert all(m.seconds is not None for m in results)
    assert len(together.evidence) == 2
    together.close()


def test_a_share_that_needs_a_process_cannot_be_measured_together(host: WorkerHost) -> None:
    part = MigPartition(Share(13, 16, fake_gpu()), MigInstance("MIG-a", "a", 16, 1))
    with pytest.raises(SetupError, match="needs a process for each share"):
        Together(host, [part], timeout_s=1)
