"""The process that every worker is forked from: imports TVM once, then only forks and reaps.

Started by `WorkerHost` as `python -m gpu_aware_tune.workers.host SOCKET_FD SCRATCH`. It never runs TVM
code or threads itself, so that forking stays safe. When its socket closes, because the parent ended
in whatever way (kill -9 included), it kills the workers, removes the scratch folder and goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import tempfile
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the host dies; it reaches stopped and looping workers too."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died between fork and prctl
        os._exit(1)


def _run_worker(fd: int, job: dict[str, Any], host_pid: int) -> None:
    """Become a worker: own process group, own environment, output to a log, then the entry."""
    os.setpgid(0, 0)
    _die_with_parent(host_pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()
    os.environ.update(job["env"])
    entry, args = pickle.loads(job["call"])
    entry(Connection(fd), *args)


def _fork(sock: socket.socket, fd: int, job: dict[str, Any]) -> int:
    host_pid = os.getpid()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # here too: it may be stopped before it gets so far
            os.setpgid(pid, pid)
        os.close(fd)
        return pid
    status = 1
    try:
        sock.close()
        _run_worker(fd, job, host_pid)
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0  # the parent is gone or closed the connection: nothing left to do
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reap(sock: socket.socket, alive: set[int]) -> None:
    """Tell the parent how each worker ended."""
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        alive.discard(pid)
        sock.send(pickle.dumps(("exit", pid, os.waitstatus_to_exitcode(status))))


def main(fd: int, scratch: str) -> None:
    """Serve fork requests until the parent goes away."""
    os.setpgid(0, 0)  # Ctrl-C in the terminal is the parent's business
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A stopped worker and a parent's end make the kernel hang up on this group: not before the end.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    sock = socket.socket(fileno=fd)
    alive: set[int] = set()
    folders = [scratch]
    with contextlib.suppress(OSError):  # in a full one, who needs a file says so
        # What workers put there is removed with it, if they are killed.
        tempfile.tempdir = tempfile.mkdtemp(prefix="gpu-aware-tune-")
        folders.append(tempfile.tempdir)
    try:
        from gpu_aware_tune.partition.thread_pool import pools_at_hand
        from gpu_aware_tune.workers.warm import load_intrinsics, load_tvm

        load_tvm()
        pools_at_hand()  # compiled once, for all that are forked; what lacks is told where it is needed
        sock.send(pickle.dumps(("ready", os.getpid(), 0)))
        while True:
            waiting: list[socket.socket | int] = [sock, wake_r]
            ready, _, _ = select.select(waiting, [], [])
            if wake_r in ready:
                os.read(wake_r, 4096)
                _reap(sock, alive)
            if sock in ready:
                data, fds, _, _ = socket.recv_fds(sock, 1 << 20, 1)
                if not data:
                    return
                job = pickle.loads(data)
                if "intrinsics" in job:
                    load_intrinsics(job["intrinsics"])
                    continue
                pid = _fork(sock, fds[0], job)
                alive.add(pid)
                sock.send(pickle.dumps(("forked", pid, 0)))
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        for pid in alive:
            try:
                os.killpg(pid, signal.SIGKILL)
            except OSError:
                os.kill(pid, signal.SIGKILL)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
