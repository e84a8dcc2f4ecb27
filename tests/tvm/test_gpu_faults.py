"""What a fault on a GPU does to its worker, with the GPU's errors played by a fake partition."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from mock_gpu.devices import FaultyPartition, fake_gpu, null_device

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure import Job, Measurement, Measurer, SharedMeasurer, SharedWorker
from gpu_aware_tune.measure.timing import SEARCH
from gpu_aware_tune.partition import (
    MigPartition,
    Partition,
    Share,
    find_device,
    open_slices,
    share_of,
    usable_cores,
)
from gpu_aware_tune.partition.mig import MigInstance
from gpu_aware_tune.workers import WorkerHost

TESTS = Path(__file__).parents[1]
BODIES = {
    "good": "return 0;",
    "nap": "usleep(20000);",
    "loop": "for (;;) ;",
    "crash": "*(volatile int *)0 = 1;",
}


@pytest.fixture(scope="module")
def host() -> Iterator[WorkerHost]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))  # workers unpickle `FaultyPartition`
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
            "#include <stdint.h>\n#include <unistd.h>\n"
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


def shared_by(
    host: WorkerHost, parts: Sequence[Partition], timeout_s: float = 20
) -> tuple[SharedWorker, list[SharedMeasurer]]:
    """A worker with a slice for each partition."""
    shared = SharedWorker(host, [[part] for part in parts], timeout_s, 1 << 30)
    return shared, [measurer for (measurer,) in shared.slices]


def all_at_once(
    measurers: Sequence[SharedMeasurer], paths: Sequence[str]
) -> tuple[list[str | None], float]:
    """The kind of each one's failure, and the seconds that all of them took."""
    begun = time.monotonic()
    for measurer, path in zip(measurers, paths, strict=True):
        measurer.submit(job(path))
    results: dict[int, Measurement] = {}
    while len(results) < len(measurers):
        for number, measurer in enumerate(measurers):
            if number not in results and (result := measurer.collect(0.01)) is not None:
                results[number] = result
    failures = [results[number].failure for number in range(len(measurers))]
    return [
        None if failure is None else failure.kind for failure in failures
    ], time.monotonic() - begun


def test_a_fault_costs_the_other_slices_nothing(
    host: WorkerHost, artifacts: dict[str, str], tmp_path: Path
) -> None:
    shared, measurers = shared_by(host, faulty(tmp_path, 3), timeout_s=2)
    good = artifacts["good"]
    assert all_at_once(measurers, [good] * 3)[0] == [None] * 3
    assert [measurer.evidence["units"] for measurer in measurers] == [1, 2, 3]
    (tmp_path / "f2").write_text("700 CUDA_ERROR_ILLEGAL_ADDRESS")
    failed = measurers[1].measure(job(good)).failure
    assert failed is not None and "ILLEGAL_ADDRESS" in failed.text
    assert not shared.is_open, "whatever the error was"
    for place, (name, kind) in enumerate((("loop", "timeout"), ("crash", "crash"))):
        paths = [good] * 3
        paths[place] = artifacts[name]
        wanted = [kind if number == place else None for number in range(3)]
        assert all_at_once(measurers, paths)[0] == wanted
    for measurer in measurers:
        measurer.close()
    assert not shared.is_open


@pytest.mark.skipif(len(usable_cores()) < 2, reason="two shares need two cores")
def test_disjoint_cores_measure_at_the_same_time(
    host: WorkerHost, artifacts: dict[str, str]
) -> None:
    device, _ = find_device("llvm", 0, None)
    shares = [[share_of(device, 100 // device.units_total)]] * 2
    parts = [part for (part,) in open_slices(shares, device, "cores")]
    _, measurers = shared_by(host, parts)
    measurers[0].open()
    alone = [all_at_once(measurers[:1], [artifacts["nap"]])[1] for _ in range(3)]
    both = [all_at_once(measurers, [artifacts["nap"]] * 2)[1] for _ in range(3)]
    assert min(both) < 1.5 * min(alone), "a kernel holds up nobody else's"
    assert [measurer.evidence["apart"] for measurer in measurers] == [True, True]
    for measurer in measurers:
        measurer.close()


def test_a_share_that_needs_a_process_cannot_have_a_shared_worker(host: WorkerHost) -> None:
    part = MigPartition(Share(13, 16, fake_gpu()), MigInstance("MIG-a", "a", 16, 1))
    with pytest.raises(SetupError, match="needs a process for each share"):
        SharedWorker(host, [[part]], 1, 1 << 30)
