"""A fused model and the traces chosen for its kernels -> an executable in which just those run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline as cpu_pipeline
from tvm.relax.backend.cuda import pipeline as cuda_pipeline

from gpu_aware_tune.codegen.build_options import build_options
from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.kernels.packing import pack_at_load
from gpu_aware_tune.kernels.traces import task_hash
from gpu_aware_tune.records.tvm_database import memory_database

if TYPE_CHECKING:
    from gpu_aware_tune.model.importer import Model


def compile_model(
    model: Model, target: tvm.target.Target, traces: Mapping[str, str]
) -> relax.VMExecutable:
    """Compile a model with one chosen schedule per kernel.

    Args:
        model: what `load_model` gave.
        target: what to compile for.
        traces: trace JSON by task hash. A task without one stays unscheduled on a CPU and gets
            TVM's rule-made schedule on a GPU, where an unscheduled kernel is not valid.

    Returns:
        An executable whose `main` takes the inputs, then the weights as `packing.packed` gives them.

    Raises:
        TuneError: a trace does not fit its task, or a scheduled kernel did not reach the library.
    """
    return compile_module(model.module, target, traces)


def compile_module(
    module: tvm.IRModule, target: tvm.target.Target, traces: Mapping[str, str]
) -> relax.VMExecutable:
    """Compile a fused Relax module; see `compile_model`."""
    return build(prepare(module, target, traces), target)


def compile_shares(
    module: tvm.IRModule, shares: Mapping[int, tuple[tvm.target.Target, Mapping[str, str]]]
) -> relax.VMExecutable:
    """Compile a fused Relax module for several shares at once; see `merge_shares`.

    Args:
        module: what `load_model` gave.
        shares: target and traces (as in `compile_model`) by units.
    """
    # The targets differ in the number of units only, which decides nothing from here on.
    return build(prepare_shares(module, shares), shares[max(shares)][0])


def prepare_shares(
    module: tvm.IRModule, shares: Mapping[int, tuple[tvm.target.Target, Mapping[str, str]]]
) -> tvm.IRModule:
    """The module that is built for several shares; see `compile_shares`."""
    return merge_shares(
        {units: prepare(module, target, traces) for units, (target, traces) in shares.items()}
    )


def merge_shares(modules: Mapping[int, tvm.IRModule]) -> tvm.IRModule:
    """Put one model's modules for several shares into one; equal kernels are in it once.

    Args:
        modules: scheduled modules by units.

    Returns:
        A module with each share's functions under their names with `_UNITS` behind: what is `main`
        for 2 units is `main_2`.
    """
    builder = relax.BlockBuilder()
    for units, module in modules.items():
        kernels = {
            variable.name_hint: builder.add_func(function, variable.name_hint)
            for variable, function in module.functions.items()
            if not isinstance(function, relax.Function)
        }
        for variable, function in module.functions.items():
            if isinstance(function, relax.Function):
                name = f"{variable.name_hint}_{units}"
                moved = _Redirect(kernels).visit_expr(function).with_attr("global_symbol", name)
                if builder.add_func(moved, name).name_hint != name:
                    raise TuneError(f"the model has a kernel named {name}: shares cannot be merged")
    return builder.get()


@relax.expr_functor.mutator
class _Redirect(relax.PyExprMutator):
    """Lets calls go to the kernels of another module, by the names they had."""

    def __init__(self, kernels: Mapping[str, Any]) -> None:
        super().__init__()
        self.kernels = dict(kernels)

    def visit_global_var_(self, variable: Any) -> Any:
        """Replace a kernel's variable."""
        return self.kernels.get(variable.name_hint, variable)


def prepare(
    module: tvm.IRModule, target: tvm.target.Target, traces: Mapping[str, str]
) -> tvm.IRModule:
    """The module that is built for one share."""
    return pack_at_load(schedule_module(module, target, traces))


def build(module: tvm.IRModule, target: tvm.target.Target) -> relax.VMExecutable:
    """Build what `prepare` gave; for a CPU `side_by_side` does so in less time."""
    with build_options(module, target, checks=True):
        return relax.build(module, target=target, relax_pipeline=lowering(target))


def schedule_module(
    module: tvm.IRModule, target: tvm.target.Target, traces: Mapping[str, str]
) -> tvm.IRModule:
    """Give a copy of a fused module whose kernels have the chosen schedules."""
    with target:
        # First, because a scheduled reshape is no longer known to be one and would copy.
        module = relax.transform.RewriteDataflowReshape()(module)
    kernels = _kernels(module)
    chosen = {name: trace for name, trace in traces.items() if trace and name in kernels}
    database = memory_database(kernels, chosen, target)
    with target, database:
        module = relax.transform.MetaScheduleApplyDatabase()(module)
    _check_scheduled(module, len(chosen))
    if target.kind.name != "llvm":
        module = _gpu_fallback(module, target)
    return module


def _kernels(module: tvm.IRModule) -> dict[str, tvm.IRModule]:
    """The module's kernels by task hash, each as TVM's tuner sees it."""
    normalize = tvm.get_global_func("tvm.s_tir.meta_schedule.normalize_mod")
    kernels = {}
    for function in module.functions.values():
        if isinstance(function, tvm.tirx.PrimFunc):
            kernel = normalize(function)
            kernels[task_hash(kernel)] = kernel
    return kernels


def _check_scheduled(module: tvm.IRModule, chosen: int) -> None:
    """Fail where a chosen schedule was lost: the library would be slow, and nobody would see."""
    scheduled = sum(is_scheduled(function) for function in module.functions.values())
    if scheduled < chosen:
        raise TuneError(f"only {scheduled} of {chosen} chosen schedules could be applied")


def is_scheduled(function: Any) -> bool:
    """Whether a function is a kernel with a schedule."""
    return (
        isinstance(function, tvm.tirx.PrimFunc)
        and function.attrs is not None
        and bool(function.attrs.get("tirx.is_scheduled", False))
    )


def _gpu_fallback(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Give every kernel without a schedule one that binds threads."""
    from tvm.s_tir import dlight

    rules = dlight.ApplyDefaultSchedule(
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    # A copy: the pass changes the module it is given.
    copy = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    with target:
        return rules(copy)


def lowering(target: tvm.target.Target) -> Any:
    """The passes after fusion only: fusing again would throw the schedules away.

    They are taken from the target's own module, because `relax.pipeline.dataflow_lower_passes`
    raises for llvm and for cuda in TVM 0.27.
    """
    passes = cpu_pipeline if target.kind.name == "llvm" else cuda_pipeline
    stages = [*passes.dataflow_lower_passes(target), *passes.finalize_passes(target)]

    @tvm.transform.module_pass(opt_level=0, name="gpu_aware_tune.lower")
    def lower(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        with target:
            return tvm.transform.Sequential([relax.transform.LegalizeOps(), *stages])(module)

    return lower
