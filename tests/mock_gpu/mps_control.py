"""The mock's `nvidia-cuda-mps-control`: a daemon with -f, else commands from stdin to the daemon."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

SOCKET = str(Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]) / "control")  # device.c connects to it


def daemon() -> None:
    """Answer commands until one is "quit"."""
    if os.environ.get("MOCK_GPU_MPS_BROKEN"):
        (Path(os.environ["CUDA_MPS_LOG_DIRECTORY"]) / "control.log").write_text("no GPU found\n")
        sys.exit(1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(SOCKET)
        server.listen()
        while True:
            connection, _ = server.accept()
            command = ""
            with (
                connection,
                contextlib.suppress(OSError),
            ):  # a client only looks whether it is there
                command = connection.makefile().readline().strip()
                connection.sendall(answer(command).encode())
            if command == "quit":
                return


def answer(command: str) -> str:
    """What the daemon says; the server's clients are not ended by it."""
    return {"get_default_active_thread_percentage": "100.0\n"}.get(command, "")


def ask(command: str) -> None:
    """Send a command to the daemon, and print its answer."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(SOCKET)
        except OSError:
            sys.exit("Cannot find MPS control daemon process")
        client.sendall(command.encode() + b"\n")
        print(client.makefile().read(), end="")


if __name__ == "__main__":
    if sys.argv[1:] == ["-f"]:
        daemon()
    else:
        for line in sys.stdin:
            ask(line.strip())
