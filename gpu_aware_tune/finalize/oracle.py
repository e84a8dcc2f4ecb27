"""What a model should compute: the user's own file, run by somebody else.

ONNX Runtime runs the original file, in a process of its own, before preparation has touched
anything; it is asked without optimisations, which is the literal meaning of the graph. Where it
cannot run it, a copy in float32 is run (bfloat16, float16), then ONNX's reference evaluator.

How far a right result may be off cannot be known from the type alone: a quantised model rounds to
steps, a detector's output may depend on the last bit. So the noise of the model itself is measured:
what changes if ONNX Runtime optimises the graph, and if the inputs move by a few units in the last
place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, TensorProto

from gpu_aware_tune.errors import TuneError, last_line
from gpu_aware_tune.model.draws import SPECIAL, DrawKind, DrawPlan, is_float
from gpu_aware_tune.model.importer import TensorSpec
from gpu_aware_tune.onnx_prepare.facts import uses_types, walk

if TYPE_CHECKING:
    import onnx

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], list[np.ndarray]]

_NUDGE = {"float32": 2.0**-21, "tf32": 2.0**-10, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True)
class Noise:
    """How far a right output may be off by the model's own noise: largest and root mean square.

    For integers and booleans both are the part of the elements that differ.
    """

    largest: float
    rms: float


@dataclass(frozen=True)
class DrawReference:
    """What a model computes for one draw: its outputs, and the noise of each."""

    kind: DrawKind
    outputs: tuple[np.ndarray, ...]
    noise: tuple[Noise, ...]


@dataclass(frozen=True)
class Reference:
    """What a model computes.

    Args:
        plan: the draws; a worker makes the same arrays of it.
        oracle: who says so.
        draws: for each draw that the oracle can run.
        outputs: the outputs' names.
        is_widened: whether the oracle computed in a wider type than the model, so that only values
            are to be compared.
        notes: what could not be run, and why.
    """

    plan: DrawPlan
    oracle: str
    draws: tuple[DrawReference, ...]
    outputs: tuple[str, ...]
    is_widened: bool = False
    notes: tuple[str, ...] = ()


def make_reference(
    path: Path,
    input_shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    user: Path | None,
    dtype: str | None,
) -> Reference:
    """Run a model's original file on every draw (in a worker: a broken model may crash it).

    Args:
        path: the ONNX file.
        input_shapes: of inputs with dynamic dimensions.
        seed: of the draws.
        user: see `DrawPlan`.
        dtype: what the model is converted to, "float16" or "tf32", or None; how far the inputs are
            moved to measure the noise follows from it.

    Raises:
        TuneError: nobody can run it, with what each of them says.
    """
    from gpu_aware_tune.onnx_prepare import read_model
    from gpu_aware_tune.onnx_prepare.convert import skeleton_of
    from gpu_aware_tune.onnx_prepare.input_ranges import index_bounds
    from gpu_aware_tune.onnx_prepare.random_values import has_random
    from gpu_aware_tune.onnx_prepare.shapes import fix_inputs

    proto = read_model(path)
    fix_inputs(proto, input_shapes)
    specs = tuple(_spec(value) for value in proto.graph.input)
    names = tuple(value.name for value in proto.graph.output)
    skeleton = skeleton_of(proto)
    half = _half_type(skeleton)
    del proto
    has_top_k = any(node.op_type == "TopK" for node in walk(skeleton.graph))
    file = _File(path, input_shapes, has_top_k or has_random(skeleton))
    plan = DrawPlan(specs, _of_inputs(index_bounds(skeleton), specs), seed, user)
    first = plan.arrays(plan.kinds[0])
    refusals = []
    for oracle in (_onnxruntime, _onnxruntime_widened, _evaluator):
        try:
            found = oracle(file, names)
            found.run(first)
        except Exception as error:  # whatever they raise means that they cannot run it
            refusals.append(f"{oracle.__doc__}: {last_line(error)[:160]}")
            continue
        return _run_draws(plan, found, names, dtype or half)
    raise TuneError(f"the original file cannot be run: {'; '.join(refusals)}")


@dataclass(frozen=True)
class _File:
    """The user's file.

    `is_open`: whether it leaves something open that is decided before anybody runs it: the order of a
    TopK, the values of random operators.
    """

    path: Path
    input_shapes: Mapping[str, tuple[int, ...]]
    is_open: bool

    def decided(self) -> onnx.ModelProto:
        """Its content, with what it leaves open decided."""
        from gpu_aware_tune.onnx_prepare import read_model
        from gpu_aware_tune.onnx_prepare.random_values import freeze_random, has_random
        from gpu_aware_tune.onnx_prepare.shapes import fix_inputs

        model = read_model(self.path)  # which settles orders
        if has_random(model):
            fix_inputs(model, self.input_shapes)
            freeze_random(model)
        return model


@dataclass(frozen=True)
class _Oracle:
    """Somebody who can run a model; `variants` are other ways that are right as well."""

    text: str
    run: Run
    variants: tuple[Run, ...] = ()
    is_widened: bool = False


def _run_draws(
    plan: DrawPlan, oracle: _Oracle, names: Sequence[str], computed_in: str
) -> Reference:
    draws, notes = [], []
    for kind in plan.kinds:
        arrays = plan.arrays(kind)
        try:
            outputs = oracle.run(arrays)
            others = [run(arrays) for run in oracle.variants] if kind not in SPECIAL else []
            if kind not in SPECIAL:
                others += [oracle.run(_nudged(arrays, computed_in, sign)) for sign in (1, -1)]
        except Exception as error:
            notes.append(f"draw {kind}: the oracle refuses it ({last_line(error)[:120]})")
            continue
        noise = tuple(
            _noise(output, [other[at] for other in others]) for at, output in enumerate(outputs)
        )
        draws.append(DrawReference(kind, tuple(outputs), noise))
    if all(draw.kind in SPECIAL for draw in draws):
        raise TuneError(f"the original file cannot be run on ordinary inputs: {notes[0]}")
    return Reference(plan, oracle.text, tuple(draws), tuple(names), oracle.is_widened, tuple(notes))


def _nudged(arrays: Arrays, computed_in: str, sign: int) -> dict[str, np.ndarray]:
    """The inputs, moved by a few units in the last place of the type that is computed in."""
    generator = np.random.default_rng(11)
    step = sign * _NUDGE.get(computed_in, _NUDGE["float32"])
    return {
        # NumPy makes no array of what it computes of one number.
        name: np.asarray(array * (1 + step * generator.choice([-1, 1], array.shape)), array.dtype)
        if is_float(array.dtype.name)
        else array
        for name, array in arrays.items()
    }


def _noise(output: np.ndarray, others: Sequence[np.ndarray]) -> Noise:
    largest = rms = 0.0
    for other in others:
        if other.shape != output.shape:
            continue
        if not is_float(output.dtype.name):
            part = float(np.mean(other != output)) if output.size else 0.0
            largest, rms = max(largest, part), max(rms, part)
            continue
        with np.errstate(all="ignore"):
            apart = np.abs(other.astype(np.float64) - output.astype(np.float64))
        apart = apart[np.isfinite(apart)]
        if apart.size:
            largest = max(largest, float(apart.max()))
            rms = max(rms, float(np.sqrt(np.mean(np.square(apart)))))
    return Noise(largest, rms)


def _onnxruntime(file: _File, names: Sequence[str]) -> _Oracle:
    """ONNX Runtime"""
    import onnxruntime

    level, model = onnxruntime.GraphOptimizationLevel, _decided(file)
    plain = _session(model, level.ORT_DISABLE_ALL, names)
    try:
        variants: tuple[Run, ...] = (_session(model, level.ORT_ENABLE_ALL, names),)
    except Exception:  # its optimiser writes operators that it has no kernels for
        variants = ()
    text = f"ONNX Runtime {onnxruntime.__version__} on the original file"
    return _Oracle(text, plain, variants)


def _decided(file: _File) -> str | bytes:
    """The file itself, or its content where it leaves something open."""
    return file.decided().SerializeToString() if file.is_open else str(file.path)


def _onnxruntime_widened(file: _File, names: Sequence[str]) -> _Oracle:
    """ONNX Runtime on a copy in float32"""
    import onnxruntime

    from gpu_aware_tune.onnx_prepare.widen import widened

    proto = widened(file.decided())
    level = onnxruntime.GraphOptimizationLevel
    run = _session(proto.SerializeToString(), level.ORT_DISABLE_ALL, names)

    def wide(arrays: Arrays) -> list[np.ndarray]:
        return run({n: a.astype(np.float32) if is_half(a) else a for n, a in arrays.items()})

    text = f"ONNX Runtime {onnxruntime.__version__} on a float32 copy of the original file"
    return _Oracle(text, wide, is_widened=True)


def _evaluator(file: _File, names: Sequence[str]) -> _Oracle:
    """ONNX's reference evaluator"""
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(file.decided())

    def run(arrays: Arrays) -> list[np.ndarray]:
        return [np.asarray(value) for value in evaluator.run(list(names), dict(arrays))]

    return _Oracle(f"ONNX's reference evaluator {onnx.__version__} on the original file", run)


