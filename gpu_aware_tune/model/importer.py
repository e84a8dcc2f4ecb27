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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_aware_tune.errors import UserError, one_line
from gpu_aware_tune.settings import TF32

if TYPE_CHECKING:
    import onnx
    import tvm

log = logging.getLogger(__name__)

# Operators that round to integers, or work on what was rounded.
_QUANTISING = {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
               "QLinearAdd", "QLinearMul", "ConvInteger", "MatMulInteger",
               "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}  # fmt: skip
HOISTED_ELEMENTS = 256  # larger constants become parameters of main


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
    from gpu_aware_tune.onnx_prepare import prepare, read_model
    from gpu_aware_tune.onnx_prepare.facts import walk

    path = Path(path)
    notes: list[str] = []
    quantised: list[bool] = []

    def original() -> onnx.ModelProto:
        proto = read_model(path)
        quantised.append(any(node.op_type in _QUANTISING for node in walk(proto.graph)))
        return proto

    # Graphs are handed on without a name for them here: each takes as much memory as the file.
    model = import_prepared(
        prepare(original(), input_shapes or {}, dtype, supported_operators(), notes),
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
    from gpu_aware_tune.kernels.naming import canonical_names
    from gpu_aware_tune.kernels.packing import mark_weights
    from gpu_aware_tune.kernels.schedules.cpu import machine_of
    from gpu_aware_tune.kernels.tf32 import mark_products
    from gpu_aware_tune.kernels.vector_math import mark_vector_math
    from gpu_aware_tune.model.layouts import to_nchwc

    digest = _digest(proto)
    names = [value.name for value in proto.graph.output]
    inputs = tuple(_input_spec(value) for value in proto.graph.input)
    with _quiet():
        module = _imported(proto, target)
        del proto  # its weights take as much memory as the file
        module = _fused(_plainly_named(module), target)
    module, weights = _hoist_constants(module)
    notes: tuple[str, ...] = ()
    if dtype == TF32:
        module = mark_products(module, target)
    if target.kind.name == "llvm":
        module = mark_vector_math(mark_weights(module))
        if blocks:
            blocked = to_nchwc(module, weights, machine_of(target).lanes)
            module, weights, notes = blocked.module, blocked.weights, blocked.notes
    module = canonical_names(module)
    return Model(
        name=source.stem,
        source=source,
        hash=digest,
        module=module,
        inputs=inputs,
        outputs=_output_specs(module["main"].ret_ty, names),
        weights=weights,
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


def _imported(proto: onnx.ModelProto, target: tvm.target.Target) -> tvm.IRModule:
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

    from gpu_aware_tune.model.operators import converters_for
    from gpu_aware_tune.onnx_prepare.facts import opset_of

    opset = opset_of(proto)
    converters = converters_for(target)

    class Importer(ONNXGraphImporter):
        """TVM's importer, with converters of our own and errors that name the node."""

        def _convert_operator(
            self, op_name: str, inputs: list[Any], attrs: dict[str, Any], opset: int
        ) -> Any:
            try:
                for convert in converters.get(op_name, ()):
                    made = convert(self.bb, inputs, attrs)
                    if made is not None:
                        return self.bb.normalize(made)
                return super()._convert_operator(op_name, inputs, attrs, opset)
            except Exception as error:
                node = attrs["tvm_custom"]["name"]
                raise UserError(
                    f"operator {one_line(op_name, 40)} (node {one_line(repr(node), 60)}, opset "
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
        raise UserError(f"the model cannot be imported: {_diagnosis(proto, error)}") from error


def _digest(proto: onnx.ModelProto) -> str:
    """Identify a graph by content; weights one by one, as the whole in bytes would be several copies."""
    from gpu_aware_tune.onnx_prepare.convert import content_of, skeleton_of

    found = hashlib.sha256(skeleton_of(proto).SerializeToString(deterministic=True))
    for tensor in proto.graph.initializer:
        found.update(content_of(tensor))
    return found.hexdigest()


def _plainly_named(module: tvm.IRModule) -> tvm.IRModule:
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


def _diagnosis(proto: onnx.ModelProto, error: Exception) -> str:
    graph = proto.graph
    known = {value.name for value in (*graph.input, *graph.initializer)}
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


def _in_place(value: Any) -> np.ndarray:
    """A constant of TVM's as an array in the same memory, which nobody changes; a copy of types like
    bfloat16, which NumPy does not exchange."""
    try:
        return np.from_dlpack(value)
    except RuntimeError:
        copied: np.ndarray = value.numpy()
        return copied


def _hoist_constants(module: tvm.IRModule) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
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


def _input_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    from onnx.helper import tensor_dtype_to_np_dtype

    tensor = value.type.tensor_type
    dtype = tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(value.name, tuple(dim.dim_value for dim in tensor.shape.dim), dtype.name)


def _output_specs(result: Any, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    from tvm import relax, tirx

    fields = list(result.fields) if isinstance(result, relax.TupleType) else [result]
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
