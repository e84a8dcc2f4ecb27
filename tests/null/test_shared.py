"""Slices that measure at the same time in one worker: real processes, kernels played by a script."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import pytest
from mock_gpu.devices import null_device

from gpu_aware_tune.codegen.build_pool import BuildPool, Built
from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure import (
    SEARCH,
    ComparisonJob,
    Job,
    SharedMeasurer,
    SharedWorker,
    Slice,
    worker,
)
from gpu_aware_tune.measure.measurement import FailureKind, Measurement
from gpu_aware_tune.measure.worker import Reply
from gpu_aware_tune.partition import MpsPartition, NullPartition, Partition, Share, open_slices
from gpu_aware_tune.partition.mps import MpsDaemon
from gpu_aware_tune.search.candidates import Candidate
from gpu_aware_tune.search.pipeline import Outcome, Pipeline, TaskSpec
from gpu_aware_tune.workers import Worker, WorkerHost

DEVICE = null_device(10)
MIB = 1 << 20
BAD = [("fault", "run"), ("crash", "crash"), ("hang", "timeout"), ("eat", "memory")]
TIMEOUT_S = 1.0


class Script:
    """Does what a job's path says: "ok", "slow:SECONDS" or one of `BAD`."""

    def __init__(self, partition: Partition) -> None:
        self._units = partition.share.units

    def answer(self, job: Job | ComparisonJob) -> Reply:
        if isinstance(job, ComparisonJob):
            return Reply(tuple(self._one(path) for path in job.paths))
        return Reply((self._one(job.path),), "fault" in job.path)

    def _one(self, path: str) -> Measurement:
        verb, _, seconds = path.rpartition("/")[2].partition("-")[0].partition(":")
        if verb == "fault":
            return Measurement.failed(FailureKind.RUN, "an illegal access")
        if verb == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        eaten = b"x" * (200 * MIB) if verb == "eat" else b""
        time.sleep(float(seconds or (60 if verb in ("crash", "hang", "eat") else 0)))
        return Measurement(float(self._units + len(eaten)))


class ForkingHost(WorkerHost):
    """Forks workers from the test's own process, which takes no time."""

    def __init__(self, folder: Path) -> None:  # starts nothing
        self.scratch = folder
        self.pids: list[int] = []

    def spawn(self, entry: Any, *args: Any, env: Mapping[str, str] | None = None) -> Worker:
        assert entry is worker.serve_slices
        assert env, "the partitions' environment"
        mine, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, 0)
                faulthandler.disable()  # pytest's
                mine.close()
                worker.serve_slices(Connection(theirs.detach()), *args)
            finally:
                os._exit(0)
        theirs.close()
        self.pids.append(pid)
        return Worker(self, pid, Connection(mine.detach()), self.scratch / "log")

    def exit_code(self, pid: int, timeout_s: float = 5.0) -> int | None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if (found := os.waitpid(pid, os.WNOHANG))[0]:
                return os.waitstatus_to_exitcode(found[1])
            time.sleep(0.005)
        return None

    def leftovers(self) -> list[int]:
        """Workers that still run."""
        return [pid for pid in self.pids if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ForkingHost]:
    @contextlib.contextmanager
    def station(partition: Partition) -> Iterator[Script]:
        partition.enter_worker()
        partition.verify()
        yield Script(partition)

    monkeypatch.setattr(worker, "_measuring", station)
    made = ForkingHost(tmp_path)
    yield made
    assert made.leftovers() == []


Start = Callable[..., SharedWorker]


