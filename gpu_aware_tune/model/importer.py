"""ONNX file -> Model: a fused Relax module whose weights are parameters, and what identifies it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_aware_tune.errors import UserError, one_line, quoted
from gpu_aware_tune.settings import TF32

if TYPE_CHECKING:
    import onnx
    import tvm

log = logging.getLogger(__name__)

# Operators that round to integers, or work on what was rounded.
_QUANTISING = {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
               "QLinearAdd", "QLinearMul", "ConvInteger", "MatMulInteger",
               "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and NumPy type of an input or output; -1 is an extent known only when it runs."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Model:
    """A network ready for tuning.

    `module` has gone through TVM's `zero` pipeline. Its `main` takes the inputs, then the weights
    in the order of `weights`, and has the attribute `num_input`; for a CPU its kernels are marked
    with which of their arguments are weights (see `packing`), and images are in blocks of channels
    where that fits (see `layouts`). `source` is the file it was made from, `hash` identifies the
    prepared graph by content, `notes` say what was assumed or could not be done, and `is_quantised` whether
    it rounds to integers on its way.
    """

    name: str
    hash: str
    module: tvm.IRModule = field(repr=False)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: dict[str, np.ndarray] = field(repr=False)
    source: Path
    notes: tuple[str, ...] = ()
    is_quantised: bool = False


def load_model(
    path: Path,
    target: tvm.target.Target,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: str | None = None,
    blocks: bool = True,
) -> Model:
    """Import an ONNX file for a target.

    Args:
        path: the ONNX file; external data is looked for beside it.
        target: what the module is legalized and folded for.
        input_shapes: shapes of inputs with dynamic dimensions, by ONNX name.
        dtype: "float16" computes a float32 model in float16; its inputs and outputs stay float32.
            "tf32" lets its products be computed in TF32 (see `tf32`), on NVIDIA GPUs.
        blocks: on a CPU, store the images between convolutions in blocks of channels (see
            `layouts`); without, every tensor keeps the layout that ONNX gives it.

    Raises:
        UserError: the file, the shapes or an operator cannot be used; one line says which and why.
    """
    from gpu_aware_tune.onnx_prepare import prepare_detached, read_model
    from gpu_aware_tune.onnx_prepare.facts import walk

    path = Path(path)
    notes: list[str] = []
    quantised: list[bool] = []

    def original() -> onnx.ModelProto:
        proto = read_model(path)
        quantised.append(any(node.op_type in _QUANTISING for node in walk(proto.graph)))
        return proto

    # What takes as much memory as the file is handed on without a name for it here.
    model = _import_detached(
        *prepare_detached(original(), input_shapes or {}, dtype, supported_operators(), notes),
        path,
        target,
        dtype,
        blocks,
    )
    return dataclasses.replace(model, is_quantised=quantised[0], notes=(*notes, *model.notes))


def import_prepared(
    proto: onnx.ModelProto,
    source: Path,
    target: tvm.target.Target,
    dtype: str | None = None,
    blocks: bool = True,
) -> Model:
    """Import a graph that `onnx_prepare.prepare` has made of a file; see `load_model`."""
    from gpu_aware_tune.onnx_prepare.convert import detach_weights

    return _import_detached(*detach_weights(proto), source, target, dtype, blocks)


def _import_detached(
    proto: onnx.ModelProto,
    weights: list[onnx.TensorProto],
    source: Path,
    target: tvm.target.Target,
    dtype: str | None,
    blocks: bool,
) -> Model:
    """Import a graph without its large weights, and those, of which `weights` holds none afterwards."""
    from gpu_aware_tune.kernels.naming import canonical_names
    from gpu_aware_tune.kernels.packing import mark_weights
    from gpu_aware_tune.kernels.schedules.cpu import machine_of
    from gpu_aware_tune.kernels.tf32 import mark_products
    from gpu_aware_tune.kernels.vector_math import mark_vector_math
    from gpu_aware_tune.model.layouts import to_nchwc
    from gpu_aware_tune.model.parameters import hoist_constants, plainly_named
    from gpu_aware_tune.model.winograd import to_winograd
    from gpu_aware_tune.onnx_prepare.shapes import drop_inputs

    digest = _digest(proto, weights)
    names = [value.name for value in proto.graph.output]
    drop_inputs(proto, {tensor.name for tensor in weights})
    inputs = tuple(_input_spec(value) for value in proto.graph.input)
    with _quiet():
        module = _fused(plainly_named(_imported(proto, weights, target)), target)
    module, arrays = hoist_constants(module)
    if arrays and len(module.functions) == 1 and not _reads(module["main"], len(inputs)):
        raise UserError(  # no kernels: TVM does not compile a main that hands weights on
            f"{source}: its outputs are the same for all inputs; there is nothing to tune"
        )
    notes: tuple[str, ...] = ()
    if dtype == TF32:
        module = mark_products(module, target)
    if target.kind.name == "llvm":
        module = mark_vector_math(mark_weights(module))
        if blocks:
            machine = machine_of(target)
            blocked = to_nchwc(module, arrays, machine.lanes)
            convolved = to_winograd(blocked.module, blocked.weights, machine)
            module, arrays, notes = convolved.module, convolved.weights, blocked.notes
    module = canonical_names(module)
    return Model(
        name=source.stem,
        source=source,
        hash=digest,
        module=module,
        inputs=inputs,
        outputs=_output_specs(module["main"].ret_ty, names),
        weights=arrays,
        notes=notes,
    )


def random_inputs(specs: Sequence[TensorSpec], seed: int) -> dict[str, np.ndarray]:
    """Return one array per input, the same for the same seed.

    Floats are standard normal. Integers are 0 or 1, so that they are valid as token ids, indices
    and masks alike.
    """
    generator = np.random.default_rng(seed)
    arrays = {}
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        is_float = dtype.kind == "f" or spec.dtype == "bfloat16"
        draw = generator.standard_normal if is_float else partial(generator.integers, 0, 2)
        arrays[spec.name] = np.asarray(draw(size=spec.shape)).astype(dtype)
    return arrays


def supported_operators() -> frozenset[tuple[str, str]]:
    """Return the (domain, operator) pairs that TVM's importer has."""
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    contributed = {"FastGelu", "BiasGelu", "SkipLayerNormalization", "EmbedLayerNormalization"}
    standard = {("", name) for name in _get_convert_map() if name not in contributed}
    return frozenset(standard | {("com.microsoft", name) for name in contributed} | {("", "If")})


