"""Folds what is computed from constants alone, in NumPy.

TVM's own `FoldConstant` compiles a kernel with LLVM for every expression and shape: more than half of
the time that importing a model takes. What exporters leave to fold is mostly biases that are brought
into another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

_MOST_BYTES = 256 << 20  # of one result; larger ones are left to TVM, which need not keep both

Array = np.ndarray


def _shape_of(call: Any) -> tuple[int, ...]:
    return tuple(int(extent) for extent in call.ty.shape)


def _reshaped(call: Any, arrays: Sequence[Array]) -> Array:
    return arrays[0].reshape(_shape_of(call))


def _permuted(call: Any, arrays: Sequence[Array]) -> Array:
    axes = call.attrs.axes
    return np.transpose(arrays[0], None if axes is None else [int(axis) for axis in axes])


def _broadcast(call: Any, arrays: Sequence[Array]) -> Array:
    return np.broadcast_to(arrays[0], _shape_of(call))


def _elementwise(function: Callable[..., Array]) -> Callable[[Any, Sequence[Array]], Array]:
    return lambda call, arrays: function(*arrays)


def _dequantized(call: Any, arrays: Sequence[Array]) -> Array:
    """Integers to floats as ONNX defines it, the difference in integers."""
    values, scale, zero = arrays
    if values.dtype.name not in ("int8", "uint8", "int32") or scale.dtype != np.float32:
        raise TypeError(f"dequantize of {values.dtype} with a scale of {scale.dtype}")
    along = [1] * values.ndim
    axis = int(call.attrs.axis)

    def spread(parameter: Array) -> Array:
        shape = list(along)
        if parameter.size > 1:
            shape[axis] = parameter.size
        return parameter.reshape(shape)

    moved = values.astype(np.int64) - spread(zero).astype(np.int64)
    return moved.astype(np.float32) * spread(scale)


def _taken(call: Any, arrays: Sequence[Array]) -> Array:
    values, places = arrays
    axis = None if call.attrs.axis is None else int(call.attrs.axis)
    return np.take(values, places, axis=axis, mode="clip")


_FOLDS: dict[str, Callable[[Any, Sequence[Array]], Array]] = {
    "relax.reshape": _reshaped,
    "relax.expand_dims": _reshaped,
    "relax.squeeze": _reshaped,
    "relax.dequantize": _dequantized,
    "relax.flatten": _reshaped,
    "relax.permute_dims": _permuted,
    "relax.broadcast_to": _broadcast,
    "relax.add": _elementwise(np.add),
    "relax.subtract": _elementwise(np.subtract),
    "relax.multiply": _elementwise(np.multiply),
    "relax.negative": _elementwise(np.negative),
    "relax.sqrt": _elementwise(np.sqrt),
    "relax.take": _taken,
}


def fold_constants(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with the constant expressions of `main` folded that NumPy knows.

    The results have the types that Relax gives the expressions; what NumPy would compute in another
    type is left alone.
    """

    known: dict[Any, Any] = {}  # variables that are bound to a constant

    @relax.expr_functor.mutator
    class Fold(relax.PyExprMutator):
        def visit_call_(self, op: Any) -> Any:
            call = super().visit_call_(op)
            return _folded(call) or call

        def visit_dataflow_var_(self, op: Any) -> Any:
            return known[op] if op in known else super().visit_dataflow_var_(op)

        def visit_var_binding_(self, binding: Any) -> None:
            if isinstance(binding.var, relax.DataflowVar):
                value = self.visit_expr(binding.value)
                if isinstance(value, tvm.ir.GenericConst):
                    known[binding.var] = value
                    return
            super().visit_var_binding_(binding)

    main = module["main"]
    mutator = Fold(module)
    folded = mutator.visit_expr(main)
    module = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    module.update_func(module.get_global_var("main"), folded)
    return module


def _folded(call: Any) -> Any:
    """The constant that a call of constants comes to, None where it is not folded."""
    if not isinstance(call, tvm.ir.Call) or not isinstance(call.op, tvm.ir.Op):
        return None
    fold = _FOLDS.get(str(call.op.name))
    if fold is None or not isinstance(call.ty, relax.TensorType) or call.ty.shape is None:
        return None
    constants = [arg for arg in call.args if not isinstance(arg, relax.ShapeExpr)]
    if not all(isinstance(arg, tvm.ir.GenericConst) for arg in constants):
        return None
    arrays = [arg.value.numpy() for arg in constants]
    try:
        result = np.ascontiguousarray(fold(call, arrays))
    except (TypeError, ValueError):  # a symbolic extent
        return None
    if result.dtype.name != str(call.ty.dtype) or result.nbytes > _MOST_BYTES:
        return None
    if result.shape != _shape_of(call):  # ascontiguousarray makes rank 1 of rank 0
        result = result.reshape(_shape_of(call))
    return relax.const(result, result.dtype.name)
