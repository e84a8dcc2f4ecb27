"""Sums of products of integers: exact, in whole vectors, and as far from ONNX Runtime as its own rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_check import LLVM, computed, imported
from onnx_graphs import run_onnxruntime
from tvm import relax

from gpu_aware_tune.codegen.compile import compile_module
from gpu_aware_tune.kernels.dot_products import names_dot_product
from gpu_aware_tune.kernels.packing import packed
from gpu_aware_tune.kernels.schedules import baseline_schedules
from gpu_aware_tune.kernels.schedules.cpu import machine_of
from gpu_aware_tune.kernels.traces import apply_trace, trace_to_json
from gpu_aware_tune.model.importer import Model
from gpu_aware_tune.model.tasks import extract
from gpu_aware_tune.onnx_prepare.facts import infer_shapes
from gpu_aware_tune.onnx_prepare.unsigned import to_unsigned

SIXTEEN, EIGHT, PAIRS, SIXTEEN_PAIRS = (
    tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": 2})
    for cpu in ("cascadelake", "alderlake", "haswell", "skylake-avx512")
)
# By the processor's flag.
NAMES = {"avx512_vnni": SIXTEEN, "avx_vnni": EIGHT, "avx2": PAIRS, "avx512bw": SIXTEEN_PAIRS}
SOME = {"3x3", "an image of three channels", "outputs that fill no vectors"}


def here(target: tvm.target.Target) -> bool:
    """Whether this processor runs what is compiled for a target."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return any(made.same_as(target) and flag in flags for flag, made in NAMES.items())


@pytest.fixture(params=NAMES)
def target(request: pytest.FixtureRequest) -> tvm.target.Target:
    return NAMES[request.param]


def chosen(cases: Iterable[str]) -> Iterator[Any]:
    """Processors, cases and types: all cases for the two commonest, and some in all combinations."""
    for flag, made in NAMES.items():
        for case in cases:
            if case in SOME or made in (SIXTEEN, PAIRS):
                yield pytest.param(made, case, np.uint8, id=f"{flag}-{case}-uint8")
            if case in SOME:
                yield pytest.param(made, case, np.int8, id=f"{flag}-{case}-int8")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def quantised(
    operators: list[Any], shape: tuple[int, ...], constants: dict[str, np.ndarray], x_type: type
) -> ModelProto:
    """Bytes x in, dequantised with scale `xs` and zero point `xz`; what the operators make of it out."""
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xf"]), *operators],
        "quantised",
        [
            helper.make_tensor_value_info(
                "x", helper.np_dtype_to_tensor_dtype(np.dtype(x_type)), shape
            )
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 19)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def run(
    model: Model, target: tvm.target.Target, *feeds: np.ndarray
) -> tuple[np.ndarray | None, str]:
    """The result of a library with its baseline schedules, if it runs here, and its kernels' traces."""
    traces = {
        task.hash: trace_to_json(baseline_schedules(task.module, target, 1)[0].trace)
        for task in extract(model, target)
    }
    executable = compile_module(model.module, target, traces)
    text = "".join(traces.values())
    if not here(target):
        return None, text
    machine = relax.VirtualMachine(executable, tvm.cpu())
    weights = [tvm.runtime.tensor(np.array(a, order="C")) for a in model.weights.values()]
    result = machine["main"](*map(tvm.runtime.tensor, feeds), *packed(machine, weights))
    return result.numpy(), text