def is_half(array: np.ndarray) -> bool:
    """Whether an array holds float16 or bfloat16."""
    return array.dtype.name in ("float16", "bfloat16")


def _session(model: str | bytes, level: Any, names: Sequence[str]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    # Without it, sums of 8-bit products saturate in 16 bits on processors that lack VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}

    def run(arrays: Arrays) -> list[np.ndarray]:
        given = {name: array for name, array in arrays.items() if name in wanted}
        return [np.asarray(value) for value in session.run(list(names), given)]

    return run


def _spec(value: Any) -> TensorSpec:
    from onnx.helper import tensor_dtype_to_np_dtype

    tensor = value.type.tensor_type
    dtype = tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(value.name, tuple(dim.dim_value for dim in tensor.shape.dim), dtype.name)


def _half_type(skeleton: ModelProto) -> str:
    """The half-precision type that a model uses, or "float32"."""
    for name, number in (("bfloat16", TensorProto.BFLOAT16), ("float16", TensorProto.FLOAT16)):
        if uses_types(skeleton, {number}):
            return name
    return "float32"


def _of_inputs(bounds: Mapping[str, int], specs: Sequence[TensorSpec]) -> dict[str, int]:
    """The bounds of real inputs: detached weights are inputs of the skeleton, too."""
    names = {spec.name for spec in specs}
    return {name: bound for name, bound in bounds.items() if name in names}


def serve(
    connection: Connection,
    path: Path,
    input_shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    user: Path | None,
    dtype: str | None,
) -> None:
    """Send the reference of a model, or the error that says why there is none (in a worker)."""
    try:
        answer: Reference | TuneError = make_reference(path, input_shapes, seed, user, dtype)
    except TuneError as error:
        answer = error
    connection.send(answer)