@pytest.fixture
def start(host: ForkingHost) -> Iterator[Start]:
    """Opens a shared worker with slices of so many units, each with shares of so many."""
    opened: list[SharedWorker] = []

    def make(*slices: Sequence[int], timeout_s: float = TIMEOUT_S) -> SharedWorker:
        shares = [[Share(10 * units, units, DEVICE) for units in own] for own in slices]
        parts = open_slices(shares, DEVICE, "null")
        pages = Path("/proc/self/statm").read_text().split()
        own_bytes = (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
        made = SharedWorker(host, parts, timeout_s, (own_bytes + 100 * MIB) // len(slices))
        opened.append(made)
        made.open()
        return made

    yield make
    for made in opened:
        for measurer in flat(made):
            measurer.close()


def flat(shared: SharedWorker) -> list[SharedMeasurer]:
    return [measurer for own in shared.slices for measurer in own]


def job(path: str) -> Job:
    return Job(path, (), "1", None, SEARCH)


def gathered(measurers: Sequence[SharedMeasurer]) -> list[Measurement]:
    """Waits as the pipeline does: with `select`, and `collect` for each."""
    results: dict[SharedMeasurer, Measurement] = {}
    end = time.monotonic() + 20
    while len(results) < len(measurers) and time.monotonic() < end:
        waiting = [measurer for measurer in measurers if measurer not in results]
        select.select(waiting, [], [], 0.1)
        for measurer in waiting:
            if (result := measurer.collect()) is not None:
                results[measurer] = result
    return [results[measurer] for measurer in measurers]


def kinds(results: Sequence[Measurement]) -> list[str | None]:
    return [None if each.failure is None else each.failure.kind for each in results]


def test_slices_do_not_wait_for_one_another(start: Start) -> None:
    first, second = flat(start([4], [3], timeout_s=20))
    first.submit(job("slow:1"))
    begun = time.monotonic()
    for _ in range(3):
        second.submit(job("slow:0.05"))
        assert select.select([first, second], [], [], 0.9)[0] == [second]
        assert second.collect() == Measurement(3.0)
        assert first.collect() is None
    assert time.monotonic() - begun < 0.9
    assert first.busy and not second.busy
    assert gathered([first]) == [Measurement(4.0)]


def test_slices_work_at_the_same_time(start: Start) -> None:
    measurers = flat(start([4], [3], [3], timeout_s=20))
    begun = time.monotonic()
    for measurer in measurers:
        measurer.submit(job("slow:0.5"))
    assert kinds(gathered(measurers)) == [None] * 3
    assert time.monotonic() - begun < 1.2


def test_shares_of_one_slice_take_turns(start: Start, host: ForkingHost) -> None:
    shared = start([4, 2], [3, 2])
    assert [[m.units for m in own] for own in shared.slices] == [[4, 2], [3, 2]]
    assert [m.measure(job("ok")).seconds for m in flat(shared)] == [4, 2, 3, 2]
    assert [m.evidence["units"] for m in flat(shared)] == [4, 2, 3, 2]
    assert all(m.evidence["apart"] is True for m in flat(shared))
    assert len(host.pids) == 1, "all of them in one process"
    wide, narrow = shared.slices[0]
    wide.submit(job("slow:0.1"))
    assert wide.busy and not narrow.busy
    with pytest.raises(AssertionError, match="one job at a time"):
        narrow.submit(job("ok"))
    assert gathered([wide]) == [Measurement(4.0)]


@pytest.mark.parametrize(("path", "kind"), BAD)
def test_a_bad_candidate_alone_is_a_failure_and_the_next_one_is_measured(
    start: Start, host: ForkingHost, path: str, kind: str
) -> None:
    first, second = flat(start([4], [3]))
    failed = first.measure(job(path))
    assert failed.failure is not None and failed.failure.kind == kind
    if path == "crash":
        assert "SIGSEGV" in failed.failure.text
    assert second.measure(job("ok")) == Measurement(3.0)
    assert first.measure(job("ok")) == Measurement(4.0)
    assert len(host.pids) == 2, "replaced once"


@pytest.mark.parametrize(("path", "kind"), BAD)
@pytest.mark.parametrize("place", [0, 2])
def test_beside_a_bad_candidate_nothing_is_lost(
    start: Start, path: str, kind: str, place: int
) -> None:
    measurers = flat(start([4], [3], [2]))
    paths = ["slow:0.3"] * 3
    paths[place] = path
    for measurer, each in zip(measurers, paths, strict=True):
        measurer.submit(job(each))
    wanted: list[str | None] = [None] * 3
    wanted[place] = kind
    assert kinds(gathered(measurers)) == wanted
    for measurer in measurers:
        measurer.submit(job("ok"))
    assert kinds(gathered(measurers)) == [None] * 3


def test_two_bad_candidates_fail_each_in_its_own_way(start: Start, host: ForkingHost) -> None:
    measurers = flat(start([4], [3], [2]))
    for measurer, path in zip(measurers, ("hang", "slow:0.1", "crash"), strict=True):
        measurer.submit(job(path))
    assert kinds(gathered(measurers)) == ["timeout", None, "crash"]
    # One of all three and one for each bad candidate; one more where the good one comes last.
    assert len(host.pids) in (3, 4)


def test_new_jobs_wait_while_suspects_are_measured_alone(start: Start) -> None:
    first, second, third = flat(start([4], [3], [2], timeout_s=20))
    first.submit(job("crash"))
    second.submit(job("slow:0.5"))
    while not first._shared._suspects:
        first.collect(0.05)
    third.submit(job("ok"))
    assert third.collect(0.1) is None, "not beside a suspect"
    assert kinds(gathered([first, second, third])) == ["crash", None, None]


def test_who_is_always_looked_at_first_shields_nobody(start: Start, host: ForkingHost) -> None:
    first, second, third = flat(start([4], [3], [2], timeout_s=20))
    for measurer, path in ((first, "slow:0.2"), (second, "slow:0.2"), (third, "crash")):
        measurer.submit(job(path))
    assert kinds(gathered([first])) == [None]
    first.submit(job("slow:0.2"))
    assert kinds(gathered([first, second, third])) == [None, None, "crash"]
    assert len(host.pids) == 3, "the new job did not begin beside the bad one"


def test_who_waits_does_not_wait_for_others_to_collect(start: Start) -> None:
    first, second = flat(start([4], [3], timeout_s=20))
    first.submit(job("fault"))
    second.submit(job("slow:0.2"))
    while (result := second.collect(0.05)) is None:  # nobody collects the first one's
        pass
    assert result == Measurement(3.0)
    assert first.busy and first.fileno() > 0
    assert kinds(gathered([first])) == ["run"]


def test_what_is_given_up_takes_nothing_with_it(start: Start, host: ForkingHost) -> None:
    first, second = flat(start([4], [3], timeout_s=20))
    first.submit(job("hang"))
    second.submit(job("slow:0.2"))
    first.abandon()
    assert not first.busy
    assert gathered([second]) == [Measurement(3.0)]
    first.abandon()  # nothing is under way: nothing happens
    assert first.measure(job("ok")) == Measurement(4.0)
    assert len(host.pids) == 2


def test_candidates_meet_in_turns(start: Start) -> None:
    first, _ = flat(start([4], [3]))
    comparison = ComparisonJob(("slow:0.6", "slow:0.6", "ok"), (), "1", SEARCH)
    assert first.compare(comparison) == (Measurement(4.0),) * 3, "the limit is one candidate's"
    failed = first.compare(ComparisonJob(("ok", "crash"), (), "1", SEARCH))
    assert kinds(failed) == ["crash", "crash"]


def test_slices_with_a_unit_in_common_are_refused(host: ForkingHost) -> None:
    parts = [
        [NullPartition(Share(10 * n, n, DEVICE), seen=range(start, start + n))]
        for n, start in ((4, 0), (3, 2))
    ]
    shared = SharedWorker(host, parts, 1, 1 << 40)
    with pytest.raises(SetupError, match=r"both run on core 2 and 1 more: .*--slices 1"):
        flat(shared)[0].open()
    assert not shared.is_open


def test_a_share_that_is_not_what_it_says_is_refused(host: ForkingHost) -> None:
    good, bad = (Share(10 * n, n, DEVICE) for n in (4, 3))
    parts = [[NullPartition(good, seen=range(4))], [NullPartition(bad, verified_units=2)]]
    with pytest.raises(SetupError, match="2 units where 3 were promised"):
        SharedWorker(host, parts, 1, 1 << 40).open()


def test_what_is_not_known_to_be_apart_says_so(host: ForkingHost) -> None:
    parts = [[NullPartition(Share(10 * n, n, DEVICE))] for n in (4, 3)]
    shared = SharedWorker(host, parts, 1, 1 << 40)
    shared.open()
    assert [measurer.evidence["apart"] for measurer in flat(shared)] == [False, False]
    shared.close_worker()


class Daemon(MpsDaemon):
    """One that was never started."""

    def env(self) -> dict[str, str]:
        return {}


def test_a_backend_of_processes_has_no_shared_worker(host: ForkingHost) -> None:
    share = Share(30, 3, DEVICE)
    with pytest.raises(SetupError, match="mps needs a process for each share"):
        SharedWorker(host, [[MpsPartition(share, Daemon("0"))]], 1, 1 << 40)


# The pipeline on top ------------------------------------------------------------------------------


class Builders:
    """Every build is done at once: the candidate's trace is the artifact."""

    def __init__(self) -> None:
        self._done: list[tuple[Candidate, Built]] = []
        self.workers = [self]
        self.paused = False
        self._always = os.open("/dev/zero", os.O_RDONLY)

    @property
    def idle(self) -> int:
        return 0 if self._done else 1

    @property
    def busy(self) -> list[Any]:
        return [self] if self._done else []

    def fileno(self) -> int:
        return self._always

    def submit(self, candidate: Candidate, task: str, trace: str) -> None:
        self._done.append((candidate, Built(trace or "", 0.0, None, digest=trace or "")))

    def collect(self, ready: list[Any]) -> Iterator[tuple[Candidate, Built]]:
        while self._done:
            yield self._done.pop()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def confine(self, cores: object) -> None:
        pass

    def abandon(self) -> None:
        self._done.clear()

    def cpu_s(self) -> float:
        return 0.0


def outcomes(shared: SharedWorker, paths: Sequence[str], alone: bool) -> list[Outcome]:
    slices = [Slice(own) for own in shared.slices]
    tasks = {"1": TaskSpec((), (3,)), "2": TaskSpec((), (4, 2))}
    pipeline = Pipeline(tasks, [], cast("BuildPool", Builders()), slices, cores=4, low_water=0)
    wanted = [
        Candidate("12"[number % 2], f"{path}-{number}", "search")
        for number, path in enumerate(paths)
    ]
    return list(pipeline.run(wanted, alone=alone))


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_loses_nothing(start: Start, alone: bool) -> None:
    shared = start([4, 3, 2], [3, 2])
    paths = ["slow:0.02"] * 8 + ["fault", "ok", "crash", "ok", "hang", "ok", "ok", "eat"]
    found = outcomes(shared, paths, alone)
    assert len(found) == len(paths)
    wanted = dict(BAD)
    together = 0
    for outcome in found:
        path = outcome.candidate.trace.partition("-")[0]
        units = {"1": {3}, "2": {4, 2}}[outcome.candidate.task]
        assert outcome.measurements.keys() == units
        assert outcome.failure == wanted.get(path), outcome
        for count, measurement in outcome.measurements.items():
            assert measurement.seconds in (None, count)
            together += "together" in measurement.how
    assert together == 0 if alone else together > 4


def test_a_stopped_run_leaves_nothing_under_way(start: Start) -> None:
    from gpu_aware_tune.search.sources import CandidateSource

    shared = start([4, 3, 2], [3, 2], timeout_s=20)
    pipeline = Pipeline(
        {"1": TaskSpec((), (3,))},
        [],
        cast("BuildPool", Builders()),
        [Slice(own) for own in shared.slices],
        4,
        0,
    )
    turns = iter(range(1000))

    class Source(CandidateSource):
        def stop(self) -> bool:
            return next(turns) > 8

    wanted = [Candidate("1", f"slow:5-{number}", "search") for number in range(4)]
    assert list(pipeline.run(wanted, Source())) == []
    assert not any(measurer.busy for measurer in flat(shared))
    assert [outcome.failure for outcome in pipeline.run([Candidate("1", "ok", "search")])] == [None]
