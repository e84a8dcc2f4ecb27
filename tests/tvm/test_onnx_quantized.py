"""Quantised operators: exact integers, and ONNX Runtime's results to one step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_check import assert_correct, computed, imported
from onnx_graphs import node_model, numbers, run_onnxruntime

U8, I8 = TensorProto.UINT8, TensorProto.INT8


def one(
    op_type: str,
    feeds: dict[str, np.ndarray],
    constants: dict[str, np.ndarray],
    order: list[str],
    output: int,
    domain: str = "com.microsoft",
    **attributes: Any,
) -> ModelProto:
    node = helper.make_node(op_type, order, ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "quantised",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in feeds.items()
        ],
        [helper.make_tensor_value_info("y", output, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("channels", [3, 128])
def test_integer_convolutions_are_exact(channels: int, per_channel: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (1, channels, 7, 7)).astype("uint8")
    w = rng.integers(-128, 128, (4, channels, 3, 3)).astype("int8")
    zeros = rng.integers(-5, 6, 4 if per_channel else ()).astype("int8")
    constants = {"w": w, "xz": np.array(131, "uint8"), "wz": zeros}
    order = ["x", "w", "xz", "wz"]
    model = one("ConvInteger", {"x": x}, constants, order, TensorProto.INT32, "", pads=[1] * 4)
    wide = np.pad(x.astype("int64") - 131, ((0, 0), (0, 0), (1, 1), (1, 1)))
    kernel = w.astype("int64") - zeros.astype("int64").reshape(-1, 1, 1, 1)
    windows = np.lib.stride_tricks.sliding_window_view(wide[0], (3, 3), (1, 2))
    wanted = np.einsum("chwij,ocij->ohw", windows, kernel)[None]
    (got,) = computed(imported(model), {"x": x})
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("channels", [3, 600])
def test_integer_sums_stay_floats_where_they_become_floats(channels: int) -> None:
    """As the dynamic quantiser writes it; a cast to integers and back is dozens of operators."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (1, channels, 5, 5)).astype("uint8")
    constants = {
        "w": rng.integers(-128, 128, (4, channels, 3, 3)).astype("int8"),
        "xz": np.array(131, "uint8"),
    }
    model = one("ConvInteger", {"x": x}, constants, ["x", "w", "xz"], TensorProto.INT32, "")
    model.graph.node.append(helper.make_node("Cast", ["y"], ["f"], to=TensorProto.FLOAT))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("f", TensorProto.FLOAT, None))
    made = assert_correct(model, {"x": x}, tolerance=1e-7)
    kernels = str([gv.name_hint for gv in made.module.get_global_vars()])
    assert "isfinite" not in kernels and "floor_mod" not in kernels


def scale(value: float) -> np.ndarray:
    return np.array(value, "float32")


A = {"as": scale(0.02), "az": np.array(120, "uint8")}
B = {"bs": scale(0.05), "bz": np.array(7, "uint8")}
C = {"cs": scale(0.06), "cz": np.array(128, "uint8")}


@pytest.mark.parametrize(
    ("op_type", "order", "attributes"),
    [
        ("QLinearAdd", ["a", "as", "az", "b", "bs", "bz", "cs", "cz"], {}),
        ("QLinearMul", ["a", "as", "az", "b", "bs", "bz", "cs", "cz"], {}),
        ("QLinearConcat", ["cs", "cz", "a", "as", "az", "b", "bs", "bz"], {"axis": 1}),
        ("QLinearLeakyRelu", ["a", "as", "az", "cs", "cz"], {"alpha": 0.1}),
        ("QLinearSigmoid", ["a", "as", "az", "cs", "cz"], {}),
        ("QLinearSoftmax", ["a", "as", "az", "cs", "cz"], {"axis": 1, "opset": 13}),
        ("QLinearWhere", ["c", "a", "as", "az", "b", "bs", "bz", "cs", "cz"], {}),
    ],
)
def test_what_onnxruntime_writes_is_right_to_one_step(
    op_type: str, order: list[str], attributes: dict[str, Any]
) -> None:
    rng = np.random.default_rng(1)
    every = {name: rng.integers(0, 256, (2, 300)).astype("uint8") for name in ("a", "b")}
    every["c"] = rng.integers(0, 2, (2, 300)).astype("bool")
    feeds = {name: array for name, array in every.items() if name in order}
    constants = {name: value for name, value in {**A, **B, **C}.items() if name in order}
    model = one(op_type, feeds, constants, order, U8, **attributes)
    assert_one_step(model, feeds)


