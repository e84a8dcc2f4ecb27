"""Child processes of benchmarks: none outlives its parent, and what a hung one told counts."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG = 1
_MARK = "ANSWER "


def die_with_parent() -> None:
    """Let the kernel end this process when its parent ends: it would keep the device busy."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_orderly() -> None:
    """Let SIGTERM, which `timeout` sends, end this process as `sys.exit` does: what it opened is closed."""

    def stop(*_: object) -> None:
        raise SystemExit(124)

    signal.signal(signal.SIGTERM, stop)


def tell(found: dict[str, Any]) -> None:
    """In a child: say what is known so far; the last one counts."""
    print(_MARK + json.dumps(found), flush=True)


def told(output: str) -> dict[str, Any] | None:
    """What a child said last, None where it said nothing."""
    for line in reversed(output.splitlines()):
        if line.startswith(_MARK):
            return dict(json.loads(line[len(_MARK) :]))
    return None


def asked(
    arguments: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None
) -> tuple[dict[str, Any] | None, str]:
    """Run `python ARGUMENTS` for at most so long.

    Returns:
        What it told last, and why it did not come to its end; "" where it did.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=ROOT,
            start_new_session=True,
        )
        why = ""
        try:
            if (code := child.wait(limit_s)) != 0:
                why = f"exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"not done in {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it started
            child.wait()
        out.seek(0)
        err.seek(0)
        lines = [line for line in err.read().splitlines() if line.strip()]
        tail = f": {lines[-1][:300]}" if why and lines else ""
        return told(out.read()), why + tail