def _imported(
    proto: onnx.ModelProto, weights: list[onnx.TensorProto], target: tvm.target.Target
) -> tvm.IRModule:
    from tvm import relax
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

    from gpu_aware_tune.model.operators import converters_for
    from gpu_aware_tune.onnx_prepare.convert import taken
    from gpu_aware_tune.onnx_prepare.facts import opset_of

    opset = opset_of(proto)
    names = {tensor.name for tensor in weights}
    converters = converters_for(target)

    class Importer(ONNXGraphImporter):
        """TVM's importer, with weights from outside, converters of our own and errors that name the node."""

        def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
            super()._parse_graph_initializers(graph)
            for tensor in taken(weights):
                self._nodes[tensor.name] = relax.const(self._parse_array(tensor))

        def _convert_operator(
            self, op_name: str, inputs: list[Any], attrs: dict[str, Any], opset: int
        ) -> Any:
            try:
                for convert in converters.get(op_name, ()):
                    made = convert(self.bb, inputs, attrs)
                    if made is not None:
                        made = self.bb.normalize(made)
                        break
                else:
                    made = super()._convert_operator(op_name, inputs, attrs, opset)
                _check_extents(made)
                return made
            except Exception as error:
                node = attrs["tvm_custom"]["name"]
                raise UserError(
                    f"operator {one_line(op_name, 40)} (node {quoted(node)}, opset "
                    f"{opset}) cannot be imported: {_first_line(error)}; change its export"
                ) from error

    try:
        return Importer({}, "float32").from_onnx(proto.graph, opset)
    except Exception as error:
        # TVM's half-made graph complains on stderr when it dies: let that be now, not later.
        for failure in (error, error.__cause__):
            traceback.clear_frames(failure.__traceback__ if failure else None)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the model cannot be imported: {_diagnosis(proto, names, error)}"
        ) from error


