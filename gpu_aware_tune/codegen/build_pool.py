"""A pool of persistent build workers: candidate -> artifact.

A worker replays a candidate's trace on the task it already holds, lowers it and writes a shared
library that the measuring worker opens. On a CPU that is LLVM's object file and one call of the
linker (4 ms); TVM's own tarball route costs 180 ms a candidate.
"""

from __future__ import annotations

import hashlib
import os
import select
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from gpu_aware_tune.errors import last_line
from gpu_aware_tune.measure.measurement import Failure, FailureKind
from gpu_aware_tune.partition.linking import run_linker
from gpu_aware_tune.workers import Worker, WorkerHost

Key = TypeVar("Key")

_PATIENCE = 5.0  # a build may take so many times the median ...
_LEAST_LIMIT_S = 1.0  # ... and at least this much CPU time ...
_JUDGES = 16  # ... once so many builds have been seen
_WAIT_S = 0.1  # between two looks for workers that are to be given up


@dataclass(frozen=True)
class Build:
    """A request: build `trace` (or UNSCHEDULED) of `task` into `path`."""

    task: str
    trace: str
    path: str


@dataclass(frozen=True)
class Built:
    """The answer: the artifact's path, or why there is none; `seconds` is the worker's CPU time.

    Artifacts of one `digest` are the same, byte for byte.
    """

    path: str
    seconds: float
    failure: Failure | None = None
    digest: str = ""


