"""One machine's (or GPU's) part of a run: the workers of `pools.py`, fed by messages; knows no Ray."""

from __future__ import annotations

import dataclasses
import os
import sysconfig
import threading
import time
import traceback
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from gpu_aware_tune.cluster.messages import (
    Artifact,
    Ask,
    Batch,
    Begin,
    DraftRequest,
    End,
    FromNode,
    Gone,
    Learn,
    Made,
    Measure,
    Measured,
    NodeSetup,
    Numbered,
    Ready,
    SearchLost,
    Status,
    Stop,
    ToNode,
    Work,
)
from gpu_aware_tune.codegen import cuda_toolchain
from gpu_aware_tune.codegen.build_pool import Built, remove
from gpu_aware_tune.errors import SetupError, TuneError
from gpu_aware_tune.partition import find_device
from gpu_aware_tune.partition.linking import find_linker
from gpu_aware_tune.partition.topology import allowed_cpus, physical_cores
from gpu_aware_tune.search.candidates import Candidate
from gpu_aware_tune.search.pipeline import Pipeline
from gpu_aware_tune.search.pools import Pools, PoolSettings, available_cores, worker_counts
from gpu_aware_tune.search.sources import ArtifactSink, CandidateSource
from gpu_aware_tune.workers import WorkerHost

_IDLE_S = 0.1
_STATUS_S = 0.3


class Node:
    """Runs what `post` brings in a thread of its own; `poll` gives what has come of it.

    Args:
        setup: of the run.
        gpu: which GPU of the machine is its own; 0 for a CPU. None: it only builds.
        part: (number, count): which of so many equal parts of the machine's cores are its own.
    """

    def __init__(
        self, setup: NodeSetup, gpu: int | None = 0, part: tuple[int, int] = (0, 1)
    ) -> None:
        self._setup = setup
        self._gpu = gpu
        self._part = part
        self._changed = threading.Condition()
        self._inbox: deque[ToNode] = deque()
        self._outbox: list[FromNode] = []
        self._status = Status()
        self._thread = threading.Thread(target=self._serve, name="node", daemon=True)
        self._thread.start()

    def post(self, messages: Sequence[ToNode]) -> None:
        """Take messages; they are acted upon in their order."""
        with self._changed:
            self._inbox.extend(messages)
            self._changed.notify_all()

    def poll(self, wait_s: float) -> Batch:
        """What has happened since the last poll; waits for something to happen, but not longer."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox, wait_s)
            messages, self._outbox = tuple(self._outbox), []
            return Batch(messages, self._status)

    def close(self, timeout_s: float) -> None:
        """End the workers."""
        self.post([Stop()])
        self._thread.join(timeout_s)

    def _serve(self) -> None:
        stands = fits = False
        try:
            _keep_to(self._part)
            with WorkerHost(cuda_toolchain.runtime_environment()) as host:
                _check_tools(self._setup)
                fits = self._gpu is not None
                settings, lacks = settings_here(self._setup, self._gpu)
                with Pools(host, settings) as pools:
                    text = pools.start(self._setup.tasks, self._setup.modules)
                    cores = available_cores()
                    searchers, _ = worker_counts(cores)
                    self.tell(Ready(pools.pipeline.capacity, searchers, cores, text, lacks))
                    stands = True
                    while (begin := self._next_run()) is not None:
                        _Run(self, pools.pipeline, host.scratch, begin).work()
        except TuneError as error:  # a machine that has worked is worth another try
            self.tell(Gone(str(error), refused=not stands, can_build=fits and not stands))
        except BaseException as error:
            traceback.print_exc()  # Ray takes it to the user
            self.tell(Gone(f"{type(error).__name__}: {error}"))
        else:
            self.tell(Gone("it was told to stop"))

    def _next_run(self) -> Begin | None:
        """The next run, or None to stop; what belongs to none is dropped."""
        while True:
            message = self.take(None)
            if isinstance(message, Begin):
                return message
            if isinstance(message, Stop):
                return None

    def take(self, wait_s: float | None) -> ToNode | None:
        """The next message; None when none came in time (`wait_s` None: wait for ever)."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox, wait_s)
            return self._inbox.popleft() if self._inbox else None

    def put_back(self, message: ToNode) -> None:
        """Return a message that belongs to what comes next."""
        with self._changed:
            self._inbox.appendleft(message)

    def wait(self, wait_s: float) -> None:
        """Sleep until a message is there, but not longer."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox, wait_s)

    def report(self, status: Status) -> None:
        """Keep what goes along with the next poll."""
        with self._changed:
            self._status = status

    def tell(self, message: FromNode) -> None:
        """Queue a message for the next poll."""
        with self._changed:
            self._outbox.append(message)
            self._changed.notify_all()


class _Run(CandidateSource, ArtifactSink):
    """One run of the pipeline, fed from the node's inbox (in the node's thread)."""

    def __init__(self, node: Node, pipeline: Pipeline, scratch: Path, begin: Begin) -> None:
        self._node = node
        self._pipeline = pipeline
        self._scratch = scratch
        self._begin = begin
        self._arrived: list[tuple[Candidate, Built]] = []
        self._asked: deque[Ask] = deque()
        self._best_s: dict[str, Mapping[int, float]] = {}
        self._ended = False
        self._told_at = 0.0

    def work(self) -> None:
        """Build and measure what comes in, until the run is ended."""
        tell, begin = self._node.tell, self._begin
        outcomes = self._pipeline.run((), self, begin.timing, begin.alone, sink=self)
        for outcome in outcomes:
            assert isinstance(outcome.candidate, Numbered)
            tell(Measured(outcome.candidate.id, outcome.measurements))

    def candidates(self) -> Iterable[Candidate]:
        """Act upon every message that is there; gives the candidates among them."""
        self._report()
        work: list[Candidate] = []
        while not self._ended and (message := self._node.take(0)) is not None:
            if isinstance(message, Work):
                self._best_s[message.candidate.task] = message.best_s
                work.append(message.candidate)
            elif isinstance(message, Measure):
                self._best_s[message.candidate.task] = message.best_s
                path = self._scratch / f"arrived-{message.candidate.id}.so"
                path.write_bytes(message.artifact.data)
                built = Built(str(path), 0.0, digest=message.artifact.digest)
                self._arrived.append((message.candidate, built))
            elif isinstance(message, Learn):
                told = Candidate(message.task, "", "search", message.number)
                self._pipeline.tell(told, message.seconds)
            elif isinstance(message, Ask):
                self._asked.append(message)
            else:
                self._ended = True
                if not isinstance(message, End):
                    self._node.put_back(message)
        return work

    def artifacts(self) -> Sequence[tuple[Candidate, Built]]:
        """Artifacts that were built elsewhere and have come in."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def take(self, candidate: Candidate, built: Built) -> None:
        """Send away what cannot be measured here."""
        assert isinstance(candidate, Numbered)
        data = Path(built.path).read_bytes()
        remove(built.path)
        self._node.tell(Made(candidate.id, Artifact(data, built.digest)))

    def wait(self) -> bool:
        """Sleep until a message is there; the run ends when it is told to."""
        self._node.wait(_IDLE_S)
        return True

    def next_task(self, busy: Collection[str]) -> str | None:
        """The first request whose searcher is free; a task that is new goes to it first."""
        for ask in self._asked:
            if ask.task not in busy:
                self._asked.remove(ask)
                if ask.new is not None:
                    self._pipeline.add_task(ask.new)
                return ask.task
        return None

    def accept(self, task: str, drafted: Sequence[Candidate]) -> Sequence[Candidate]:
        """Pass a draft on; its candidates come back as work, here or elsewhere."""
        self._node.tell(DraftRequest(self._begin.run, task, tuple(drafted)))
        return ()

    def exhausted(self, task: str) -> None:
        """Pass on that there is nothing new."""
        self._node.tell(DraftRequest(self._begin.run, task, ()))

    def lost(self, task: str, text: str) -> None:
        """Pass on that the search died on a task."""
        self._node.tell(SearchLost(self._begin.run, task, text))

    def best_s(self, task: str) -> Mapping[int, float]:
        """As the driver has said it last."""
        return self._best_s.get(task, {})

    def stop(self) -> bool:
        """Whether the driver has ended the run."""
        return self._ended

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._told_at > _STATUS_S:
            self._told_at = now
            pipeline = self._pipeline
            self._node.report(
                Status(
                    pipeline.builds_in_flight,
                    pipeline.waiting_to_measure,
                    tuple(pipeline.slices),
                    pipeline.core_seconds(),
                )
            )


