"""Where do the numbers of an imported model first differ from those of the user's file?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from gpu_aware_tune.finalize.kernel_check import difference
from gpu_aware_tune.model.draws import DrawPlan, is_float

_MOST_BYTES = 1 << 30  # of intermediate values that are looked at
_FLOAT_LIMIT = 1e-3


def locate(
    path: Path,
    input_shapes: Mapping[str, tuple[int, ...]],
    dtype: str | None,
    plan: DrawPlan,
    target: Mapping[str, object],
) -> str:
    """Say which node is the first whose value differs, and which step makes it so (in a worker).

    First the prepared graph against the original one, both in ONNX Runtime; then the imported
    graph, without schedules, against the prepared one.

    Args:
        path, input_shapes, dtype: of the model, as it was imported.
        plan: the inputs; its first draw is used.
        target: JSON of the target it was imported for.

    Returns:
        One clause, such as "preparation changes the result of Resize (node 'up')".
    """
    import tvm

    from gpu_aware_tune.model.importer import supported_operators
    from gpu_aware_tune.onnx_prepare import prepare, read_model
    from gpu_aware_tune.onnx_prepare.random_values import freeze_random
    from gpu_aware_tune.onnx_prepare.shapes import fix_inputs

    arrays = plan.arrays(plan.kinds[0])
    original = read_model(path)
    fix_inputs(original, input_shapes)
    freeze_random(original)
    right = _in_onnxruntime(original, arrays)
    prepared = prepare(read_model(path), input_shapes, dtype, supported_operators())
    prepared_values = _in_onnxruntime(prepared, arrays)
    found = _first(original, right, prepared_values)
    if found is not None:
        return f"preparation changes the result of {found}"
    imported = _in_tvm(prepared, arrays, tvm.target.Target(dict(target)))
    found = _first(prepared, prepared_values, imported)
    if found is not None:
        return f"the importer computes {found} differently"
    return "only the whole model differs: fusion or layout is at fault"


def _first(
    model: ModelProto, right: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]
) -> str | None:
    """The first node, in the graph's order, that has a differing output."""
    for node in model.graph.node:
        for name in node.output:
            if name not in right or name not in got:
                continue
            wanted = right[name]
            limit = _FLOAT_LIMIT if is_float(wanted.dtype.name) else 0.0
            error = difference(got[name], wanted)
            if error > limit:
                return f"{node.op_type} (node {_label(node)!r}, error {error:.1e})"
    return None


def _label(node: NodeProto) -> str:
    return node.name or next((name for name in node.output if name), "")


def _in_onnxruntime(model: ModelProto, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every intermediate value that ONNX Runtime can give."""
    import onnxruntime

    wide = ModelProto()
    wide.CopyFrom(model)
    names = _values(model)
    known = {value.name for value in wide.graph.output}
    wide.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        wide.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {value.name for value in session.get_inputs()}
    outputs = session.run(names, {n: a for n, a in arrays.items() if n in given})
    return dict(zip(names, (np.asarray(output) for output in outputs), strict=True))


def _in_tvm(
    prepared: ModelProto, arrays: Mapping[str, np.ndarray], target: object
) -> dict[str, np.ndarray]:
    """The same of the imported model, without schedules."""
    import tvm

    from gpu_aware_tune.codegen.compile import compile_model
    from gpu_aware_tune.library import Program
    from gpu_aware_tune.model.importer import import_prepared

    wide = ModelProto()
    wide.CopyFrom(prepared)
    names = _values(prepared)
    known = {value.name for value in wide.graph.output}
    wide.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in known)
    model = import_prepared(wide, Path("located"), target, blocks=False)
    host = tvm.target.Target({"kind": "llvm"})
    executable = compile_model(model, host, {}).jit()
    weights = [tvm.runtime.tensor(weight) for weight in model.weights.values()]
    program = Program(executable, weights, tvm.cpu())
    outputs = program(program.place([arrays[spec.name] for spec in model.inputs]))
    return dict(zip((spec.name for spec in model.outputs), outputs, strict=True))


def _values(model: ModelProto) -> list[str]:
    """Names of the tensors that nodes make, as many as fit."""
    from gpu_aware_tune.onnx_prepare.convert import skeleton_of
    from gpu_aware_tune.onnx_prepare.facts import Facts

    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    facts = Facts(skeleton_of(skeleton))
    names, total = [], 0
    for node in model.graph.node:
        for name in node.output:
            shape = facts.shapes.get(name)
            if not name or shape is None or facts.types.get(name) == TensorProto.STRING:
                continue
            total += 4 * int(np.prod(shape))
            if total < _MOST_BYTES:
                names.append(name)
    return names
