"""Traces and modules as JSON and back, and the hash that names a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm.s_tir.schedule import Schedule, Trace
from tvm.tirx import FloatImm, IndexMap, IntImm
from tvm_ffi.serialization import from_json_graph_str

from gpu_aware_tune.errors import TuneError, last_line
from gpu_aware_tune.kernels import dot_products, tf32
from gpu_aware_tune.workers.warm import load_intrinsics

# Trace.as_json() leaves IntImm and FloatImm inside, and Trace.apply_json_to_schedule() converts
# nested Python lists element by element. TVM's functions below it take and give TVM's own
# containers, which saves a millisecond each way.
_trace_as_json: Callable[..., Any] = tvm.get_global_func("s_tir.schedule.TraceAsJSON")
_apply_json: Callable[..., Any] = tvm.get_global_func("s_tir.schedule.TraceApplyJSONToSchedule")
_parse_json: Callable[..., Any] = tvm.get_global_func("ffi.json.Parse")

UNSCHEDULED = ""  # in place of a trace: the kernel as it was fused, without a schedule
_THIS_VERSION = f'"tvm_version":"{tvm.__version__}"'
_PLAIN = frozenset({str, int, float, bool, type(None), tvm_ffi.core.String})


class TraceError(TuneError):
    """A trace that is not one, or that does not fit the module it is applied to."""


def trace_to_json(trace: Trace) -> str:
    """Return a trace as compact JSON; the same trace always gives the same text.

    Args:
        trace: the trace of a schedule, `schedule.trace`.

    Returns:
        `[[instructions], [decisions]]` as TVM's record files hold it; `apply_trace` reads it back.
    """
    return canonical_trace(_plain(_trace_as_json(trace, False)))


def canonical_trace(value: Any) -> str:
    """Return a trace that was read from JSON as the text that `trace_to_json` gives it.

    TVM writes the same attribute as true or as 1, and 1.0 as 1, depending on where a trace has
    been; one text per trace is what tells known candidates from new ones.

    Raises:
        TraceError: the value is no trace. TVM does not check the indices of decisions itself.
    """
    try:
        instructions, decisions = value
        for name, inputs, attributes, outputs in instructions:
            if not all(isinstance(part, list) for part in (inputs, attributes, outputs)):
                raise TypeError(f"instruction {name}")
            if name == "SampleCategorical":
                attributes[1] = [float(chance) for chance in attributes[1]]
            for place, item in enumerate(attributes):
                if isinstance(item, bool):
                    attributes[place] = int(item)
        for index, _decision in decisions:
            if not 0 <= index < len(instructions):
                raise IndexError(f"decision {index}")
    except (TypeError, ValueError, IndexError) as error:
        raise TraceError(f"not a trace: {error}") from error
    return json.dumps([instructions, decisions], separators=(",", ":"))


def apply_trace(trace_json: str, module: tvm.IRModule) -> Schedule:
    """Replay a trace on an unscheduled module (which is left as it is) and return the schedule.

    Args:
        trace_json: what `trace_to_json` returned.
        module: the module the trace was made for (or one that is structurally equal).

    Raises:
        TraceError: the text is no trace, or an instruction cannot be applied to this module.
    """
    if '"Tensorize"' in trace_json:
        _register_intrinsics(trace_json)
    schedule = Schedule(module, error_render_level="fast")
    try:
        _apply_json(_parse_json(trace_json), schedule)
    except Exception as error:  # TVM raises a dozen kinds, ScheduleError and ValueError among them
        raise TraceError(f"a trace does not fit its module: {_said(error)}") from error
    return schedule


def _register_intrinsics(trace_json: str) -> None:
    """Make known the intrinsics that a trace names: they are looked up during the replay."""
    if dot_products.names_dot_product(trace_json):
        dot_products.register_intrinsics()
        return
    load_intrinsics("cuda")
    if tf32.TF32_INTRINSICS in trace_json:
        tf32.register_intrinsics()


def module_to_json(module: tvm.IRModule) -> str:
    """Return a module as JSON text which `module_from_json` reads back, structurally equal."""
    return str(tvm.ir.save_json(module))


def module_from_json(text: str) -> tvm.IRModule:
    """Return the module that `module_to_json` wrote.

    Raises:
        TraceError: the text holds something else.
    """
    try:
        module = load_json(text)
    except Exception as error:  # JSONDecodeError, AttributeError or one of TVM's own
        raise TraceError(f"the text holds no module: {_said(error)}") from error
    if not isinstance(module, tvm.IRModule):
        raise TraceError(f"the JSON text holds the type {type(module).__name__}, not a module")
    return module


def load_json(text: str) -> Any:
    """Return the TVM object of a JSON text.

    `tvm.ir.load_json` first brings texts of older versions up to date, in Python, which takes ten
    times as long as the rest; what this version of TVM wrote needs none of it.
    """
    if _THIS_VERSION in text[-200:]:
        return from_json_graph_str(text)
    return tvm.ir.load_json(text)


def task_hash(module: tvm.IRModule) -> str:
    """Return the name of a task: the structural hash of its module, as in TVM's record files."""
    return str(tvm_ffi.structural_hash(module))


def _plain(value: Any) -> Any:
    """Return TVM's nested containers as Python's, ints as ints and floats as floats."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tvm_ffi.Array:
        return [_plain(item) for item in value]
    if kind is IntImm or kind is FloatImm:
        return value.value
    if kind is tvm_ffi.Map:
        return {str(key): _plain(item) for key, item in value.items()}
    if kind is IndexMap:
        return str(tvm.ir.save_json(value))
    raise TraceError(f"a trace holds the type {kind.__name__}, which has no JSON form")


def _said(error: Exception) -> str:
    return last_line(error) or type(error).__name__
