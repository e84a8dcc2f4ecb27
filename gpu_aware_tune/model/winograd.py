"""3x3 convolutions of a model in Winograd's form, where that saves more than it costs.

The filters become 16/9 as large, in memory and on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from gpu_aware_tune.kernels.schedules.tile_cost import Machine
from gpu_aware_tune.kernels.schedules.winograd import can_divide
from gpu_aware_tune.kernels.winograd import (
    Convolution,
    convolution_of,
    transformed,
    with_winograd,
)
from gpu_aware_tune.model.layouts import bindings, is_kernel_call, rewired

# Of each tile, transforms take time with inputs + outputs, what is saved goes with their product: from
# 24 channels on both sides (or 16 and 48) it was faster in `benchmarks/winograd.py`.
_CHANNELS = 12.0
# Of 7x7 images there are 16: in a model, whose filters come from memory, the direct form is faster.
_TILES = 25


@dataclass(frozen=True)
class Transformed:
    """A module with convolutions in Winograd's form, and the weights as it takes them."""

    module: tvm.IRModule
    weights: dict[str, np.ndarray]


def to_winograd(
    module: tvm.IRModule, weights: Mapping[str, np.ndarray], machine: Machine
) -> Transformed:
    """Compute convolutions in Winograd's form, where it pays.

    Args:
        module: what `layouts.to_nchwc` gave.
        weights: by name, as it takes them.
        machine: the CPU.

    Returns:
        The module, whose changed kernels have names that end in `_winograd`, and its weights. A
        convolution stays as it is where something else reads its filter, too.
    """
    main = module["main"]
    first = int(main.attrs["num_input"])
    named = dict(zip(list(main.params)[first:], weights, strict=True))
    fitting = _fitting(module, set(named), machine)
    kernels: dict[Any, tuple[str, Any]] = {}
    stored, parameters = dict(weights), {}
    made: dict[str, Any] = {}
    for call, convolution in fitting.items():
        name = call.args[0].name_hint
        if name not in made:
            made[name] = with_winograd(module[name], convolution)
        kernels[call] = f"{name}_winograd", made[name]
        variable = call.args[1][convolution.parameter]
        if variable not in parameters:
            weight = named[variable]
            stored[weight] = transformed(weights[weight])
            type_ = relax.TensorType(stored[weight].shape, variable.ty.dtype)
            parameters[variable] = relax.Var(weight, type_)
    if not kernels:
        return Transformed(module, dict(weights))
    return Transformed(rewired(module, kernels, parameters), stored)


def pays(convolution: Convolution, machine: Machine) -> bool:
    """Whether a convolution is expected to be faster so."""
    inputs, outputs = convolution.inputs, convolution.outputs
    batch, down, across = convolution.tiles
    if inputs * outputs < _CHANNELS * (inputs + outputs) or batch * down * across < _TILES:
        return False
    return can_divide(down, across, machine)


def _fitting(module: tvm.IRModule, weights: set[Any], machine: Machine) -> dict[Any, Convolution]:
    """The calls of kernels to be changed, whose filters are weights that nothing else reads."""
    known: dict[str, Convolution | None] = {}
    found: dict[Any, Convolution] = {}
    used: dict[Any, int] = {}

    def count(node: Any) -> None:
        if isinstance(node, relax.Var):
            used[node] = used.get(node, 0) + 1

    relax.analysis.post_order_visit(module["main"].body, count)
    filters: dict[Any, int] = {}
    for _, value in bindings(module["main"]):
        if not is_kernel_call(value):
            continue
        name = value.args[0].name_hint
        if name not in known:
            known[name] = convolution_of(module[name])
        convolution = known[name]
        if convolution is not None and pays(convolution, machine):
            variable = value.args[1][convolution.parameter]
            if variable in weights:
                found[value] = convolution
                filters[variable] = filters.get(variable, 0) + 1
    return {
        call: convolution
        for call, convolution in found.items()
        if filters[variable := call.args[1][convolution.parameter]] == used[variable]
    }