def convolved(c: dict[str, np.ndarray], x: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """The convolution in float64, which holds all sums exactly before they are scaled."""
    top, left, bottom, right = options.get("pads", [0] * 4)
    strides, dilations = options.get("strides", [1, 1]), options.get("dilations", [1, 1])
    image = np.pad(
        x.astype("float64") - float(c["xz"]), ((0, 0), (0, 0), (top, bottom), (left, right))
    )
    weights = c["w"].astype("float64") - c["wz"].astype("float64").reshape(-1, 1, 1, 1)
    height, width = weights.shape[2:]
    reach = [(height - 1) * dilations[0] + 1, (width - 1) * dilations[1] + 1]
    windows = np.lib.stride_tricks.sliding_window_view(image, reach, (2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    sums = np.einsum("nchwij,ocij->nohw", windows, weights)
    scale = float(c["xs"]) * c["ws"].astype("float64").reshape(-1, 1, 1)
    return sums * scale + c["b"].astype("float64").reshape(-1, 1, 1)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"pads": [1] * 4},
    "1x1": {"kernel": 1},
    "strided": {"pads": [1] * 4, "strides": [2, 2]},
    "padded on one side": {"pads": [0, 1, 2, 0]},
    "dilated": {"pads": [2] * 4, "dilations": [2, 2]},
    "blocks as many as lanes": {"kernel": 1, "outputs": 256, "size": 4},
    "one scale for all": {"pads": [1] * 4, "per_channel": False},
    "unsigned weights around 128": {"w_type": np.uint8, "w_zero": 128, "per_channel": False},
    "an image of three channels": {"pads": [1] * 4, "channels": 3, "strides": [2, 2]},
    "patches of three channels": {"channels": 3, "kernel": 4, "strides": [4, 4], "size": 16},
    "an image of eight channels": {"pads": [1] * 4, "channels": 8},
    "channels and outputs of no whole vectors": {"channels": 20, "outputs": 24},
    "the largest zero point": {"pads": [1] * 4, "zero": 127},
}


@pytest.mark.parametrize(("target", "case", "x_type"), list(chosen(CONVOLUTIONS)))
def test_convolutions(target: tvm.target.Target, case: str, x_type: type) -> None:
    options = dict(CONVOLUTIONS[case])
    channels, outputs = options.pop("channels", 32), options.pop("outputs", 48)
    size, kernel = options.pop("size", 9), options.pop("kernel", 3)
    w_type, w_zero = options.pop("w_type", np.int8), options.pop("w_zero", 0)
    zero, per_channel = options.pop("zero", 3), options.pop("per_channel", True)
    generator, w_info, x_info = rng(), np.iinfo(w_type), np.iinfo(x_type)
    scales = (outputs,) if per_channel else ()
    shape = outputs, channels, kernel, kernel
    constants = {
        "xs": np.array(0.05, "float32"),
        "xz": np.array(zero, x_type),
        "w": generator.integers(w_info.min, w_info.max + 1, shape).astype(w_type),
        "ws": np.asarray(generator.random(scales) * 0.01 + 0.001, "float32"),
        "wz": np.full(scales, w_zero, w_type),
        "b": generator.standard_normal(outputs).astype("float32"),
    }
    images = 1, channels, size, size
    x: np.ndarray = generator.integers(x_info.min, x_info.max + 1, images).astype(x_type)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=0),
        helper.make_node("Conv", ["xf", "wf", "b"], ["y"], **options),
    ]
    made = imported(quantised(nodes, x.shape, constants, x_type), target=target)
    got, traces = run(made, target, x)
    assert names_dot_product(traces), "the convolution does not use the instruction"
    if got is not None:
        wanted = convolved(constants, x, options)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


PRODUCTS: dict[str, dict[str, Any]] = {
    "matrix": {},
    "three axes": {"rows": (2, 7)},
    "outputs that fill no vectors": {"columns": 50},
    "one row": {"rows": (1,)},
    "rows of a transformer": {"rows": (197,), "columns": 64},
    "transposed": {"gemm": {"transB": 1}},
    "scaled": {"gemm": {"alpha": 0.5, "beta": 2.0}},
}


