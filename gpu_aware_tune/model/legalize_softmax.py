"""Softmax on CPUs, of rows that vectors do not divide: computed a little longer, with zeros at the end.

Of the 197 tokens of a ViT or the 49 of a window no number of lanes is a whole part, so that sums along a
row would go one element at a time. With minus infinity behind, a row keeps its maximum, and what the
rest adds to its sum is exp(-inf) = 0.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import te, tirx, topi


def softmax(builder: Any, call: Any) -> Any:
    """Legalize `relax.nn.softmax`, on CPUs with padded rows where that pays."""
    rank = len(call.ty.shape)
    axis = int(call.attrs.axis) % rank
    length = call.ty.shape[axis]
    lanes = _lanes(str(call.ty.dtype))
    if axis == rank - 1 and isinstance(length, tirx.IntImm) and lanes < int(length):
        padding = -int(length) % lanes
        if padding:
            return builder.call_te(_padded, call.args[0], padding, primfunc_name_hint="softmax")
    return builder.call_te(topi.nn.softmax, call.args[0], axis, primfunc_name_hint="softmax")


def _lanes(dtype: str) -> int:
    """Elements of a vector of the target; 1 where rows are not padded."""
    target = tvm.target.Target.current()
    if dtype != "float32" or target is None or target.kind.name != "llvm":
        return 1
    from gpu_aware_tune.kernels.schedules.cpu import machine_of

    return int(machine_of(target).lanes)


def _padded(x: te.Tensor, padding: int) -> te.Tensor:
    *rows, length = x.shape
    before = [0] * len(x.shape)
    after = [*before[1:], padding]
    low = tirx.const(float("-inf"), x.dtype)
    padded = topi.nn.pad(x, before, after, low, name="T_softmax_pad")
    whole = int(length) + padding
    k, again = (te.reduce_axis((0, whole), name=name) for name in ("k", "again"))
    largest = te.compute(rows, lambda *i: te.max(padded(*i, k), axis=k), name="T_softmax_maxelem")
    powers = te.compute(
        [*rows, whole], lambda *i: te.exp(padded(*i) - largest(*i[:-1])), name="T_softmax_exp"
    )
    total = te.compute(
        rows, lambda *i: te.sum(powers(*i, again), axis=again), name="T_softmax_expsum"
    )
    return te.compute(x.shape, lambda *i: powers(*i) / total(*i[:-1]), name="T_softmax_norm")