def _reads(main: Any, count: int) -> bool:
    """Whether a function reads one of its first parameters."""
    from tvm import relax

    read = relax.analysis.free_vars(main.body)
    return any(parameter in read for parameter in main.params[:count])


def _check_extents(made: Any) -> None:
    """Raise ValueError where TVM infers a negative extent, as of a window that is larger than its input."""
    from tvm import relax, tirx

    type_ = getattr(made, "ty", None)
    shape = type_.shape if isinstance(type_, relax.TensorType) else None
    extents = [int(e) for e in shape or () if isinstance(e, tirx.IntImm)]
    if min(extents, default=0) < 0:
        raise ValueError(f"its result would have the shape {extents}")


def _digest(proto: onnx.ModelProto, weights: Sequence[onnx.TensorProto]) -> str:
    """Identify a graph without its large weights, and those, by content."""
    from gpu_aware_tune.onnx_prepare.convert import content_of

    found = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for tensor in (*proto.graph.initializer, *weights):
        found.update(content_of(tensor))
    return found.hexdigest()


def _diagnosis(proto: onnx.ModelProto, weights: Collection[str], error: Exception) -> str:
    graph = proto.graph
    known = {value.name for value in (*graph.input, *graph.initializer)} | set(weights)
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                return f"not valid ONNX: node {node.name!r} reads {name!r}, which nothing makes"
        known.update(node.output)
    return _first_line(error)


def _first_line(error: Exception) -> str:
    text = re.sub(r"ir\.Op\(.*?name=\"([\w.]+)\".*", r"\1 ...", str(error))  # not a dump of TVM's
    return one_line(f"{type(error).__name__}: {text.lstrip()}", 160)


def _fused(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    import tvm
    from tvm import relax
    from tvm.ir.transform import Sequential

    from gpu_aware_tune.model.constants import fold_constants
    from gpu_aware_tune.model.legalize import LEGALIZERS

    fold = tvm.transform.module_pass(
        lambda module, _context: fold_constants(module), opt_level=0, name="FoldInNumPy"
    )
    stages = Sequential(
        [
            relax.transform.DecomposeOpsForInference(),
            relax.transform.CanonicalizeBindings(),
            relax.transform.DeadCodeElimination(["main"]),
            fold,
            # The zero pipeline legalizes sorts and scans for one thread of a CPU otherwise.
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            relax.transform.LegalizeOps(LEGALIZERS),
            relax.get_pipeline("zero"),
        ]
    )
    try:
        with target:
            return stages(module)
    except Exception as error:
        raise UserError(f"the model cannot be compiled by TVM: {_first_line(error)}") from error


def _input_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    from onnx.helper import tensor_dtype_to_np_dtype

    tensor = value.type.tensor_type
    dtype = tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(value.name, tuple(dim.dim_value for dim in tensor.shape.dim), dtype.name)


def _output_specs(result: Any, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    from tvm import relax, tirx

    fields = list(result.fields) if isinstance(result, relax.TupleType) else [result]
    if len(fields) != len(names):  # a sequence comes as a tuple
        raise UserError(f"outputs {', '.join(names)}: only tensors can be returned, not sequences")
    specs = []
    for name, found in zip(names, fields, strict=True):
        if not isinstance(found, relax.TensorType) or found.ndim < 0:
            raise UserError(f"output {name!r} is not a tensor; only tensors can be returned")
        extents = list(found.shape) if found.shape is not None else [None] * found.ndim
        shape = tuple(int(e) if isinstance(e, tirx.IntImm) else -1 for e in extents)
        if 0 in shape:
            raise UserError(f"output {name!r} is empty: shape {shape}; check the model's inputs")
        specs.append(TensorSpec(name, shape, str(found.dtype)))
    return tuple(specs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what TVM's importer prints and warns away from the user; it goes to the log instead."""
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        if noise := printed.getvalue().strip():
            log.debug("TVM: %s", noise)