@pytest.mark.parametrize(("target", "case", "x_type"), list(chosen(PRODUCTS)))
def test_products(target: tvm.target.Target, case: str, x_type: type) -> None:
    options = PRODUCTS[case]
    gemm = options.get("gemm")
    rows, columns, terms = options.get("rows", (12,)), options.get("columns", 32), 64
    generator, info = rng(), np.iinfo(x_type)
    transposed = bool(gemm and gemm.get("transB"))
    matrix = generator.integers(-128, 128, (terms, columns)).astype("int8")
    constants = {
        "xs": np.array(0.05, "float32"),
        "xz": np.array(7, x_type),
        "w": np.ascontiguousarray(matrix.T) if transposed else matrix,
        "ws": (generator.random(columns) * 0.01 + 0.001).astype("float32"),
        "wz": np.zeros(columns, "int8"),
    }
    x: np.ndarray = generator.integers(info.min, info.max + 1, (*rows, terms)).astype(x_type)
    axis = 0 if transposed else 1
    nodes = [helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=axis)]
    sums = (x.astype("float64") - 7.0) @ matrix.astype("float64")
    wanted = sums * float(constants["xs"]) * constants["ws"].astype("float64")
    if gemm is None:
        nodes.append(helper.make_node("MatMul", ["xf", "wf"], ["y"]))
    else:
        constants["b"] = generator.standard_normal(columns).astype("float32")
        nodes.append(helper.make_node("Gemm", ["xf", "wf", "b"], ["y"], **gemm))
        wanted = gemm.get("alpha", 1.0) * wanted + gemm.get("beta", 1.0) * constants["b"]
    made = imported(quantised(nodes, x.shape, constants, x_type), target=target)
    got, traces = run(made, target, x)
    assert names_dot_product(traces), "the product does not use the instruction"
    if got is not None:
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def integer_product(x: np.ndarray, zeros: dict[str, np.ndarray], matrix: np.ndarray) -> ModelProto:
    order = ["x", "w", *(name if name in zeros else "" for name in ("xz", "wz"))]
    while not order[-1]:
        order.pop()
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", order, ["y"])],
        "integers",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [numpy_helper.from_array(a, name) for name, a in {"w": matrix, **zeros}.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize(
    "zeros",
    [
        {},
        {"xz": np.array(131, "uint8")},
        {"xz": np.array(200, "uint8"), "wz": np.array(0, "int8")},
        {"xz": np.array(131, "uint8"), "wz": np.zeros(48, "int8")},
    ],
)
def test_integer_products_are_exact(
    target: tvm.target.Target, zeros: dict[str, np.ndarray]
) -> None:
    x = rng().integers(0, 256, (10, 64)).astype("uint8")
    matrix = rng().integers(-128, 128, (64, 48)).astype("int8")
    made = imported(integer_product(x, zeros, matrix), target=target)
    got, traces = run(made, target, x)
    assert names_dot_product(traces)
    if got is not None:
        wanted = (x.astype("int64") - int(zeros.get("xz", np.array(0)))) @ matrix.astype("int64")
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("zero", ["none", "constant", "computed"])
@pytest.mark.parametrize(
    ("channels", "x_type"),  # sums that float32 holds, and larger ones
    [(8, np.uint8), (64, np.uint8), (8, np.int8)],
)
def test_integer_convolutions_are_exact(
    target: tvm.target.Target, zero: str, channels: int, x_type: type
) -> None:
    """As the dynamic quantiser writes them: the zero point is only known when the model runs."""
    info = np.iinfo(x_type)
    x: np.ndarray = rng().integers(info.min, info.max + 1, (1, channels, 5, 5)).astype(x_type)
    point: np.ndarray = np.array(0 if zero == "none" else 100, x_type)
    w = rng().integers(-128, 128, (32, channels, 3, 3)).astype("int8")
    names = ["x", "w", *(["xz"] if zero != "none" else [])]
    feeds = {"x": x, **({"xz": point} if zero == "computed" else {})}
    constants = {"w": w, **({"xz": point} if zero == "constant" else {})}
    graph = helper.make_graph(
        [helper.make_node("ConvInteger", names, ["y"], pads=[1, 1, 0, 0])],
        "integers",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feeds.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 13)]
    made = imported(helper.make_model(graph, opset_imports=opsets, ir_version=8), target=target)
    got, traces = run(made, target, *feeds.values())
    assert names_dot_product(traces), "the convolution does not use the instruction"
    if got is not None:
        one, none = np.ones(1), np.zeros(1)
        exact = {"xs": one[0], "xz": point, "w": w, "wz": none, "ws": one, "b": none}
        wanted = convolved(exact, x, {"pads": [1, 1, 0, 0]})
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("zero", [np.array(-20, "int8"), np.array(300.0, "float32")])
def test_a_zero_point_that_is_no_byte_of_the_image_is_left_to_floats(zero: np.ndarray) -> None:
    """Outside of the image it would have to be a byte."""
    w = rng().integers(-128, 128, (32, 8, 3, 3)).astype("float32")
    x = rng().integers(0, 256, (1, 8, 5, 5)).astype("uint8")
    nodes = [
        helper.make_node("Cast", ["x"], ["xf"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["z"], ["zf"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["xf", "zf"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["y"], pads=[1] * 4),
    ]
    feeds = {"x": x, **({"z": zero} if zero.dtype == np.int8 else {})}
    constants = {"w": w, **({} if "z" in feeds else {"z": zero})}
    graph = helper.make_graph(
        nodes,
        "moved",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feeds.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (wanted,) = run_onnxruntime(model, dict(feeds))
    (got,) = computed(imported(model, target=PAIRS), feeds)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_integers_that_floats_round_are_rounded() -> None:
    """Only the sums of an integer convolution are known to be whole in floats."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["f"], ["y"], to=TensorProto.INT32),
        ],
        "rounded",
        [helper.make_tensor_value_info("x", TensorProto.INT32, [2])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    x = np.array([(1 << 24) + 1, 7], "int32")
    got = computed(imported(model, target=PAIRS), {"x": x})[0]
    np.testing.assert_array_equal(got, [1 << 24, 7])


@pytest.mark.parametrize("why", ["zero points apart", "terms", "weights at run time"])
def test_what_does_not_fit_is_left_to_floats(why: str) -> None:
    """And is right all the same."""
    terms = 62 if why == "terms" else 64
    x = rng().integers(0, 256, (10, terms)).astype("uint8")
    matrix = rng().integers(-128, 128, (terms, 48)).astype("int8")
    zeros = {"xz": np.array(3, "uint8"), "wz": np.zeros(48, "int8")}
    if why == "zero points apart":
        zeros["wz"][5] = 100
    model = integer_product(x, zeros, matrix)
    feeds = {"x": x}
    if why == "weights at run time":
        (weights,) = (t for t in model.graph.initializer if t.name == "w")
        model.graph.initializer.remove(weights)
        model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.INT8, matrix.shape))
        feeds["w"] = matrix
    made = imported(model, target=SIXTEEN)
    assert not any("bytes" in variable.name_hint for variable in made.module.get_global_vars())
    executable = compile_module(made.module, LLVM, {})
    machine = relax.VirtualMachine(executable, tvm.cpu())
    arrays = [feeds[spec.name] for spec in made.inputs] + list(made.weights.values())
    got = machine["main"](*(tvm.runtime.tensor(np.array(a, order="C")) for a in arrays))
    moved = matrix.astype("int64") - zeros["wz"].astype("int64")
    wanted = (x.astype("int64") - 3) @ moved  # exact, which ONNX Runtime is not without VNNI
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_half_precision_is_left_to_floats() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"]),
        helper.make_node("MatMul", ["xf", "wf"], ["h"]),
        helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = {
        "xs": np.array(0.05, "float16"),
        "xz": np.array(3, "uint8"),
        "w": rng().integers(-128, 128, (64, 32)).astype("int8"),
        "ws": np.array(0.01, "float16"),
        "wz": np.array(0, "int8"),
    }
    model = quantised(nodes, (4, 64), constants, np.uint8)
    made = imported(model, target=SIXTEEN)
    assert not any("bytes" in variable.name_hint for variable in made.module.get_global_vars())


def test_schedules_replay(target: tvm.target.Target) -> None:
    """Records hold traces: each alternative gives the same kernel again in another process."""
    x = rng().integers(0, 256, (24, 64)).astype("uint8")
    matrix = rng().integers(-128, 128, (64, 96)).astype("int8")
    made = imported(integer_product(x, {}, matrix), target=target)
    (task,) = (task for task in extract(made, target) if "bytes" in task.name)
    found = baseline_schedules(task.module, target)
    assert len(found) == 3
    for schedule in found:
        again = apply_trace(trace_to_json(schedule.trace), task.module)
        assert tvm_ffi.structural_equal(again.mod, schedule.mod)


@pytest.mark.parametrize("outputs", [32, 24])
def test_images_between_convolutions_are_in_blocks(target: tvm.target.Target, outputs: int) -> None:
    """Of 24 channels they are not, and the second convolution sums bytes in blocks all the same."""
    generator = rng()
    constants = {"xs": np.array(0.05, "float32"), "xz": np.array(9, "uint8")}
    nodes = []
    step = 0.0937  # no round number: hardly a result lies between two steps
    for number, (channels, filters) in enumerate([(16, 32), (32, outputs), (outputs, 16)]):
        constants |= {
            f"w{number}": generator.integers(-128, 128, (filters, channels, 3, 3)).astype("int8"),
            f"ws{number}": np.array(0.002, "float32"),
            f"wz{number}": np.array(0, "int8"),
            f"ys{number}": np.array(step, "float32"),
            f"yz{number}": np.array(100, "uint8"),
        }
        read = "xf" if number == 0 else f"d{number - 1}"
        parameters = [f"ys{number}", f"yz{number}"]
        names = [f"w{number}", f"ws{number}", f"wz{number}"]
        nodes += [
            helper.make_node("DequantizeLinear", names, [f"wf{number}"]),
            helper.make_node("Conv", [read, f"wf{number}"], [f"c{number}"], pads=[1] * 4),
            helper.make_node("QuantizeLinear", [f"c{number}", *parameters], [f"q{number}"]),
            helper.make_node("DequantizeLinear", [f"q{number}", *parameters], [f"d{number}"]),
        ]
    nodes[-1].output[0] = "y"
    x: np.ndarray = generator.integers(0, 256, (1, 16, 9, 9)).astype("uint8")
    model = quantised(nodes, x.shape, constants, np.uint8)
    made = imported(model, target=target)
    names = [variable.name_hint for variable in made.module.get_global_vars()]
    assert any(f"nchw{machine_of(target).lanes}c" in name for name in names)
    got, traces = run(made, target, x)
    assert traces.count('"Tensorize"') == 3
    if got is not None:
        (wanted,) = ReferenceEvaluator(model).run(None, {"x": x})
        steps = np.abs(got - wanted) / step
        assert steps.max() < 1.01 and np.mean(steps > 0.01) < 0.01


def rounded(nodes: list[Any], shape: tuple[int, ...], **outputs: int) -> ModelProto:
    """Floats x in, and scale `s` and zero point `z` of signed bytes; outputs of these types."""
    graph = helper.make_graph(
        nodes,
        "rounded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [
            numpy_helper.from_array(np.array(0.1, "float32"), "s"),
            numpy_helper.from_array(np.array(-5, "int8"), "z"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def made_unsigned(model: ModelProto, x: np.ndarray) -> tuple[dict[str, int], list[np.ndarray]]:
    """The types between the nodes and the results afterwards, which are those of before."""
    wanted = run_onnxruntime(model, {"x": x})
    changed = to_unsigned(model)
    types = {v.name: v.type.tensor_type.elem_type for v in infer_shapes(changed).graph.value_info}
    got = run_onnxruntime(changed, {"x": x})
    for left, right in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(left, right)
    return types, got


def test_what_is_only_chosen_by_order_becomes_unsigned_too() -> None:
    """As ONNX Runtime's quantiser writes it: a maximum of bytes between two conversions."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("MaxPool", ["q"], ["m"], kernel_shape=[2, 2], pads=[1, 1, 0, 0]),
        helper.make_node("Transpose", ["m"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("DequantizeLinear", ["t", "s", "z"], ["y"]),
    ]
    x = (3 * rng().standard_normal((1, 3, 5, 5))).astype("float32")
    types, _ = made_unsigned(rounded(nodes, x.shape, y=TensorProto.FLOAT), x)
    assert types["t"] == types["m"] == TensorProto.UINT8


def test_signed_activations_become_unsigned() -> None:
    """A rounded value that is only converted back needs no sign; one that leaves the model keeps it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["kept"]),
        helper.make_node("DequantizeLinear", ["kept", "s", "z"], ["unused"]),
    ]
    x = (20 * rng().standard_normal((1, 16, 5, 5))).astype("float32")
    model = rounded(nodes, x.shape, y=TensorProto.FLOAT, kept=TensorProto.INT8)
    types, got = made_unsigned(model, x)
    assert types["q"] == TensorProto.UINT8
    assert got[1].dtype == np.int8
