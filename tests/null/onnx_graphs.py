"""Small ONNX graphs for the tests, and the comparison with ONNX's own reference."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from gpu_aware_tune.onnx_prepare import prepare
from gpu_aware_tune.onnx_prepare.facts import walk

F32, F16, I64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL
U8, I32 = TensorProto.UINT8, TensorProto.INT32

# A part of what TVM's importer has; enough for what the expansions below emit.
NAMES = """
Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast CastLike Ceil Clip Concat Constant
Conv ConvTranspose CumSum DepthToSpace DequantizeLinear Div Dropout Elu Equal Erf Exp Expand
Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool Greater Hardmax Identity If
InstanceNormalization IsInf IsNaN LayerNormalization Less Log LogSoftmax MatMul Max MaxPool Min
Mod Mul Neg NonMaxSuppression OneHot PRelu Pad Pow QuantizeLinear Reciprocal ReduceL1 ReduceL2
ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare Relu Reshape Resize ScatterElements Shape
Sigmoid Slice Softmax SpaceToDepth Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Unsqueeze Where
"""
SUPPORTED = {("", name) for name in NAMES.split()}


def value(name: str, dtype: int, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[tuple[str, int]],
    constants: dict[str, Any] | None = None,
    opset: int = 18,
) -> ModelProto:
    """Makes a model whose outputs have types but no shapes."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        list(inputs),
        [value(name, dtype, None) for name, dtype in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def copy(model: ModelProto) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(model)
    return made


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in walk(model.graph)]


def assert_same(model: ModelProto, feeds: dict[str, np.ndarray], rtol: float = 1e-5) -> ModelProto:
    """Prepares a model and compares both with the reference; gives the prepared one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = ReferenceEvaluator(model).run(None, feeds)
        prepared = prepare(copy(model), {}, None, SUPPORTED)
        got = ReferenceEvaluator(prepared).run(None, feeds)
    assert [v.name for v in prepared.graph.output] == [v.name for v in model.graph.output]
    for left, right in zip(got, expected, strict=True):
        assert np.asarray(left).dtype == np.asarray(right).dtype
        np.testing.assert_allclose(left, right, rtol=rtol, atol=rtol)
    return prepared


def run_onnxruntime(model: ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feeds))


def assert_as_onnxruntime(
    model: ModelProto, feeds: dict[str, np.ndarray], rtol: float = 1e-5
) -> ModelProto:
    """Prepares a model and compares it with ONNX Runtime on the original."""
    expected = run_onnxruntime(model, feeds)
    prepared = prepare(copy(model), {}, None, SUPPORTED)
    for left, right in zip(run_onnxruntime(prepared, feeds), expected, strict=True):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        np.testing.assert_allclose(left, right, rtol=rtol, atol=rtol)
    return prepared


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def node_model(
    op_type: str,
    arrays: dict[str, np.ndarray],
    constants: dict[str, Any],
    outputs: Sequence[tuple[str, int]] = (("y", F32),),
    opset: int = 18,
    order: str | None = None,
    **attributes: Any,
) -> ModelProto:
    inputs = [
        value(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in arrays.items()
    ]
    names = order.split(",") if order is not None else [*arrays, *constants]
    node = helper.make_node(op_type, names, [name for name, _ in outputs], **attributes)
    return make_model([node], inputs, outputs, constants, opset)


def batch_norm_constants() -> dict[str, np.ndarray]:
    scales = {"scale": numbers(4, seed=1), "bias": numbers(4, seed=2), "mean": numbers(4, seed=3)}
    return {**scales, "var": np.abs(numbers(4, seed=4)) + 0.5}
