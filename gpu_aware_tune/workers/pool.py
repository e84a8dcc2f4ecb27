"""The parent's side of the workers: start, talk, pause, kill."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import SetupError

_START_TIMEOUT_S = 120.0  # TVM's import on a machine that is busy with other things
_SCRATCH_MIN_BYTES = 256 << 20


@dataclass(frozen=True)
class Exit:
    """How a worker ended: its exit code (negative: the signal) and the last lines it printed."""

    code: int | None
    output: str

    @property
    def text(self) -> str:
        """One line for a failure record."""
        if self.code is not None and self.code < 0:
            how = f"killed by {signal.Signals(-self.code).name}"
        else:
            how = f"exit code {self.code}"
        said = re.split("Fatal Python error|!+ Segfault encountered", self.output)[0]
        lines = [line for line in said.splitlines() if line.strip()]
        return f"{how}: {lines[-1][:300]}" if lines else how


class Worker:
    """One worker process; `busy_since` is None while it waits for a job."""

    def __init__(self, host: WorkerHost, pid: int, connection: Connection, log: Path) -> None:
        self.pid = pid
        self.busy_since: float | None = None
        self.job: Any = None
        self._host = host
        self._connection = connection
        self._log = log
        self._paused_at: float | None = None
        self._paused_s = 0.0
        self._died = False
        self._cores: frozenset[int] | None = None

    def fileno(self) -> int:
        """The connection's descriptor, for `select`."""
        return self._connection.fileno()

    def send(self, message: Any, job: Any = None) -> None:
        """Hand over a message; the worker counts as busy until `recv`.

        A worker that died meanwhile is noticed when it is read from, not here.
        """
        self.busy_since, self.job, self._paused_s = time.monotonic(), job, 0.0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(message)

    def recv(self) -> Any:
        """The worker's next message; raises EOFError when it died."""
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._died = True
            raise EOFError(str(error)) from error

    def done(self) -> Any:
        """Mark the worker idle; returns the job it was given."""
        job, self.job, self.busy_since = self.job, None, None
        return job

    def busy_s(self) -> float:
        """Seconds spent on the current job, without the time it was paused."""
        if self.busy_since is None:
            return 0.0
        now = time.monotonic() if self._paused_at is None else self._paused_at
        return now - self.busy_since - self._paused_s

    def pause(self) -> None:
        """Stop the process (SIGSTOP); its clock stops too."""
        if self._paused_at is None:
            self._paused_at = time.monotonic()
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        if self._paused_at is not None:
            self._paused_s += time.monotonic() - self._paused_at
            self._paused_at = None
            self._signal(signal.SIGCONT)

    @property
    def paused(self) -> bool:
        """Whether the process is stopped."""
        return self._paused_at is not None

    def confine(self, cores: Iterable[int] | None) -> None:
        """Keep the process on some cores; None gives it all of this process's again."""
        wanted = None if cores is None else frozenset(cores)
        if wanted == self._cores:
            return
        self._cores = wanted
        with contextlib.suppress(OSError):
            os.sched_setaffinity(self.pid, wanted or os.sched_getaffinity(0))

    def rss_bytes(self) -> int:
        """Resident memory that is the worker's own (shared pages of the host left out)."""
        try:
            fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        except OSError:
            return 0
        return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """CPU seconds (user and system) of the process so far."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        ticks = sum(int(value) for value in fields[11:15])  # own and reaped children's
        return ticks / os.sysconf("SC_CLK_TCK")

    def kill(self) -> Exit:
        """End the process and its children at once; says how it ended."""
        code = self._host.exit_code(self.pid, 1.0) if self._died else None  # its own way, if any
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        self._signal(signal.SIGKILL)
        self._connection.close()
        if code is None:
            code = self._host.exit_code(self.pid)
        return Exit(code, self._output())

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _output(self) -> str:
        try:
            return self._log.read_text(errors="replace")[-4000:]
        except OSError:
            return ""


class WorkerHost:
    """Starts the host process and forks workers from it; a context manager.

    Args:
        env: environment variables for every worker, on top of this process's own.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self.scratch = _scratch_folder()
        self._exits: dict[int, int] = {}
        self._sequence = 0
        self._socket, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "gpu_aware_tune.workers.host"]
        # One thread for each worker: more would fight over the cores (see docs/layout.md).
        settings = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **(env or {})}
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        self._log = self.scratch / "host.log"
        with child, open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [*command, str(child.fileno()), str(self.scratch)],
                pass_fds=[child.fileno()],
                env={**os.environ, **settings, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._ready = False

    def __enter__(self) -> WorkerHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def spawn(
        self, entry: Callable[..., None], *args: Any, env: Mapping[str, str] | None = None
    ) -> Worker:
        """Fork a worker that runs `entry` with a connection and `args`.

        Args:
            entry: a function of a module, which the worker imports; the host never does.
            args: what it gets after the connection; all of it must fit one message.
            env: environment variables of the worker, on top of the host's.

        Raises:
            SetupError: the host could not start, with the last line it printed.
        """
        self._wait_ready()
        self._sequence += 1
        log = self.scratch / f"worker-{self._sequence}.log"
        mine, theirs = socket.socketpair()
        # Pickled twice, so that only the worker imports the function's module.
        call = pickle.dumps((entry, args))
        job = {"call": call, "env": dict(env or {}), "log": str(log)}
        with theirs:
            try:
                socket.send_fds(self._socket, [pickle.dumps(job)], [theirs.fileno()])
            except OSError as error:
                raise self._lost() from error
        pid = int(self._next("forked")[1])
        return Worker(self, pid, Connection(mine.detach()), log)

    def load_intrinsics(self, kind: str) -> None:
        """Have workers that are forked from now on know the tensor intrinsics of a kind of target.

        Returns at once; the next `spawn` waits for it.
        """
        self._wait_ready()
        with contextlib.suppress(OSError):  # the next `spawn` tells why
            self._socket.send(pickle.dumps({"intrinsics": kind}))

    def exit_code(self, pid: int, timeout_s: float = 5.0) -> int | None:
        """The exit code of a worker that ended; None when the host did not say so in time."""
        end = time.monotonic() + timeout_s
        while pid not in self._exits:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                return None
            try:
                self._receive()
            except SetupError:
                return None
        return self._exits.pop(pid)

    def close(self) -> None:
        """End the host and every worker; the scratch folder goes with them."""
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _wait_ready(self) -> None:
        if not self._ready:
            self._next("ready", _START_TIMEOUT_S)
            self._ready = True

    def _next(self, kind: str, timeout_s: float = 60.0) -> Sequence[Any]:
        """The host's next message of a kind; exits that come in between are kept."""
        while True:
            if not select.select([self._socket], [], [], timeout_s)[0]:
                raise SetupError(f"the worker host did not answer within {timeout_s:.0f} s")
            message = self._receive()
            if message[0] == kind:
                return message

    def _receive(self) -> Sequence[Any]:
        try:
            data = self._socket.recv(1 << 16)
        except OSError as error:
            raise self._lost() from error
        if not data:
            raise self._lost()
        message: Sequence[Any] = pickle.loads(data)
        if message[0] == "exit":
            self._exits[message[1]] = message[2]
        return message

    def _lost(self) -> SetupError:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        why = lines[-1] if lines else "no output"
        return SetupError(f"the worker host ended unexpectedly: {why}")


def scratch_place() -> Path:
    """Where artifacts lie: in memory where there is room, else in the temporary folder."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK):
        found = os.statvfs(memory)
        runs = not found.f_flag & os.ST_NOEXEC  # containers forbid to load libraries from there
        if runs and found.f_bavail * found.f_frsize > _SCRATCH_MIN_BYTES:
            return memory
    return Path(tempfile.gettempdir())


def _scratch_folder() -> Path:
    """A folder for artifacts."""
    try:
        return Path(tempfile.mkdtemp(prefix="gpu-aware-tune-", dir=scratch_place()))
    except OSError as error:
        raise SetupError(
            f"no folder for temporary files: {error}; free space or set TMPDIR"
        ) from error
