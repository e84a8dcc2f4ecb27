"""Importing models: numerics against ONNX Runtime, what the module looks like, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from conftest import ROOT
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

from benchmarks.light_models import seeded
from gpu_aware_tune.errors import UserError
from gpu_aware_tune.model.importer import Model, TensorSpec, load_model, random_inputs

F32 = TensorProto.FLOAT
LLVM = tvm.target.Target("llvm")
# Relative to the largest expected value: float32 sums in another order, float16 sums in float16.
TOLERANCE = {"float32": 2e-5, "float16": 2e-2}


def run(model: Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Builds a model without any schedule and runs it."""
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):  # in less time
        machine = relax.VirtualMachine(tvm.compile(model.module, target=LLVM), tvm.cpu())
    arrays = [inputs[spec.name] for spec in model.inputs] + list(model.weights.values())
    result = machine["main"](*[tvm.runtime.tensor(array) for array in arrays])
    return [r.numpy() for r in (result if len(model.outputs) > 1 else [result])]


def run_onnxruntime(proto: bytes, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def assert_matches(path: Path, dtype: str | None = None) -> Model:
    """Imports, runs and compares with ONNX Runtime on the original file."""
    model = load_model(path, LLVM, dtype=dtype)
    inputs = random_inputs(model.inputs, seed=3)
    expected = run_onnxruntime(path.read_bytes(), inputs)
    for spec, got, want in zip(model.outputs, run(model, inputs), expected, strict=True):
        assert got.shape == spec.shape == want.shape
        assert got.dtype == spec.dtype == want.dtype
        assert np.std(want) > 0, "the model's output says nothing"
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error <= TOLERANCE[dtype or "float32"], f"{spec.name}: {error:.2e}"
    return model


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: Sequence[str],
    weights: dict[str, np.ndarray],
    opset: int = 17,
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, F32, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, F32, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


class Weights(dict[str, np.ndarray]):
    """Seeded weights of He's scale, made as they are named."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = np.random.default_rng(0)

    def add(self, name: str, *shape: int) -> str:
        fan_in = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
        values = self._generator.standard_normal(shape) * np.sqrt(2 / fan_in)
        self[name] = values.astype(np.float32)
        return name


def transformer(path: Path, length: int | str = 16, width: int = 32, heads: int = 4) -> Path:
    """Saves one encoder layer, as exporters write it: the batch read off the input's shape."""
    node, weights = helper.make_node, Weights()
    constants: dict[str, Any] = {
        "zero": np.int64(0),
        "axes": np.array([0]),
        "split": np.array([0, heads, width // heads]),
        "merge": np.array([0, 0, width]),
        "scale": np.float32((width // heads) ** -0.5),
        "half": np.float32(0.5),
        "one": np.float32(1.0),
        "root": np.float32(2**0.5),
        "mean_axes": np.array([-1]),
    }
    nodes = [
        node("Shape", ["x"], ["x_shape"]),
        node("Slice", ["x_shape", "axes", "two"], ["lead"]),
        node("Concat", ["lead", "head_shape"], ["split_shape"], axis=0),
        node("Concat", ["lead", "width_shape"], ["merge_shape"], axis=0),
    ]
    constants |= {"two": np.array([2]), "head_shape": np.array([heads, width // heads])}
    constants |= {"width_shape": np.array([width])}
    for part in "qkv":
        perm = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
        nodes += [
            node("MatMul", ["x", weights.add(f"w{part}", width, width)], [f"{part}1"]),
            node("Reshape", [f"{part}1", "split_shape"], [f"{part}2"]),
            node("Transpose", [f"{part}2"], [part], perm=perm),
        ]
    nodes += [
        node("MatMul", ["q", "k"], ["scores"]),
        node("Mul", ["scores", "scale"], ["scaled"]),
        node("Softmax", ["scaled"], ["attention"], axis=-1),
        node("MatMul", ["attention", "v"], ["mixed"]),
        node("Transpose", ["mixed"], ["mixed1"], perm=[0, 2, 1, 3]),
        node("Reshape", ["mixed1", "merge_shape"], ["mixed2"]),
        node("MatMul", ["mixed2", weights.add("wo", width, width)], ["projected"]),
        node("Add", ["x", "projected"], ["residual"]),
        node("LayerNormalization", ["residual", "gamma", "beta"], ["normal"]),
        node("MatMul", ["normal", weights.add("w1", width, 4 * width)], ["wide"]),
        node("Div", ["wide", "root"], ["wide1"]),
        node("Erf", ["wide1"], ["wide2"]),
        node("Add", ["wide2", "one"], ["wide3"]),
        node("Mul", ["wide", "wide3"], ["wide4"]),
        node("Mul", ["wide4", "half"], ["gelu"]),
        node("MatMul", ["gelu", weights.add("w2", 4 * width, width)], ["narrow"]),
        node("Add", ["normal", "narrow"], ["y"]),
    ]
    constants |= {"gamma": np.ones(width, np.float32), "beta": np.zeros(width, np.float32)}
    used = {name for n in nodes for name in n.input}
    constants = {name: np.asarray(v) for name, v in constants.items() if name in used}
    return save(path, nodes, {"x": ["batch", length, width]}, ["y"], {**weights, **constants})


def residual_block(path: Path, channels: int) -> Path:
    """Saves an inverted residual block: expansion, depthwise, batch norms, clipping, addition."""
    node, weights, inner = helper.make_node, Weights(), 4 * channels
    for name in ("norm_a", "norm_b"):
        for part in ("scale", "bias", "mean"):
            weights.add(f"{name}_{part}", inner)
        weights[f"{name}_var"] = np.abs(weights[f"{name}_mean"]) + np.float32(0.5)

    def norm(source: str, name: str) -> onnx.NodeProto:
        parts = [f"{name}_{part}" for part in ("scale", "bias", "mean", "var")]
        return node("BatchNormalization", [source, *parts], [name])

    nodes = [
        node("Conv", ["in.put", weights.add("w1", inner, channels, 1, 1)], ["wide"]),
        norm("wide", "norm_a"),
        node("Clip", ["norm_a", "zero", "six"], ["clipped"]),
        node("Conv", ["clipped", weights.add("w2", inner, 1, 3, 3)], ["deep"], group=inner,
             pads=[1, 1, 1, 1]),
        norm("deep", "norm_b"),
        node("Clip", ["norm_b", "zero", "six"], ["clipped1"]),
        node("Conv", ["clipped1", weights.add("w3", channels, inner, 1, 1)], ["narrow"]),
        node("Add", ["in.put", "narrow"], ["out/put"]),
    ]  # fmt: skip
    weights |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return save(path, nodes, {"in.put": [1, channels, 12, 12]}, ["out/put"], weights)


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual_block(tmp_path_factory.mktemp("block") / "block.onnx", channels=16)


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("light") / "squeezenet.onnx"
    path.write_bytes(seeded("squeezenet", seed=0).SerializeToString())
    return path


# --- numerics ------------------------------------------------------------------------------------


def test_squeezenet_matches(squeezenet: Path) -> None:
    model = assert_matches(squeezenet)
    assert model.inputs == (TensorSpec("data_0", (1, 3, 224, 224), "float32"),)
    assert model.outputs == (TensorSpec("softmaxout_1", (1, 1000, 1, 1), "float32"),)
    assert model.name == "squeezenet"


def test_initializers_as_inputs_and_shape_arithmetic_match() -> None:
    folder = Path(os.environ.get("GAT_MODELS", ROOT.parent / "shared" / "models"))
    path = folder / "version-slim-320.onnx"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set GAT_MODELS to its folder")
    model = assert_matches(path)
    assert [spec.name for spec in model.inputs] == ["input"]
    assert [spec.name for spec in model.outputs] == ["scores", "boxes"]
    assert model.source == path


def test_a_residual_block_matches_and_its_batch_norms_are_gone(block: Path) -> None:
    model = assert_matches(block)
    names = {variable.name_hint for variable in model.module.get_global_vars()}
    assert len(names) == 4, names  # main and three convolutions


def test_a_residual_block_in_float16_matches(block: Path) -> None:
    model = assert_matches(block, "float16")
    assert {array.dtype for array in model.weights.values()} == {np.dtype("float16")}
    assert model.inputs[0].dtype == model.outputs[0].dtype == "float32"


def test_a_transformer_layer_matches(tmp_path: Path) -> None:
    path = transformer(tmp_path / "encoder.onnx")
    assert "--input x:1x16x32" in load_model(path, LLVM).notes[0]
    model = load_model(path, LLVM, {"x": (2, 16, 32)})
    inputs = random_inputs(model.inputs, seed=1)
    got, want = run(model, inputs)[0], run_onnxruntime(path.read_bytes(), inputs)[0]
    assert got.shape == model.outputs[0].shape == (2, 16, 32)
    assert np.abs(got - want).max() <= TOLERANCE["float32"] * np.abs(want).max()


WRONG_IN_TVM: dict[str, tuple[str, dict[str, Any], list[str], int]] = {
    "batch norm in training": ("BatchNormalization", {"training_mode": 1}, ["y", "m", "v"], 17),
    "space to depth by channel": ("SpaceToDepth", {"blocksize": 2, "mode": "CRD"}, ["y"], 28),
    "means of a layer norm": ("LayerNormalization", {}, ["y", "mean", "deviation"], 17),
    "resize by a fraction": ("Resize", {"mode": "linear"}, ["y"], 19),
}


@pytest.mark.parametrize("name", WRONG_IN_TVM)
def test_what_tvm_gets_wrong_is_expanded_into_something_right(name: str, tmp_path: Path) -> None:
    op_type, attributes, outputs, opset = WRONG_IN_TVM[name]
    weights = Weights()
    names = {
        "BatchNormalization": [weights.add(part, 4) for part in ("scale", "bias", "m0", "v0")],
        "LayerNormalization": [weights.add(part, 6) for part in ("gamma", "beta")],
        "Resize": ["", "scales"],
    }.get(op_type, [])
    weights["scales"] = np.array([1, 1, 0.6, 0.7], np.float32)
    used = {key: array for key, array in weights.items() if key in names}
    node = helper.make_node(op_type, ["x", *names], outputs, **attributes)
    path = save(tmp_path / "m.onnx", [node], {"x": [2, 4, 4, 6]}, outputs, used, opset)
    model = load_model(path, LLVM)
    inputs = random_inputs(model.inputs, seed=2)
    expected = ReferenceEvaluator(onnx.load(path)).run(None, inputs)
    for got, want in zip(run(model, inputs), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# --- the module ----------------------------------------------------------------------------------


def large_constants(function: relax.Function) -> list[Any]:
    found = []

    def visit(expression: Any) -> None:
        if isinstance(expression, tvm.ir.GenericConst) and hasattr(expression.value, "numpy"):
            found.append(expression.value.numpy().nbytes)

    relax.analysis.post_order_visit(function.body, visit)
    return [size for size in found if size > 1024]


def test_weights_are_parameters_behind_the_inputs(block: Path) -> None:
    model = load_model(block, LLVM)
    main = model.module["main"]
    assert int(main.attrs["num_input"]) == len(model.inputs) == 1
    assert large_constants(main) == []
    assert [p.name_hint if hasattr(p, "name_hint") else p.name for p in main.params][1:] == list(
        model.weights
    )
    for parameter, array in zip(main.params[1:], model.weights.values(), strict=True):
        assert tuple(int(extent) for extent in parameter.ty.shape) == array.shape
    assert model.inputs[0].name == "in.put"
    assert model.outputs[0].name == "out/put"


def test_the_hash_is_of_the_content(block: Path, tmp_path: Path) -> None:
    renamed, changed = tmp_path / "other.onnx", tmp_path / "changed.onnx"
    proto = onnx.load(block)
    proto.doc_string, proto.producer_name = "another day", "another exporter"
    onnx.save(proto, renamed)
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight.flat[0] += 1
    proto.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(weight, proto.graph.initializer[0].name)
    )
    onnx.save(proto, changed)
    hashes = [load_model(path, LLVM).hash for path in (block, block, renamed, changed)]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_sorting_is_legalized_for_the_gpu(tmp_path: Path) -> None:
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"], axis=1)
    path = save(tmp_path / "m.onnx", [node], {"x": [4, 64]}, ["v"], {"k": np.array([3])})
    model = load_model(path, tvm.target.Target("nvidia/nvidia-h100"))
    assert model.outputs == (TensorSpec("v", (4, 3), "float32"),)
    assert "threadIdx.x" in model.module.script()
    assert "threadIdx.x" not in load_model(path, LLVM).module.script()


def test_loading_prints_nothing_but_what_tvm_writes_from_c(block: Path, tmp_path: Path) -> None:
    """Python's side is silent; file descriptors are the caller's, the command line redirects them."""
    program = (
        "import sys, tvm\nfrom pathlib import Path\nfrom gpu_aware_tune.model.importer import load_model\n"
        "load_model(Path(sys.argv[1]), tvm.target.Target('llvm'))\n"
    )
    node = helper.make_node("Gather", ["x.1", "i"], ["y"], axis=1)  # TVM warns of both
    gather = save(tmp_path / "g.onnx", [node], {"x.1": [4, 64]}, ["y"], {"i": np.array([1, 2])})
    bad = save(tmp_path / "b.onnx", [helper.make_node("Add", ["x", "z"], ["y"])],
               {"x": [4]}, ["y"], {})  # fmt: skip
    for path, said in ((block, ""), (gather, ""), (bad, "gpu_aware_tune.errors.UserError")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.stdout == ""
        lines = [line for line in done.stderr.splitlines() if "/project/" not in line]
        last = lines[-1:]  # of Python's traceback, where there is one
        assert [line.split(":")[0] for line in last] == ([said] if said else [])


def test_importing_takes_no_four_copies_of_the_weights(tmp_path: Path) -> None:
    """Two and a bit: the file as bytes and as read, or what TVM has and the weight on its way there."""
    program = (
        "import resource, sys, tvm\nfrom pathlib import Path\n"
        "from gpu_aware_tune.model.importer import load_model\n"
        "for path in sys.argv[1:]:\n"
        "    model = load_model(Path(path), tvm.target.Target('llvm'))\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    paths = []
    for width in (64, 2048):
        weights = Weights()
        nodes = [
            helper.make_node("MatMul", [f"x{n}", weights.add(f"w{n}", width, width)], [f"x{n + 1}"])
            for n in range(8)
        ]
        file = tmp_path / f"{width}.onnx"
        paths.append(str(save(file, nodes, {"x0": [1, width]}, ["x8"], weights)))
    command = [sys.executable, "-c", program, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    small, large = (1024 * int(line) for line in done.stdout.split())
    assert (large - small) / Path(paths[1]).stat().st_size < 2.7


# --- refusals ------------------------------------------------------------------------------------


def refused(model: Callable[[], Model]) -> str:
    with pytest.raises(UserError) as caught:
        model()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_unsupported_operators_are_all_named(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Multinomial", ["x"], ["a"], name="draw_7"),
        node("Relu", ["a"], ["b"]),
        node("Attention", ["b"], ["y"], name="attention_9", domain="some.vendor"),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": [1, 2, 2]}, ["y"], {})
    text = refused(lambda: load_model(path, LLVM))
    for word in ("Multinomial", "draw_7", "some.vendor.Attention", "attention_9", "opset 17"):
        assert word in text
    assert "Relu" not in text


def test_what_tvm_fails_to_import_is_named(tmp_path: Path) -> None:
    scale = np.ones((2, 4), np.float32)  # one scale for each block of two rows
    node = helper.make_node(
        "QuantizeLinear", ["x", "s"], ["y"], name="blocked", axis=0, block_size=2,
        output_dtype=TensorProto.FLOAT8E4M3FN,
    )  # fmt: skip
    path = save(tmp_path / "m.onnx", [node], {"x": [4, 4]}, [], {"s": scale}, opset=21)
    proto = onnx.load(path)
    proto.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT8E4M3FN, None))
    onnx.save(proto, path)
    text = refused(lambda: load_model(path, LLVM))
    for word in ("QuantizeLinear", "'blocked'", "opset 21"):
        assert word in text


def test_an_invalid_graph_is_said_to_be_invalid(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "nobody_makes_this"], ["y"])
    path = save(tmp_path / "m.onnx", [node], {"x": [4]}, ["y"], {})
    text = refused(lambda: load_model(path, LLVM))
    assert "not valid ONNX" in text
    assert "nobody_makes_this" in text


# --- inputs --------------------------------------------------------------------------------------


def test_random_inputs_depend_on_the_seed_alone() -> None:
    specs = [
        TensorSpec("a", (3, 5), "float32"),
        TensorSpec("b", (64,), "int64"),
        TensorSpec("c", (2, 2), "float16"),
        TensorSpec("d", (), "bool"),
    ]
    first, again, other = (random_inputs(specs, seed) for seed in (1, 1, 2))
    for spec in specs:
        assert first[spec.name].shape == spec.shape
        assert first[spec.name].dtype == spec.dtype
        np.testing.assert_array_equal(first[spec.name], again[spec.name])
    assert not np.array_equal(first["a"], other["a"])
    assert set(first["b"]) == {0, 1}
