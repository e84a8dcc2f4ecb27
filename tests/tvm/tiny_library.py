"""A small model of two inputs and two outputs, and libraries of it, for several test files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import TensorProto, helper, numpy_helper

from gpu_aware_tune.codegen.compile import compile_model
from gpu_aware_tune.finalize.oracle import make_reference
from gpu_aware_tune.finalize.verify import VerifyReport, base_error, compare, computed_in
from gpu_aware_tune.kernels.schedules import baseline_schedules
from gpu_aware_tune.kernels.traces import trace_to_json
from gpu_aware_tune.library import RunFacts, export, link, open_vm, save_weights
from gpu_aware_tune.library.manifest import ShareFacts
from gpu_aware_tune.model.importer import Model, load_model
from gpu_aware_tune.model.tasks import extract


def target(units: int = 2) -> tvm.target.Target:
    """The CPU of this machine."""
    return tvm.target.Target(target_json(units))


def target_json(units: int = 2) -> dict[str, object]:
    """As a manifest holds it."""
    cpu = str(tvm.target.codegen.llvm_get_system_cpu())
    return {"kind": "llvm", "mcpu": cpu, "num-cores": units}


def write_onnx(
    path: Path,
    width: int = 12,
    channels: int = 3,
    batch: int = 1,
    image: str = "image",
    bias_rows: int = 1,
) -> Path:
    """Inputs image, bias; conv, relu (output features), mean, matmul, + bias (output scores)."""
    generator = np.random.default_rng(7)
    weights = {
        "w": generator.standard_normal((16, channels, 3, 3)).astype("float32"),
        "m": generator.standard_normal((16, 20)).astype("float32"),
    }
    nodes = [
        helper.make_node("Conv", [image, "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["features"]),
        helper.make_node("GlobalAveragePool", ["features"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["s"]),
        helper.make_node("Add", ["s", "bias"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(
                image, TensorProto.FLOAT, [batch, channels, width, width]
            ),
            helper.make_tensor_value_info("bias", TensorProto.FLOAT, [bias_rows, 20]),
        ],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 20]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch, 16, width, width]),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def default_traces(model: Model) -> dict[str, str]:
    """The untuned schedule of each task."""
    traces = {}
    for task in extract(model, target()):
        for schedule in baseline_schedules(task.module, target(), most=1):
            traces[task.hash] = trace_to_json(schedule.trace)
    return traces


def write_library(
    folder: Path, alike: bool = False, batch: int = 1, bias_rows: int = 1
) -> tuple[Model, Path]:
    """Export libraries for one and for two cores: plain loops and baseline schedules, or `alike`."""
    model = load_model(write_onnx(folder / "tiny.onnx", batch=batch, bias_rows=bias_rows), target())
    paths = {}
    for units, traces in ((1, {}), (2, default_traces(model))):
        paths[units] = folder / f"tiny-{units}.so"
        link(compile_model(model, target(), traces), paths[units])
    facts = RunFacts(
        device="llvm/test/cpu",
        shares=tuple(ShareFacts(n, 50 * n, target=target_json(n)) for n in (1, 2)),
    )
    libraries = {1: paths[2], 2: paths[2]} if alike else paths
    return model, export(folder / "tiny.tuned", model, libraries, facts)


Subject = Path | Callable[[Any], Mapping[str, np.ndarray]]


def compared(model: Model, library: Subject, seed: int = 0) -> VerifyReport:
    """A library, as a file or as something that is called, against ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        reference = make_reference(model.source, {}, seed, None, None)
        call = _loaded(model, library, Path(folder)) if isinstance(library, Path) else library
        draws = [reference.plan.arrays(draw.kind) for draw in reference.draws]
        outputs = [list(call(arrays).values()) for arrays in draws]
    return compare(reference, outputs, base_error(model, computed_in(model)))


def _loaded(model: Model, library: Path, folder: Path) -> Any:
    weights = folder / "weights.bin"
    save_weights(model.weights, weights)
    program = open_vm(library, weights)

    def call(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = program(program.place([arrays[spec.name] for spec in model.inputs]))
        return {spec.name: array for spec, array in zip(model.outputs, outputs, strict=True)}

    return call
