"""A library whose kernels were compiled in several processes is the same as one compiled in one."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tiny_library import target

from gpu_aware_tune.codegen import side_by_side
from gpu_aware_tune.codegen.compile import prepare
from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.library import link, open_vm, save_weights
from gpu_aware_tune.model.importer import Model, load_model

WIDTHS = [8, *range(10, 34, 2)]  # a product for each neighbouring two


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Twelve products of different sizes, one after the other."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for number, (rows, columns) in enumerate(itertools.pairwise(WIDTHS)):
        matrix = (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype("float32")
        weights.append(numpy_helper.from_array(matrix, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"x{number + 1}"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, WIDTHS[0]])],
        [helper.make_tensor_value_info(f"x{len(nodes)}", TensorProto.FLOAT, [1, WIDTHS[-1]])],
        weights,
    )
    path = tmp_path_factory.mktemp("model") / "chain.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return load_model(path, target())


@pytest.mark.parametrize("jobs", [1, 2, 3, 50])
def test_the_library_computes_the_same(model: Model, tmp_path: Path, jobs: int) -> None:
    module = prepare(model.module, target(), {})
    executable, objects = side_by_side.build_side_by_side(module, target(), tmp_path, jobs)
    assert len(objects) == {1: 0, 2: 2, 3: 3, 50: 3}[jobs], "four kernels at least for a process"
    link(executable, tmp_path / "lib.so", objects)
    save_weights(model.weights, tmp_path / "weights.bin")
    program = open_vm(tmp_path / "lib.so", tmp_path / "weights.bin")
    x = np.random.default_rng(1).standard_normal((1, WIDTHS[0])).astype("float32")
    session = onnxruntime.InferenceSession(model.source, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x0": x})
    (got,) = program(program.place([x]))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["ValueError: of no use", "killed by SIGKILL"])
def test_a_part_that_fails_is_told_and_nothing_is_left(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    here, compile_it = os.getpid(), side_by_side._compile

    def failing(kernels: tvm.IRModule, on: tvm.target.Target, path: Path) -> None:
        if os.getpid() == here:
            compile_it(kernels, on, path)
        elif "SIGKILL" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise ValueError("of no use")

    monkeypatch.setattr(side_by_side, "_compile", failing)
    module = prepare(model.module, target(), {})
    before = psutil.Process().children()  # other tests' servers
    with pytest.raises(TuneError, match=text):
        side_by_side.build_side_by_side(module, target(), tmp_path, 3)
    assert set(psutil.Process().children()) <= set(before)
