"""The same search spread over machines and GPUs with Ray, which is imported in here only, when used.

On every machine, or on every GPU of it, an actor holds the workers that a run without Ray has
(`node.py`). The driver keeps the records, decides what is drafted for, and hands out candidates
(`pipeline.py`, `ledger.py`). A machine that has the device measures what it builds, so that traces
and numbers are all that travels. One that has not only searches and builds; its artifacts travel to
those that have.
"""

from __future__ import annotations

import contextlib

from gpu_aware_tune.cluster.connection import connected
from gpu_aware_tune.cluster.messages import NodeSetup
from gpu_aware_tune.cluster.pipeline import ClusterPipeline

__all__ = ["ClusterPipeline", "NodeSetup", "connect"]


def connect(
    address: str, setup: NodeSetup, stack: contextlib.ExitStack
) -> tuple[ClusterPipeline, str]:
    """Connect to a Ray cluster and start workers on its machines.

    Args:
        address: "auto" or HOST:PORT.
        setup: what the workers are started with.
        stack: ends the workers, and the connection, when it is closed.

    Returns:
        The workers, which may still be starting (`ClusterPipeline.wait`), and a line on the cluster.

    Raises:
        SetupError: Ray is not installed, or there is no usable cluster at the address.
    """
    text = stack.enter_context(connected(address))
    from gpu_aware_tune.cluster.members import Members

    return stack.enter_context(ClusterPipeline(Members(setup), setup.tasks)), text