def settings_here(setup: NodeSetup, gpu: int | None = 0) -> tuple[PoolSettings, str]:
    """The run's settings for this machine, and why it can only build ("": it measures too).

    A machine that measures has its own device in the place of the driver's; one that only builds
    has no slices.

    Raises:
        SetupError: the GPU it was given is not the run's, or it cannot build for the run either.
    """
    wanted, slices = setup.pools.device, setup.pools.slices
    if gpu is None:
        lacks = f"it has no {wanted.name} to measure on"
    else:
        device, _ = find_device(wanted.kind, gpu, setup.arch)
        needed = sum(shares[0].units for shares in slices)
        if device.key == wanted.key and device.units_total >= needed:
            own = tuple(
                tuple(dataclasses.replace(share, device=device) for share in shares)
                for shares in slices
            )
            return dataclasses.replace(setup.pools, device=device, slices=own), ""
        if device.key != wanted.key:
            lacks = f"it has {device.name} ({device.arch}), not {wanted.name} ({wanted.arch})"
        else:
            unit = device.unit + ("" if device.units_total == 1 else "s")
            lacks = f"it has {device.units_total} {unit}, the run's shares need {needed}"
        if wanted.kind == "cuda":  # it will build without that GPU, which is then free for others
            raise SetupError(lacks)
    here = sysconfig.get_platform()
    if here != setup.platform:
        raise SetupError(f"{lacks}; it is {here} and cannot build for {setup.platform}")
    return dataclasses.replace(setup.pools, slices=()), lacks


def _check_tools(setup: NodeSetup) -> None:
    """Raise a `SetupError` where nothing at all can be done for a run."""
    import tvm

    from gpu_aware_tune import __version__

    here = (__version__, tvm.__version__)
    if here != setup.versions:
        ours, theirs = (
            f"gpu_aware_tune {own} with TVM {tvm_}" for own, tvm_ in (here, setup.versions)
        )
        raise SetupError(f"it has {ours}, the run {theirs}: install the same versions")
    # Without a linker every candidate would fail, and at once.
    find_linker(packs=setup.pools.device.kind == "cuda")


def _keep_to(part: tuple[int, int]) -> None:
    """Keep this thread, and the workers that it will start, to a part of the machine's cores."""
    number, count = part
    if count == 1:
        return
    groups = physical_cores(allowed_cpus())
    own = groups[number * len(groups) // count : (number + 1) * len(groups) // count]
    os.sched_setaffinity(0, {cpu for group in own or groups for cpu in group})