@dataclass(frozen=True)
class Call:
    """A request to run function(*args) in a build worker.

    The answer is what it returns, or a `Failure` if it raised or its worker ended.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]


class BuildPool:
    """Keeps `size` build workers busy; each job has an opaque `key` that comes back with its result.

    A build is given up after `timeout_s`, and its worker replaced, so that one slow kernel stalls
    nobody; the same goes for a worker that grows past `memory_bytes` or dies.
    """

    def __init__(
        self,
        host: WorkerHost,
        target: dict[str, Any],
        size: int,
        timeout_s: float,
        memory_bytes: int,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._host = host
        self._target = target
        self._env = dict(env or {})
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._modules: dict[str, str] = {}
        self._sequence = 0
        self._retired_cpu_s = 0.0
        self._sent: dict[int, set[str]] = {}
        self._durations: deque[float] = deque(maxlen=256)
        self._started_cpu_s: dict[int, float] = {}
        self.workers: list[Worker] = [self._start() for _ in range(size)]

    def add_task(self, task: str, module_json: str) -> None:
        """Make a task known; workers receive it with the first build of it."""
        self._modules[task] = module_json

    @property
    def idle(self) -> int:
        """How many workers wait for a job."""
        return sum(worker.busy_since is None for worker in self.workers)

    @property
    def busy(self) -> list[Worker]:
        """The workers that are at work."""
        return [worker for worker in self.workers if worker.busy_since is not None]

    def submit(self, key: Any, task: str, trace: str) -> None:
        """Start a build on an idle worker."""
        self._sequence += 1
        path = str(self._host.scratch / f"artifact-{self._sequence}.so")
        self._send(Build(task, trace, path), key, task)

    def call(self, key: Any, function: Callable[..., Any], *args: Any) -> None:
        """Start a function of a module on an idle worker; see `Call`."""
        self._send(Call(function, args), key, None)

    def _send(self, message: Build | Call, key: Any, task: str | None) -> None:
        worker = next(w for w in self.workers if w.busy_since is None)
        if task is not None and task not in self._sent[worker.pid]:
            worker.send((task, self._modules[task]))
            self._sent[worker.pid].add(task)
        self._started_cpu_s[worker.pid] = worker.cpu_s()
        worker.send(message, job=(key, message))

    def collect(self, ready: list[Any]) -> Iterator[tuple[Any, Any]]:
        """Give (key, `Built` or a call's result) of every worker in `ready`, and of those given up."""
        for worker in list(self.workers):
            if worker.busy_since is None:
                continue
            if worker in ready:
                try:
                    answer = worker.recv()
                except EOFError:
                    yield self._given_up(worker, FailureKind.CRASH, "")
                    continue
                if isinstance(answer, Built):
                    self._durations.append(answer.seconds)
                yield worker.done()[0], answer
            elif (text := self._overdue(worker)) is not None:
                yield self._given_up(worker, FailureKind.BUILD_TIMEOUT, text)
            elif worker.rss_bytes() > self._memory_bytes:
                yield self._given_up(
                    worker, FailureKind.MEMORY, f"over {self._memory_bytes >> 20} MiB"
                )

    def call_all(
        self, calls: Mapping[Key, tuple[Callable[..., Any], tuple[Any, ...]]]
    ) -> Iterator[tuple[Key, Any]]:
        """Run functions side by side; gives each key with the result or a `Failure`, as they end.

        Args:
            calls: function and arguments by key; started in their order.
        """

        def start(key: Key) -> None:
            function, args = calls[key]
            self.call(key, function, *args)

        yield from self.work_off(calls, start)

    def work_off(
        self, keys: Iterable[Key], start: Callable[[Key], None]
    ) -> Iterator[tuple[Key, Any]]:
        """Keep the workers busy until every key's job is through; gives what `collect` gives.

        Args:
            keys: tell the jobs apart.
            start: submits or calls the job of a key; a worker is idle then.
        """
        waiting = deque(keys)
        while waiting or self.busy:
            while waiting and self.idle:
                start(waiting.popleft())
            ready = select.select(self.busy, [], [], _WAIT_S)[0]
            yield from self.collect(ready)

    def abandon(self) -> None:
        """Give up every job under way."""
        for worker in self.busy:
            self._given_up(worker, FailureKind.ABANDONED, "the run stopped")

    def cpu_s(self) -> float:
        """CPU seconds of all build workers so far."""
        return self._retired_cpu_s + sum(worker.cpu_s() for worker in self.workers)

    def close(self) -> None:
        """End every worker."""
        for worker in self.workers:
            self._retired_cpu_s += worker.cpu_s()
            worker.kill()
        self.workers.clear()

    def _start(self) -> Worker:
        worker = self._host.spawn(serve, self._target, env=self._env)
        self._sent[worker.pid] = set()
        return worker

    def _overdue(self, worker: Worker) -> str | None:
        """Why a build has to be given up: CPU time far beyond the median, or no answer for long."""
        if not isinstance(worker.job[1], Build):
            return None
        if worker.busy_s() > self._timeout_s:
            return f"no answer in {self._timeout_s:.0f} s"
        if len(self._durations) < _JUDGES:
            return None
        limit = max(_LEAST_LIMIT_S, _PATIENCE * statistics.median(self._durations))
        used = worker.cpu_s() - self._started_cpu_s[worker.pid]
        return f"over {limit:.1f} s of CPU time" if used > limit else None

    def _given_up(
        self, worker: Worker, kind: FailureKind, text: str
    ) -> tuple[Any, Built | Failure]:
        key, message = worker.done()
        self._retired_cpu_s += worker.cpu_s()
        how = worker.kill().text
        self._sent.pop(worker.pid)
        self.workers[self.workers.index(worker)] = self._start()
        failure = Failure(kind, text or how)
        return key, Built(message.path, 0.0, failure) if isinstance(message, Build) else failure


def serve(connection: Connection, target: dict[str, Any]) -> None:
    """The build worker's loop (in the worker)."""
    import tvm

    from gpu_aware_tune.kernels.traces import module_from_json

    tvm_target = tvm.target.Target(target)
    modules: dict[str, Any] = {}
    while True:
        message = connection.recv()
        if isinstance(message, Build):
            connection.send(_build(message, modules[message.task], tvm_target))
        elif isinstance(message, Call):
            connection.send(_run(message))
        else:
            task, module_json = message
            modules[task] = module_from_json(module_json)


def _run(call: Call) -> Any:
    """What a called function returns, or a failure that says what it raised."""
    try:
        return call.function(*call.args)
    except Exception as error:  # told to the parent, which knows what the call was for
        return Failure(FailureKind.ERROR, f"{type(error).__name__}: {last_line(error)}")


def _build(job: Build, module: Any, target: Any) -> Built:
    start = time.process_time()
    try:
        compile_kernel(module, job.trace, target, Path(job.path))
    except (
        Exception
    ) as error:  # whatever a bad schedule makes TVM raise is this candidate's failure
        text = f"{type(error).__name__}: {last_line(error)}"
        return Built(job.path, time.process_time() - start, Failure(FailureKind.BUILD, text))
    digest = hashlib.blake2b(Path(job.path).read_bytes(), digest_size=16).hexdigest()
    return Built(job.path, time.process_time() - start, digest=digest)


def compile_kernel(module: Any, trace: str, target: Any, path: Path) -> None:
    """Compile one kernel, exported as function "main"; it takes its weights packed.

    Args:
        module: the unscheduled task.
        trace: JSON of the schedule's trace, or UNSCHEDULED.
        target: the `tvm.target.Target`.
        path: the shared library to write.
    """
    import tvm

    from gpu_aware_tune.codegen.build_options import build_options
    from gpu_aware_tune.kernels.packing import without_packing
    from gpu_aware_tune.kernels.traces import apply_trace

    scheduled = without_packing(apply_trace(trace, module).mod) if trace else module
    with build_options(scheduled, target):
        built = tvm.tirx.build(scheduled, target=target)
    if target.kind.name != "llvm":
        from gpu_aware_tune.codegen.cuda_toolchain import export_module

        export_module(built, path, str(target.attrs["arch"]))
        return
    object_path = path.with_suffix(".o")
    built.write_to_file(str(object_path), "o")
    run_linker("-shared", "-o", str(path), str(object_path))
    object_path.unlink()


def remove(path: str) -> None:
    """Delete an artifact that is no longer needed."""
    with_object = Path(path)
    for name in (with_object, with_object.with_suffix(".o")):
        try:
            os.unlink(name)
        except FileNotFoundError:
            continue
