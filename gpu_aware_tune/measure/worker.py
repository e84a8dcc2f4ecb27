"""The measuring worker: holds one partition, and the inputs of the current task."""

from __future__ import annotations

import dataclasses
import gc
import importlib
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from gpu_aware_tune.measure.timing import Effort, measure
from gpu_aware_tune.measurement import Measurement

if TYPE_CHECKING:
    from gpu_aware_tune.partition import Partition


@dataclasses.dataclass(frozen=True)
class Job:
    """One artifact to measure.

    Args:
        path: the shared library that holds the kernel as function "main".
        args: (shape, dtype) of each buffer the kernel takes, in order.
        task: hash of the task: inputs are allocated anew only when it changes.
        best_s: the best seconds known on this partition, or None.
        effort: when to stop.
    """

    path: str
    args: tuple[tuple[tuple[int, ...], str], ...]
    task: str
    best_s: float | None
    effort: Effort


def serve(connection: Connection, partition: Partition) -> None:
    """Answer jobs until the connection closes; the first answer says whether the partition stands."""
    try:
        partition.enter_worker()
        partition.verify()
    except Exception as error:  # told to the parent, which names the partition and stops the run
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    inputs = _Inputs(partition)
    gc.disable()  # no collection in the middle of a timing
    while True:
        job: Job = connection.recv()
        connection.send(_measure(job, inputs, partition))


class _Inputs:
    """The buffers of one task on the partition's device, made once."""

    def __init__(self, partition: Partition) -> None:
        import tvm

        on_gpu = partition.share.device.kind == "cuda"
        self.device = tvm.cuda(partition.ordinal) if on_gpu else tvm.cpu()
        self._task = ""
        self._buffers: list[Any] = []

    def of(self, job: Job) -> list[Any]:
        """Random floats in [0, 1); zeros for integers, so that an index is always valid."""
        if job.task != self._task:
            import numpy as np
            import tvm

            self._buffers.clear()
            rng = np.random.default_rng(0)
            for shape, dtype in job.args:
                if dtype.startswith("float"):
                    host = rng.random(shape, dtype=np.float32).astype(dtype)
                else:
                    host = np.zeros(shape, dtype=dtype)
                self._buffers.append(tvm.runtime.tensor(host, self.device))
            self._task = job.task
        return self._buffers


def _measure(job: Job, inputs: _Inputs, partition: Partition) -> Measurement:
    import tvm

    try:
        buffers = inputs.of(job)
        module = tvm.runtime.load_module(job.path)
    except (
        Exception
    ) as error:  # whatever a bad artifact makes TVM raise is this candidate's failure
        return Measurement.failed("load", f"{type(error).__name__}: {error}"[:500])

    def timer(number: int, repeat: int) -> list[float]:
        evaluator = module.time_evaluator("main", inputs.device, number=number, repeat=repeat)
        with partition.timing_context():
            results = list(evaluator(*buffers).results)
        partition.sync()
        return results

    try:
        return measure(timer, job.best_s, job.effort)
    except Exception as error:  # as above: a kernel that refuses to run is a value
        return Measurement.failed("run", f"{type(error).__name__}: {error}"[:500])


def call(
    connection: Connection, partition: Partition, function: str, args: tuple[Any, ...]
) -> None:
    """Run "module:function"(*args) once inside a partition and send what it returns."""
    partition.enter_worker()
    partition.verify()
    module, _, name = function.partition(":")
    with partition.timing_context():
        connection.send(getattr(importlib.import_module(module), name)(*args))
