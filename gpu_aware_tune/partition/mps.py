"""A share of a GPU as an MPS client: a private control daemon for the run, a worker process for
each share.

The driver reads the percentage when a process starts, so a share is an environment and a process of
its own. A client that does not reach the daemon runs without MPS, on the whole GPU, and says
nothing: `verify` looks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.gpu_partition import GpuPartition
from gpu_aware_tune.partition.shares import Share, mps_percentage

CONTROL = "nvidia-cuda-mps-control"
_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.05
_HEALTH = (
    "get_default_active_thread_percentage"  # answers as soon as the daemon does, server or not
)

# Runs the control program in the foreground and outlives the tuner by a moment: when that ends in
# whatever way (kill -9 included), it stops the daemon and its server and removes the folder.
_SUPERVISOR = """
import contextlib, ctypes, os, shutil, signal, subprocess, sys
parent, program, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
prctl = ctypes.CDLL(None).prctl
prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    sys.exit(1)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
daemon = subprocess.Popen([program, "-f"], preexec_fn=lambda: prctl(1, signal.SIGKILL))
try:
    sys.exit(daemon.wait())
finally:
    with contextlib.suppress(Exception):
        if daemon.poll() is None:
            subprocess.run([program], input=b"quit\\n", timeout=5)
            daemon.wait(5)
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)
"""


class MpsPartition(GpuPartition):
    """One MPS client with a limit on its SMs; each needs a worker process of its own."""

    backend: ClassVar[str] = "mps"
    one_worker: ClassVar[bool] = False

    def __init__(self, share: Share, daemon: MpsDaemon) -> None:
        super().__init__(share)
        self._daemon: MpsDaemon | None = daemon
        self._env = {
            **daemon.env(),
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(
                mps_percentage(share.units, share.device.units_total)
            ),
        }
        daemon.users += 1
        self.fault_group = daemon.fault_group

    def env(self) -> dict[str, str]:
        """Where the daemon listens, which GPU it serves, and this client's limit."""
        return dict(self._env)

    def enter_worker(self) -> None:
        """Connect; the environment must be as `env()` says before this process uses CUDA."""
        wrong = [name for name, value in self._env.items() if os.environ.get(name) != value]
        if wrong:
            raise SetupError(
                f"an MPS worker must be started with {', '.join(wrong)} set: see env()"
            )
        super().enter_worker()

    def verify(self) -> None:
        """Check that this process is an MPS client, and that its limit is the one promised."""
        self._check_mps(True, "it did not reach the daemon and would use the whole GPU")
        self._check_sms("the MPS limit")
        self._probe_sms("the MPS client")

    def before_kill(self, pid: int) -> None:
        """Let the server end a client that hangs: killing one with work in flight is undefined."""
        if self._daemon is not None:
            with contextlib.suppress(SetupError):
                for server in self._daemon.control("get_server_list").split():
                    self._daemon.control(f"terminate_client {server} {pid}")

    def close(self) -> None:
        """Leave; in the process that started the daemon, the last partition stops it."""
        super().close()
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            daemon.users -= 1
            if daemon.users == 0:
                daemon.stop()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_daemon": None}


def start_partitions(shares: Sequence[Share]) -> list[MpsPartition]:
    """Start a daemon for one run, and the partitions that share it."""
    sweep()
    daemon = MpsDaemon(shares[0].device.uuid or str(shares[0].device.index))
    daemon.start()
    return [MpsPartition(share, daemon) for share in shares]


class MpsDaemon:
    """A private MPS control daemon with a folder of its own; it ends with its starter."""

    def __init__(self, gpu: str) -> None:
        """Serve the GPU named by UUID (or index)."""
        self.users = 0
        self.fault_group: list[Any] = []  # a fault of one client reaches all of this GPU
        self._gpu = gpu
        self._process: subprocess.Popen[bytes] | None = None
        self.folder: Path | None = None

    def env(self) -> dict[str, str]:
        """What the daemon and its clients must have in their environment."""
        if self.folder is None:
            raise SetupError("the MPS daemon is not running")
        return {
            "CUDA_VISIBLE_DEVICES": self._gpu,
            "CUDA_MPS_PIPE_DIRECTORY": str(self.folder / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(self.folder / "log"),
        }

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        program = find_control()
        # Short, since the path of a Unix socket ends at 108 bytes, and named by owner, so that
        # `sweep` can tell.
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir="/tmp"))
        try:
            for name in ("pipe", "log"):
                (self.folder / name).mkdir(mode=0o700)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SUPERVISOR, str(os.getpid()), program, str(self.folder)],
                env={**os.environ, **self.env()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the daemon and its server, and remove its folder; safe to call twice."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            with contextlib.suppress(SetupError):
                self.control("quit")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT_S)
        if process is not None:
            with contextlib.suppress(
                ProcessLookupError
            ):  # its own session: the server goes with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def control(self, command: str) -> str:
        """Send one command to the daemon and return its answer."""
        return run_control(command, self.env())

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self.control(_HEALTH)
                return
            except SetupError as error:
                if self._process.poll() is not None or time.monotonic() > give_up:
                    raise SetupError(
                        f"the MPS daemon did not start: {self._log() or error}"
                    ) from error
            time.sleep(_POLL_S)

    def _log(self) -> str:
        assert self.folder is not None
        with contextlib.suppress(OSError):
            lines = (self.folder / "log" / "control.log").read_text().strip().splitlines()
            return lines[-1][:300] if lines else ""
        return ""


def find_control() -> str:
    """The MPS control program's path; raises `SetupError` where there is none."""
    program = shutil.which(CONTROL)
    if program is None:
        raise SetupError(f"{CONTROL} is not on the PATH: it comes with the NVIDIA driver")
    return program


def run_control(command: str, env: dict[str, str]) -> str:
    """Run the control program once against the daemon that `env` names."""
    try:
        done = subprocess.run(
            [find_control()],
            input=command + "\n",
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=_STOP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"{CONTROL} gave no answer to {command!r}") from error
    if done.returncode:
        text = (done.stderr or done.stdout).strip()[:200]
        raise SetupError(f"{CONTROL} refused {command!r}: {text}")
    return done.stdout.strip()


def sweep(root: Path = Path("/tmp")) -> list[Path]:
    """Stop daemons and remove folders that killed runs of this user left behind."""
    removed = []
    for folder in root.glob(f"{_prefix()}*-*"):
        owner = folder.name.removeprefix(_prefix()).partition("-")[0]
        if not owner.isdigit() or Path(f"/proc/{owner}").exists():
            continue
        with contextlib.suppress(SetupError):
            run_control(
                "quit",
                {
                    "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
                    "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
                },
            )
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(folder)
    return removed


def _prefix() -> str:
    return f"gat-mps-{os.getuid()}-"
