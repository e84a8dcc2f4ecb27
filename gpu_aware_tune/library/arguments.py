"""What a caller gives to a library: arrays by input name, units, how often to run."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from ml_dtypes import bfloat16

from gpu_aware_tune.errors import UserError, one_line
from gpu_aware_tune.model.importer import TensorSpec

_HOST = (1, 3)  # DLPack's kDLCPU and kDLCUDAHost: memory that NumPy can read


def check_inputs(specs: Sequence[TensorSpec], inputs: Mapping[str, Any]) -> list[np.ndarray]:
    """Give the inputs as arrays of the host, in the order of `specs`.

    Args:
        specs: the model's inputs.
        inputs: NumPy arrays by name, or what gives its content through DLPack: tensors of TVM,
            PyTorch, JAX and others, on any device.

    Raises:
        UserError: one is missing, unknown, no array, or of another shape or type.
    """
    names = ", ".join(one_line(spec.name) for spec in specs)
    if not isinstance(inputs, Mapping):
        example = ", ".join(f"{one_line(spec.name)!r}: array" for spec in specs)
        raise UserError(
            f"the inputs are a {type(inputs).__name__}: give arrays by name, library({{{example}}})"
        )
    known = {spec.name for spec in specs}
    for name in inputs:
        if name not in known:
            raise UserError(f"unknown input {name!r}: the inputs are {names}")
    return [_checked(spec, inputs, names) for spec in specs]


def check_units(units: Any) -> int:
    """The units that a caller asks for.

    Raises:
        UserError: they are no whole number, or below 1.
    """
    count = _whole(units)
    if count is None:
        raise UserError(f"{units!r} units: give a whole number of cores or SMs")
    if count < 1:
        raise UserError(f"{count} units: a share has at least 1")
    return count


def check_effort(repeat: Any, seconds: Any) -> int | None:
    """How often to run, None where that follows from `seconds`.

    Raises:
        UserError: `repeat` is no whole number from 1 on, or `seconds` no positive number.
    """
    if repeat is None:
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not is_number or not 0 < seconds < math.inf:
            raise UserError(f"seconds={seconds!r}: give a number of seconds above 0")
        return None
    count = _whole(repeat)
    if count is None or count < 1:
        raise UserError(f"repeat={repeat!r}: give a whole number of runs, at least 1")
    return count


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _checked(spec: TensorSpec, inputs: Mapping[str, Any], names: str) -> np.ndarray:
    name = one_line(spec.name)
    if spec.name not in inputs:
        raise UserError(f"input {name!r} is missing: the inputs are {names}")
    array = _host_array(name, inputs[spec.name])
    if spec.dtype == "bfloat16" and array.dtype == np.dtype("V2"):
        array = array.view(bfloat16)  # a file of NumPy's does not keep the type's name
    if str(array.dtype) != spec.dtype:
        raise UserError(f"input {name!r} has type {array.dtype}: it must be {spec.dtype}")
    wanted = spec.shape
    if array.ndim != len(wanted) or any(
        w not in (-1, a) for w, a in zip(wanted, array.shape, strict=True)
    ):
        shown = "x".join(str(extent) for extent in array.shape) or "scalar"
        shape = "x".join("?" if w == -1 else str(w) for w in wanted) or "scalar"
        raise UserError(f"input {name!r} has shape {shown}: it must be {shape}")
    return array


def _host_array(name: str, value: Any) -> np.ndarray:
    try:
        if isinstance(value, np.ndarray | np.generic) or not hasattr(value, "__dlpack__"):
            return np.asarray(value)
        if value.__dlpack_device__()[0] in _HOST:
            with contextlib.suppress(Exception):  # of types that NumPy lacks, such as bfloat16
                return np.from_dlpack(value)
        return np.asarray(tvm.runtime.from_dlpack(value).numpy())  # a copy to the host
    except Exception as error:  # each producer has errors of its own
        raise UserError(f"input {name!r} is no array ({one_line(error)})") from error
