"""Operators of com.microsoft, which ONNX Runtime writes, against ONNX Runtime itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper
from onnx_check import assert_correct, imported
from onnx_graphs import F16, F32, numbers, run_onnxruntime
from onnx_graphs import node_model as standard_model

from gpu_aware_tune.errors import UserError

X = numbers(2, 5, 8)
SCALE, SHIFT, BIAS = numbers(8, seed=1), numbers(8, seed=2), numbers(8, seed=3)
HEADS = {"num_heads": 2}
CACHE = {"cos": np.cos(numbers(16, 4, seed=4)), "sin": np.sin(numbers(16, 4, seed=4))}


def node_model(op_type: str, *args: Any, **keywords: Any) -> ModelProto:
    keywords.setdefault("domain", "com.microsoft")
    model = standard_model(op_type, *args, **keywords)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize(
    ("op_type", "constants", "values"),
    [
        ("Gelu", {}, {}),
        ("FastGelu", {}, {}),
        ("FastGelu", {"b": BIAS}, {}),
        ("BiasGelu", {"b": BIAS}, {}),
        ("QuickGelu", {}, {"alpha": 1.3}),
        ("QuickGelu", {}, {}),
    ],
)
def test_activations(
    op_type: str, constants: dict[str, Any], values: dict[str, Any], opset: int
) -> None:
    model = node_model(op_type, {"x": X}, constants, opset=opset, **values)
    assert_correct(model, {"x": X})


def test_an_activation_in_half_precision() -> None:
    feeds = {"x": 4 * X.astype(np.float16)}
    wide = feeds["x"].astype(np.float32)
    want = wide * (1 / (1 + np.exp(-1.702 * wide)))
    model = node_model("QuickGelu", feeds, {}, [("y", F16)])
    assert_correct(model, feeds, [want.astype(np.float16)], 1e-3)


@pytest.mark.parametrize(
    "activation",
    [
        ("Relu", []),
        ("LeakyRelu", [0.2]),
        ("Clip", [-0.5, 0.7]),
        ("HardSigmoid", [0.3, 0.4]),
        ("Tanh", []),
        ("Sigmoid", []),
    ],
)
@pytest.mark.parametrize("addend", [False, True])
def test_fused_convolutions(activation: tuple[str, list[float]], addend: bool) -> None:
    feeds = {"x": numbers(1, 4, 6, 6)}
    constants = {"w": numbers(3, 4, 3, 3, seed=1), "b": numbers(3, seed=2)}
    values: dict[str, Any] = {"activation": activation[0]}
    if activation[1]:
        values["activation_params"] = activation[1]
    if addend and activation[0] != "Relu":
        pytest.skip("ONNX Runtime adds before a Relu only")
    if addend:
        feeds["z"] = numbers(1, 3, 4, 4, seed=3)
    order = "x,w,b,z" if addend else "x,w,b"
    assert_correct(node_model("FusedConv", feeds, constants, order=order, **values), feeds)


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": 0.5},
        {"transA": 1, "alpha": 2.0},
        {"transB": 1},
        {"transA": 1, "transB": 1},
        {"transBatchA": 1},
        {"transBatchA": 1, "transA": 1, "transBatchB": 1},
        {"transBatchB": 1, "transB": 1},
    ],
)
def test_fused_products(values: dict[str, Any]) -> None:
    shapes = {"a": [2, 3, 4, 5], "b": [2, 3, 5, 6]}
    feeds = {}
    for key, name in (("A", "a"), ("B", "b")):
        array = numbers(*shapes[name], seed=ord(key))
        if values.get(f"trans{key}"):
            array = array.swapaxes(-1, -2)
        if values.get(f"transBatch{key}"):
            array = np.moveaxis(array, -2, 0)
        feeds[name] = np.ascontiguousarray(array)
    assert_correct(node_model("FusedMatMul", feeds, {}, **values), feeds)


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu"])
def test_fused_gemm(activation: str) -> None:
    values: dict[str, Any] = {"alpha": 0.5, "beta": 2.0, "transB": 1}
    values |= {"activation": activation, "activation_alpha": 0.3}
    feeds, constants = {"a": X[0]}, {"b": numbers(3, 8), "c": numbers(3)}
    assert_correct(node_model("FusedGemm", feeds, constants, **values), feeds)


# --- norms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("axis", [-1, 1])
def test_simplified_layer_norm(axis: int, opset: int) -> None:
    scale = SCALE if axis == -1 else numbers(5, 8, seed=1)
    model = node_model(
        "SimplifiedLayerNormalization",
        {"x": 3 * X},
        {"s": scale},
        opset=opset,
        domain="",
        axis=axis,
        epsilon=1e-3,
    )
    assert_correct(model, {"x": 3 * X})


def test_layer_norm_before_the_standard_has_it() -> None:
    outputs = [("y", F32), ("mean", F32), ("inv", F32)]
    constants = {"s": SCALE, "b": BIAS}
    model = node_model("LayerNormalization", {"x": X}, constants, outputs, 13, domain="")
    assert_correct(model, {"x": X})


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("order", ["x,k,s", "x,k,s,h", "x,k,s,,b", "x,k,s,h,b"])
def test_skip_layer_norm(order: str, batch: int) -> None:
    feeds = {"x": X, "k": numbers(batch, 5, 8, seed=5)}
    constants = {"s": SCALE, "h": SHIFT, "b": BIAS}
    for outputs in ([("y", F32)], [("y", F32), ("", 0), ("", 0), ("sum", F32)]):
        model = node_model("SkipLayerNormalization", feeds, constants, outputs, order=order)
        del model.graph.output[:]
        model.graph.output.extend(
            helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs if name
        )
        assert_correct(model, feeds)


@pytest.mark.parametrize("order", ["x,k,s", "x,k,s,b"])
def test_skip_simplified_layer_norm(order: str) -> None:
    feeds = {"x": X, "k": numbers(2, 5, 8, seed=5)}
    outputs = [("y", F32), ("", 0), ("", 0), ("sum", F32)]
    model = node_model(
        "SkipSimplifiedLayerNormalization",
        feeds,
        {"s": SCALE, "b": BIAS},
        outputs,
        order=order,
        epsilon=1e-5,
    )
    del model.graph.output[1:3]
    assert_correct(model, feeds)


def test_types_are_known_behind_operators_of_other_domains() -> None:
    """Shape inference ends at a Gelu; the FusedMatMul behind it needs the rank of its operand."""
    model = node_model("Gelu", {"x": 0.1 * X}, {}, [("y", F32)])
    model.graph.node[0].output[0] = "p0"
    for index in range(1, 10):  # more in a row than there are rounds of rewriting
        read, made = f"p{index - 1}", "y" if index == 9 else f"p{index}"
        values = {"domain": "com.microsoft", "transB": index % 2}
        model.graph.node.append(helper.make_node("FusedMatMul", [read, "x"], [made], **values))
    assert_correct(model, {"x": 0.1 * X})


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rank", [3, 4])
def test_rotary_embedding(rank: int, first: bool, interleaved: int) -> None:
    x = numbers(2, 5, 16) if rank == 3 else numbers(2, 2, 5, 8)
    places = np.array([3]) if first else np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    feeds = {"x": x, "p": places}
    model = node_model("RotaryEmbedding", feeds, CACHE, interleaved=interleaved)
    assert_correct(model, feeds)


def test_rotary_embedding_of_a_part() -> None:
    feeds = {"x": numbers(2, 5, 24), "p": np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])}
    values = {"num_heads": 2, "rotary_embedding_dim": 8}
    assert_correct(node_model("RotaryEmbedding", feeds, CACHE, **values), feeds)


MASKS = {
    "none": None,
    "lengths": np.array([3, 5], np.int32),
    "ends and starts": np.array([4, 5, 1, 0], np.int32),
    "keys": np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], np.int32),
    "queries and keys": np.tril(np.ones((2, 5, 5), np.int32)),
}


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_attention(mask: str, unidirectional: int) -> None:
    feeds: dict[str, np.ndarray] = {"x": X}
    constants = {"w": numbers(8, 24, seed=6), "b": numbers(24, seed=7)}
    order = "x,w,b"
    if (array := MASKS[mask]) is not None:
        feeds["m"] = array
        order += ",m"
    model = node_model(
        "Attention", feeds, constants, order=order, unidirectional=unidirectional, **HEADS
    )
    assert_correct(model, feeds)


def test_attention_with_a_past() -> None:
    feeds = {"x": X, "past": numbers(2, 2, 2, 3, 4, seed=8)}
    constants = {"w": numbers(8, 24, seed=6), "b": numbers(24, seed=7)}
    outputs = [("y", F32), ("present", F32)]
    order = "x,w,b,,past"
    model = node_model("Attention", feeds, constants, outputs, order=order, **HEADS)
    assert_correct(model, feeds)


def test_attention_of_other_sizes() -> None:
    feeds = {"x": X, "a": numbers(2, 2, 5, 5, seed=9)}
    constants = {"w": numbers(8, 20, seed=6), "b": numbers(20, seed=7)}
    values = {"qkv_hidden_sizes": [4, 4, 12], "scale": 0.3}
    order = "x,w,b,,,a"
    assert_correct(node_model("Attention", feeds, constants, order=order, **values, **HEADS), feeds)


KEY = {"k": numbers(2, 7, 8, seed=10), "v": numbers(2, 7, 12, seed=11)}
MULTI_HEAD: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "three": ("x,k,v", {"x": X, **KEY}),
    "bias": ("x,k,v,b", {"x": X, **KEY, "b": numbers(28, seed=12)}),
    "lengths": ("x,k,v,,m", {"x": X, **KEY, "m": np.array([4, 7], np.int32)}),
    "keys": ("x,k,v,,m", {"x": X, **KEY, "m": np.tri(2, 7, 3, dtype=np.int32)}),
    "scores": ("x,k,v,,,a", {"x": X, **KEY, "a": numbers(1, 2, 5, 7, seed=13)}),
    "in heads": ("x,k,v", {"x": X, "k": numbers(2, 2, 7, 4), "v": numbers(2, 2, 7, 4, seed=1)}),
}


@pytest.mark.parametrize("case", MULTI_HEAD)
def test_multi_head_attention(case: str) -> None:
    order, feeds = MULTI_HEAD[case]
    assert_correct(node_model("MultiHeadAttention", feeds, {}, order=order, **HEADS), feeds)


@pytest.mark.parametrize("parts", [3, 2])
def test_packed_operands_are_the_same_as_separate_ones(parts: int) -> None:
    """Not against ONNX Runtime on the packed ones, which it has on GPUs alone."""
    apart = [numbers(2, 5, 2, 4, seed=seed) for seed in range(3)]
    flat = {name: array.reshape(2, 5, 8) for name, array in zip("qkv", apart, strict=True)}
    (want,) = run_onnxruntime(node_model("MultiHeadAttention", flat, {}, **HEADS), flat)
    feeds = {"p": np.stack(apart[3 - parts :], axis=3)}
    if parts == 2:
        feeds = {"q": flat["q"], **feeds}
    assert_correct(node_model("MultiHeadAttention", feeds, {}, **HEADS), feeds, [want])


def test_multi_head_attention_with_a_past() -> None:
    feeds = {"x": X, "k": numbers(2, 5, 8, seed=1), "v": numbers(2, 5, 8, seed=2)}
    feeds |= {"p": numbers(2, 2, 3, 4, seed=3), "r": numbers(2, 2, 3, 4, seed=4)}
    outputs = [("y", F32), ("pk", F32), ("pv", F32)]
    values = {"unidirectional": 1, **HEADS}
    model = node_model("MultiHeadAttention", feeds, {}, outputs, order="x,k,v,,,,p,r", **values)
    assert_correct(model, feeds)


GROUPED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"do_rotary": 1},
    "rotary interleaved": {"do_rotary": 1, "rotary_interleaved": 1},
    "window": {"local_window_size": 2},
    "softcap": {"softcap": 5.0},
    "smooth": {"smooth_softmax": 1},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", GROUPED)
def test_group_query_attention(case: str, packed: bool) -> None:
    feeds = {"q": numbers(2, 5, 128 if packed else 64)}
    if not packed:
        feeds |= {"k": numbers(2, 5, 32, seed=1), "v": numbers(2, 5, 32, seed=2)}
    constants = {"n": np.array([4, 4], np.int32), "t": np.array(5, np.int32)}
    order = "q,,,,,n,t" if packed else "q,k,v,,,n,t"
    if GROUPED[case].get("do_rotary"):
        constants |= {"cos": np.cos(numbers(16, 8)), "sin": np.sin(numbers(16, 8))}
        order += ",cos,sin"
    outputs = [("y", F32), ("pk", F32), ("pv", F32)]
    values = {"num_heads": 4, "kv_num_heads": 2, **GROUPED[case]}
    model = node_model("GroupQueryAttention", feeds, constants, outputs, order=order, **values)
    assert_correct(model, feeds)


@pytest.mark.parametrize("case", ["past", "quantised"])
def test_what_group_query_attention_cannot_do_is_said(case: str) -> None:
    feeds = {"q": numbers(2, 5, 128), "p": numbers(2, 2, 3, 16), "r": numbers(2, 2, 3, 16)}
    values: dict[str, Any] = {}
    order, reason = "q,,,p,r,n,t", r"past keys and values \('p'\).*without a cache"
    if case == "quantised":
        feeds = {"q": feeds["q"]}
        order, values = "q,,,,,n,t", {"k_quant_type": "PER_TENSOR"}
        reason = "quantised; export the cache in floats"
    constants = {"n": np.array([4, 4], np.int32), "t": np.array(5, np.int32)}
    outputs = [("y", F32), ("pk", F32), ("pv", F32)]
    values |= {"num_heads": 4, "kv_num_heads": 2}
    model = node_model("GroupQueryAttention", feeds, constants, outputs, order=order, **values)
    with pytest.raises(UserError, match=rf"GroupQueryAttention \(node 'y'\): .*{reason}"):
        imported(model)
