"""How far our float32 results and ONNX Runtime's are from the same model computed in float64.

    python -m benchmarks.numerics resnet18.onnx bert.onnx

The reference is the evaluator of the ONNX project, in NumPy, on the file with every float32 in float64.
Ours has the baseline schedules, nothing tuned. The error of a draw of inputs is the largest one of any
output, relative to that output's largest value; told is the median over the draws. The figures go to
benchmarks/results/numerics.json.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from benchmarks.environment import RESULTS, environment, write_results
from benchmarks.model_latency import compiled
from benchmarks.scaffold import host_target, parser

RESULTS_FILE = RESULTS / "numerics.json"
SINGLE, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE


def main() -> None:
    """Compare every model, print a line for each, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("models", nargs="+", type=Path)
    command.add_argument("--draws", type=int, default=3, help="of inputs")
    args = command.parse_args()
    rows: dict[str, Any] = {}
    for path in args.models:
        try:
            rows[path.stem] = compared(path, args.draws)
        except NotImplementedError as error:  # an operator that the evaluator lacks
            rows[path.stem] = {"left_out": str(error).splitlines()[0]}
        print(f"{path.stem:20} {line(rows[path.stem])}", flush=True)
        write_results(args.results, environment(), {"draws": args.draws, "models": rows})


def compared(path: Path, draws: int) -> dict[str, float]:
    """The errors of both sides and ours over ONNX Runtime's."""
    import onnxruntime

    from gpu_aware_tune.model.importer import load_model, random_inputs

    target = host_target(2)
    model = load_model(path, target)
    theirs = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    reference = ReferenceEvaluator(in_double(onnx.load(path)))
    errors: dict[str, list[float]] = {"ours": [], "ort": []}
    with tempfile.TemporaryDirectory() as folder:
        ours = program(model, target, Path(folder))
        for seed in range(draws):
            inputs = random_inputs(model.inputs, seed)
            expected = reference.run(None, {name: widened(a) for name, a in inputs.items()})
            errors["ours"].append(distance(ours(inputs), expected))
            errors["ort"].append(distance(theirs.run(None, inputs), expected))
    medians = {side: statistics.median(found) for side, found in errors.items()}
    return {**medians, "ratio": medians["ours"] / medians["ort"]}


def program(model: Any, target: Any, folder: Path) -> Any:
    """A function from inputs to outputs, compiled with the baseline schedules."""
    from gpu_aware_tune.library import open_vm, save_weights

    shared = compiled(model, target, "untuned", folder / "model.so")
    save_weights(model.weights, folder / "weights.bin")
    opened = open_vm(shared, folder / "weights.bin")
    return lambda inputs: opened(opened.place(list(inputs.values())))


def in_double(model: ModelProto) -> ModelProto:
    """The model with every float32 of it in float64."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == SINGLE:
            value.type.tensor_type.elem_type = DOUBLE
    for tensor in graph.initializer:
        widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widen(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == SINGLE:
                attribute.i = DOUBLE
    return model


def widen(tensor: TensorProto) -> None:
    """Make a float32 tensor one of float64, in place."""
    if tensor.data_type == SINGLE:
        wide = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def widened(array: np.ndarray) -> np.ndarray:
    """An input in float64, if it is one of float32."""
    return array.astype(np.float64) if array.dtype == np.float32 else array


def distance(got: Sequence[Any], expected: Sequence[np.ndarray]) -> float:
    """The largest difference of any output, relative to its largest value."""
    from gpu_aware_tune.finalize.kernel_check import difference

    pairs = zip(got, expected, strict=True)
    return max(difference(np.asarray(g, wanted.dtype), wanted) for g, wanted in pairs)


def line(row: Mapping[str, Any]) -> str:
    """One model for people."""
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    return f"ours {row['ours']:.1e}, ONNX Runtime {row['ort']:.1e}, ratio {row['ratio']:.2f}"


if __name__ == "__main__":
    main()
