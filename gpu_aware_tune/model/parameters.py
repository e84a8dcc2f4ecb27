"""The parameters of an imported module's main: inputs with plain names, then the weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tvm

HOISTED_ELEMENTS = 256  # larger constants become parameters of main


def plainly_named(module: tvm.IRModule) -> tvm.IRModule:
    """Name the inputs of main with letters, digits and underscores.

    Kernels name their arguments after them, and TVM writes these names into CUDA source as they are:
    one that reads "gpu_0/data_0" would not compile.
    """
    from tvm import relax

    main = module["main"]
    renamed = {
        parameter: relax.Var(f"input_{number:04d}", parameter.ty)
        for number, parameter in enumerate(main.params)
        if not re.fullmatch(r"[A-Za-z]\w*", parameter.name, re.ASCII)
    }
    if not renamed:
        return module

    @relax.expr_functor.mutator
    class Rename(relax.PyExprMutator):
        def visit_var_(self, op: relax.Var) -> Any:
            return renamed.get(op, op)

    parameters = [renamed.get(parameter, parameter) for parameter in main.params]
    return _with_main(module, parameters, Rename(module).visit_expr(main.body))


def _with_main(module: tvm.IRModule, parameters: Sequence[Any], body: Any) -> tvm.IRModule:
    """The module with other parameters and another body of main."""
    import tvm
    from tvm import relax

    main = module["main"]
    function = relax.Function(parameters, body, main.ret_ty, main.is_pure, main.attrs)
    module = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    module.update_func(module.get_global_var("main"), function)
    return module


def _in_place(value: Any) -> np.ndarray:
    """A constant of TVM's as an array in the same memory, which nobody changes; a copy of types like
    bfloat16, which NumPy does not exchange."""
    try:
        return np.from_dlpack(value)
    except RuntimeError:
        copied: np.ndarray = value.numpy()
        return copied


def hoist_constants(module: tvm.IRModule) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """Turn the large constants of main into parameters behind the inputs."""
    from tvm import relax

    weights: dict[str, np.ndarray] = {}
    variables: dict[Any, relax.Var] = {}
    parameters: list[relax.Var] = []

    @relax.expr_functor.mutator
    class Hoist(relax.PyExprMutator):
        def visit_generic_const_(self, op: tvm.ir.GenericConst) -> Any:
            if not isinstance(op.ty, relax.TensorType):
                return op
            array = _in_place(op.value)
            if array.size <= HOISTED_ELEMENTS:
                return op
            if op.value not in variables:
                name = f"weight_{len(parameters):04d}"
                weights[name] = array
                variables[op.value] = relax.Var(name, op.ty)
                parameters.append(variables[op.value])
            return variables[op.value]

    main = module["main"]
    body = Hoist(module).visit_expr(main.body)
    return _with_main(module, [*main.params, *parameters], body), weights
