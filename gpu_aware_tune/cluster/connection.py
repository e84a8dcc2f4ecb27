"""Joining a Ray cluster, or starting one on this machine; every error is one line."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

from gpu_aware_tune.errors import SetupError

_REACH_S = 5.0
_STORE_BYTES = 100 << 20  # messages are small; Ray would take 30 % of the memory


@contextlib.contextmanager
def connected(address: str) -> Iterator[str]:
    """Connect to Ray for the length of a `with`; gives one line that says to what.

    A cluster that was started here ends with the `with`; one that was there stays.

    Args:
        address: "auto" (the cluster this machine belongs to, else a new one of this machine alone)
            or HOST:PORT.

    Raises:
        SetupError: Ray is not installed, or there is no usable cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise SetupError(f"--ray needs Ray ({error}): pip install 'gpu-aware-tune[ray]'") from error
    if ray.is_initialized():
        yield "the Ray cluster that this process belongs to"
        return
    try:
        yield _join(ray, address)
    finally:
        ray.shutdown()


def _join(ray: Any, address: str) -> str:
    if address != "auto":
        _reach(address)
        _init(ray, address)
        return f"Ray cluster {address}"
    try:
        _init(ray, "auto")
        return f"Ray cluster {ray.get_runtime_context().gcs_address}"
    except ConnectionError:  # none is there
        start_alone(ray)
        return "a Ray cluster of this machine alone: none was running"


def start_alone(ray: Any) -> None:
    """Start a cluster of this machine alone, which listens on loopback only."""
    from ray._private import ray_constants

    os.environ.setdefault("RAY_worker_niceness", "0")  # see actor.py
    # With this off, as on systems where Ray supports no clusters, it takes loopback for this machine's
    # address and listens nowhere else. `_node_ip_address="127.0.0.1"` would not do: Ray takes it for the
    # address that others reach.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        _init(ray, "local", object_store_memory=_STORE_BYTES, include_dashboard=False)
    finally:  # the next cluster may be one of several machines
        ray_constants.ENABLE_RAY_CLUSTER = before


def _init(ray: Any, address: str, **options: Any) -> None:
    """Call `ray.init`; what is wrong with a cluster becomes one line."""
    try:
        # Workers print where this process prints: the command line shows that with -v only.
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True, **options)
    except ConnectionError:
        if address == "auto":
            raise
        raise SetupError(
            f"--ray {address}: this machine is no part of that cluster:"
            f" run `ray start --address={address}` on it first"
        ) from None
    except Exception as error:  # Ray raises RuntimeError, ValueError and its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = " ".join(lines)[:300] or type(error).__name__
        fix = "install the cluster's versions of Ray and Python here" if "ersion" in text else (
            f"see `ray status --address={address}`" if address != "local" else "see `ray start`"
        )  # fmt: skip
        raise SetupError(f"--ray {address}: Ray refused ({text}): {fix}") from error


def _reach(address: str) -> None:
    """Look whether anything listens, since Ray itself waits for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except OSError as error:
        raise SetupError(
            f"--ray {address}: nothing answers there ({error.strerror or error}):"
            " give the address that `ray start --head` printed, or auto"
        ) from error
