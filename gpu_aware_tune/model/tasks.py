"""The unique kernels of a model: what gets tuned, and how much each weighs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm

    from gpu_aware_tune.model.importer import Model

Args = tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Task:
    """One unique kernel of the model.

    Args:
        hash: TVM's structural hash of `module` as a decimal string, stable between processes.
        name: the function's name in the fused model.
        module: the unscheduled kernel as TVM's tuner sees it (one PrimFunc named "main").
        weight: how often one inference runs it.
        flops: floating point operations of one run.
        args: (shape, dtype) of every buffer it takes, outputs last.
    """

    hash: str
    name: str
    module: tvm.IRModule
    weight: int
    flops: float
    args: Args

    @functools.cached_property
    def module_json(self) -> str:
        """The module as JSON, as workers and the record store take it."""
        from gpu_aware_tune.kernels.traces import module_to_json

        return module_to_json(self.module)


def extract(model: Model, target: tvm.target.Target) -> list[Task]:
    """List a fused model's tasks, heaviest first (flops x weight).

    Source: `tvm.s_tir.meta_schedule.relax_integration.extract_tasks`, so that hashes match the
    functions the database is later applied to.
    """
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

    from gpu_aware_tune.kernels.traces import task_hash

    tasks = []
    for extracted in extract_tasks(model.module, target):
        module = extracted.dispatched[0]
        args = _args(module)
        if args is None:
            continue  # dynamic shapes cannot be tuned; the library keeps its unscheduled kernel
        tasks.append(
            Task(
                hash=task_hash(module),
                name=str(extracted.task_name),
                module=module,
                weight=int(extracted.weight),
                flops=_flops(module),
                args=args,
            )
        )
    return sorted(tasks, key=lambda task: (-task.flops * task.weight, task.name))


def _args(module: tvm.IRModule) -> Args | None:
    """The kernel's buffers; None where a shape is dynamic."""
    from tvm.s_tir.meta_schedule.arg_info import ArgInfo

    try:
        infos = ArgInfo.from_entry_func(module, remove_preproc=True)
        return tuple((tuple(int(extent) for extent in i.shape), str(i.dtype)) for i in infos)
    except (TypeError, ValueError, AttributeError):
        return None


def _flops(module: tvm.IRModule) -> float:
    from tvm.s_tir.analysis import estimate_tir_flops

    try:
        return float(estimate_tir_flops(module))
    except Exception:  # TVM knows no count for some intrinsics; the task then counts as light
        return 0.0
