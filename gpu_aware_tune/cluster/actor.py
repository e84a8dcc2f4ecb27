"""The Ray actor around a `Node`: the one thing that runs inside a Ray worker."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import ray

from gpu_aware_tune.cluster.messages import Batch, NodeSetup, ToNode
from gpu_aware_tune.cluster.node import Node

_CLOSE_S = 15.0
_WATCH_S = 0.5


@ray.remote(concurrency_groups={"post": 1, "poll": 1})
class NodeActor:
    """Passes messages on; a group with one thread each, so that they stay in order."""

    def __init__(self, setup: NodeSetup, part: tuple[int, int], measures: bool) -> None:
        _die_with_parent()
        _be_as_nice_as_the_raylet()
        self._node = Node(setup, _own_gpu() if measures else None, part)

    @ray.method(concurrency_group="post")
    def post(self, messages: Sequence[ToNode]) -> None:
        """See `Node.post`."""
        self._node.post(messages)

    @ray.method(concurrency_group="poll")
    def poll(self, wait_s: float) -> Batch:
        """See `Node.poll`."""
        return self._node.poll(wait_s)

    @ray.method(concurrency_group="post")
    def close(self) -> None:
        """End the workers in good order."""
        self._node.close(_CLOSE_S)


def _die_with_parent() -> None:
    """End this process soon after its raylet ended in whatever way; its workers end with it.

    Ray's own workers do not always: an actor of a raylet that got SIGKILL was seen to stay.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _be_as_nice_as_the_raylet() -> None:
    """Undo the low priority that Ray gives its workers, where that is allowed.

    At niceness 15 anything else on the machine takes the cores from under a measurement.
    """
    wanted = os.getpriority(os.PRIO_PROCESS, os.getppid())
    if os.getpriority(os.PRIO_PROCESS, 0) > wanted:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, wanted)
        except PermissionError:
            print(
                "this worker runs at low priority, which makes timings less steady:"
                " set RAY_worker_niceness=0 where `ray start` is called"
            )


def _own_gpu() -> int:
    """The number of the GPU that Ray gave this actor a part of, as CUDA counts here; 0 without one.

    Ray is told to leave CUDA_VISIBLE_DEVICES alone, because MPS and MIG need it for themselves.
    """
    ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if not ids:
        return 0
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible.index(ids[0]) if ids[0] in visible else int(ids[0])
