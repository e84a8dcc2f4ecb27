"""Checks 7 to 9: MPS as an ordinary user, numbers under a cap, what a fault reaches."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

from gpu.lab import answer
from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.partition import Share, share_of
from gpu_aware_tune.partition.mps import CONTROL, MpsPartition, start_partitions

_PERCENTS = (7, 13, 25, 50, 100)
_NUMERIC_PERCENTS = (25, 34, 50, 66)
_GEMM_SIZES = [256, 1000, 2048]


def mps_as_a_user(lab: Any) -> dict[str, Any]:
    """7. A private MPS daemon gives the SMs that its percentage promises, and a missed one shows."""
    rows: list[dict[str, Any]] = []
    for percent in _PERCENTS:
        share = share_of(lab.device, percent, "mps")
        rows.append({"percent": percent, "promised": share.units, **_client(lab, share)})
    missed = lab.child("mps_client", {"CUDA_MPS_PIPE_DIRECTORY": "/nowhere"}, percent=100)
    versions = {flag: _control(flag) for flag in ("-v", "-S")}
    right = [
        row.get("mps") and row.get("sms") == row["promised"] and 0 < row["sms_seen"] <= row["sms"]
        for row in rows
    ]
    shown = ", ".join(f"{row['percent']} % {row.get('sms', row.get('error'))}" for row in rows)
    return {
        "passed": all(right) and missed.get("mps") is False,
        "text": f"SMs: {shown}; without the daemon MPS is {missed.get('mps')}",
        "rows": rows,
        "missed": missed,
        "control": versions,
    }


def numerics_under_caps(lab: Any) -> dict[str, Any]:
    """8. float16 products are right under MPS percentages and in green contexts of equal size."""
    shares = [share_of(lab.device, percent, "mps") for percent in _NUMERIC_PERCENTS]
    without = ""
    found: dict[str, Any] = {}
    try:  # all at once: numbers do not depend on who else is there, and imports take long
        with _opened(shares) as parts:
            found |= _all_at_once(
                {f"mps {part.share.percent} %": _gemm(lab, 0, part.env()) for part in parts}
            )
    except TuneError as error:
        without = f"; without MPS: {error}"
    shares = [share_of(lab.device, percent, "green") for percent in _NUMERIC_PERCENTS]
    found |= _all_at_once({f"green {s.units} SMs": _gemm(lab, s.units) for s in shares})
    tvm_right = [row.get("tvm", {}).get("right", False) for row in found.values()]
    cublas_wrong = [
        name for name, row in found.items() if row.get("cublas") and not row["cublas"]["right"]
    ]
    tried = any(row.get("cublas") for row in found.values())
    return {
        "passed": all(tvm_right),
        "text": f"TVM right in {sum(tvm_right)} of {len(found)}; cuBLAS wrong at "
        f"{', '.join(cublas_wrong) or ('none' if tried else 'not tried (no torch with CUDA)')}"
        f"{without}",
        "shares": found,
    }


def _gemm(lab: Any, green: int, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    child: subprocess.Popen[str] = lab.start_child("gemm", env, sizes=_GEMM_SIZES, green=green)
    return child


def _all_at_once(children: dict[str, subprocess.Popen[str]]) -> dict[str, Any]:
    return {name: answer(child) for name, child in children.items()}


def fault_containment(lab: Any) -> dict[str, Any]:
    """9. What one illegal access ends: clients of one MPS server, partitions of one process."""
    green = lab.child("green_fault", size=16)
    neighbour = f"the other green partition: {green.get('other') or 'went on'}"
    faulty = bool(green.get("faulty"))
    try:
        under_mps = _fault_under_mps(lab)
    except TuneError as error:
        passed = None if faulty else False
        return {"passed": passed, "text": f"without MPS: {error}; {neighbour}", "green": green}
    text = under_mps.pop("text")
    return {
        "passed": faulty and under_mps.pop("passed"),
        "text": f"{text}; {neighbour}",
        **under_mps,
        "green": green,
    }


def _fault_under_mps(lab: Any) -> dict[str, Any]:
    share = share_of(lab.device, 25, "mps")
    with _opened([share] * 3) as parts:
        children = [
            lab.start_child("client", part.env(), fault=number == 0)
            for number, part in enumerate(parts)
        ]
        for child in children:
            _wait_ready(child)
        with contextlib.suppress(OSError):
            children[0].stdin.write("fault\n")
            children[0].stdin.flush()
        during = lab.child("mps_client", parts[0].env(), percent=25)
        clients = [answer(child) for child in children]
        after = lab.child("mps_client", parts[0].env(), percent=25)
    ended = sum(bool(each.get("failed") or each.get("error")) for each in clients)
    recovered = after.get("mps") is True and after.get("sms") == share.units
    return {
        "passed": bool(clients[0].get("failed") or clients[0].get("error")) and recovered,
        "text": f"{ended} of 3 MPS clients ended, a new one meanwhile: "
        f"{during.get('error', 'was served')[-80:]}, afterwards "
        f"{'served' if recovered else 'NOT served'}",
        "clients": clients,
        "during": during,
        "after": after,
    }


@contextlib.contextmanager
def _opened(shares: list[Share]) -> Iterator[list[MpsPartition]]:
    parts = start_partitions(shares)
    try:
        yield parts
    finally:
        for part in parts:
            part.close()


def _client(lab: Any, share: Share) -> dict[str, Any]:
    try:
        with _opened([share]) as (part,):
            found: dict[str, Any] = lab.child("mps_client", part.env(), percent=share.percent)
    except TuneError as error:
        return {"error": str(error)}
    return found


def _wait_ready(child: subprocess.Popen[str]) -> None:
    """Until the client has its context; one that died is found by `answer`."""
    assert child.stdout is not None
    while (line := child.stdout.readline()) and line.strip() != "READY":
        pass


def _control(flag: str) -> str:
    """What the control program says to an option; -S (static partitions) is not in every driver."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        try:
            done = subprocess.run(
                [CONTROL, flag], env={**os.environ, **env}, input="quit\n", capture_output=True,
                text=True, timeout=10, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{type(error).__name__}: {error}"[:200]
    return f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()[:200]}"