def assert_one_step(model: ModelProto, feeds: dict[str, np.ndarray]) -> None:
    (wanted,) = run_onnxruntime(model, dict(feeds))
    (got,) = computed(imported(model), feeds)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    apart = np.abs(got.astype(int) - wanted.astype(int))
    assert apart.max() <= 1 and np.mean(apart > 0) < 0.05, "ties are rounded either way"


@pytest.mark.parametrize("op_type", ["QLinearAveragePool", "QLinearGlobalAveragePool"])
def test_quantised_pools_are_right_to_one_step(op_type: str) -> None:
    feeds = {"a": np.random.default_rng(1).integers(0, 256, (1, 6, 8, 8)).astype("uint8")}
    order = ["a", "as", "az", "cs", "cz"]
    attributes: dict[str, Any] = {}
    if op_type == "QLinearAveragePool":
        attributes["kernel_shape"] = [3, 3]
    model = one(op_type, feeds, A | C, order, U8, **attributes)
    assert_one_step(model, feeds)


GEMM = ["a", "as", "az", "b", "bs", "bz", "bias", "cs", "cz"]


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("case", ["all", "no bias", "float", "transposed"])
def test_quantised_products_are_right_to_one_step(case: str, per_column: bool) -> None:
    rng = np.random.default_rng(1)
    columns = (5,) if per_column else ()
    shape = (5, 8) if case == "transposed" else (8, 5)
    constants = {
        "b": rng.integers(0, 256, shape).astype("uint8"),
        "bs": rng.uniform(0.01, 0.02, columns).astype("float32"),
        "bz": np.full(columns, 131, "uint8"),
        "bias": rng.integers(-9000, 9000, 5).astype("int32"),
        **A,
        **C,
    }
    order = [name if case != "no bias" or name != "bias" else "" for name in GEMM]
    order = order[:7] if case == "float" else order
    feeds = {"a": rng.integers(0, 256, (3, 8)).astype("uint8")}
    kept = {name: array for name, array in constants.items() if name in order}
    kind = TensorProto.FLOAT if case == "float" else U8
    values: dict[str, Any] = {"alpha": 0.5, "transB": int(case == "transposed")}
    model = one("QGemm", feeds, kept, order, kind, **values)
    if case == "float":
        assert_correct(model, feeds)
    else:
        assert_one_step(model, feeds)


@pytest.mark.parametrize("case", ["bias", "zero point", "plain", "per column"])
def test_a_product_whose_activations_are_quantised_while_it_runs(case: str) -> None:
    """Weights of 7 bits: without VNNI, ONNX Runtime's sums of larger ones saturate."""
    generator = np.random.default_rng(0)
    columns = (7,) if case == "per column" else ()
    constants: dict[str, np.ndarray] = {
        "b": generator.integers(-64, 64, (8, 7)).astype(np.int8),
        "s": generator.uniform(0.01, 0.02, columns).astype(np.float32),
    }
    order = "x,b,s"
    if case != "plain":
        constants["z"] = np.full(columns, 3, np.int8)
        order += ",z"
    if case == "bias":
        constants["bias"] = numbers(7, seed=2)
        order += ",bias"
    feeds = {"x": numbers(2, 5, 8)}
    model = node_model(
        "DynamicQuantizeMatMul", feeds, constants, order=order, domain="com.microsoft"
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert_correct(model, feeds)


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_an_integer_product_that_is_scaled(zeros: int) -> None:
    generator = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {
        "b": generator.integers(-64, 64, (8, 7)).astype(np.int8),
        "as": np.array(0.02, np.float32),
        "bs": np.array(0.03, np.float32),
        "az": np.array(120, np.uint8),
        "bz": np.array(-2, np.int8),
        "bias": numbers(7, seed=2),
    }
    order = ["x,b,as,bs,,,bias", "x,b,as,bs,az,,bias", "x,b,as,bs,az,bz,bias"][zeros]
    constants = {name: array for name, array in constants.items() if name in order.split(",")}
    feeds = {"x": generator.integers(0, 255, (2, 8)).astype(np.uint8)}
    model = node_model(
        "MatMulIntegerToFloat", feeds, constants, order=order, domain="com.microsoft"
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert_correct(model, feeds)
