"""The models of the GPU benchmarks, made without network: ResNet-50 and a BERT encoder, batch 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

MODELS = ("resnet50", "bert")


def write_model(name: str, folder: Path, tiny: bool = False) -> Path:
    """Write a model's ONNX file with seeded weights; the same bytes each time.

    Args:
        name: one of `MODELS`.
        folder: where.
        tiny: a few small layers of the same kinds, for machines without a GPU.
    """
    path = folder / f"{name}.onnx"
    if name == "bert":
        model = bert_encoder(1, 32, 2, 8) if tiny else bert_encoder()
    elif tiny:
        model = _tiny_convolutions()
    else:
        from benchmarks.light_models import seeded

        model = seeded("resnet50", 0)
    onnx.save(model, path)
    return path


def bert_encoder(
    layers: int = 4, hidden: int = 768, heads: int = 12, tokens: int = 128
) -> onnx.ModelProto:
    """BERT-base's encoder; four layers have the kernels that twelve have."""
    graph = _Graph(np.random.default_rng(0))
    value = "x"
    for number in range(layers):
        value = _encoder_layer(graph, f"l{number}.", value, hidden, heads, tokens)
    graph.nodes[-1].output[0] = "y"
    shape = [1, tokens, hidden]
    made = helper.make_graph(
        graph.nodes,
        "bert_encoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        graph.weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


class _Graph:
    """Nodes and weights as they come."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self._rng = rng

    def weight(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def dense(self, prefix: str, value: str, rows: int, columns: int) -> str:
        scale = np.sqrt(1.0 / rows)
        matrix = (self._rng.standard_normal((rows, columns)) * scale).astype("float32")
        bias = (self._rng.standard_normal(columns) * 0.02).astype("float32")
        product = self.add("MatMul", [value, self.weight(f"{prefix}w", matrix)], f"{prefix}product")
        return self.add("Add", [product, self.weight(f"{prefix}b", bias)], f"{prefix}sum")

    def norm(self, prefix: str, value: str, extent: int) -> str:
        gain = self.weight(f"{prefix}gain", np.ones(extent, "float32"))
        shift = self.weight(f"{prefix}shift", np.zeros(extent, "float32"))
        return self.add("LayerNormalization", [value, gain, shift], f"{prefix}normed", axis=-1)


def _encoder_layer(
    graph: _Graph, prefix: str, value: str, hidden: int, heads: int, tokens: int
) -> str:
    head = hidden // heads
    shape = graph.weight(f"{prefix}split", np.array([1, tokens, heads, head], "int64"))
    parts = {}
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        flat = graph.dense(f"{prefix}{name}.", value, hidden, hidden)
        split = graph.add("Reshape", [flat, shape], f"{prefix}{name}.split")
        parts[name] = graph.add("Transpose", [split], f"{prefix}{name}.heads", perm=order)
    scores = graph.add("MatMul", [parts["q"], parts["k"]], f"{prefix}scores")
    root = graph.weight(f"{prefix}root", np.array(np.sqrt(head), "float32"))
    scaled = graph.add("Div", [scores, root], f"{prefix}scaled")
    weights = graph.add("Softmax", [scaled], f"{prefix}attention", axis=-1)
    mixed = graph.add("MatMul", [weights, parts["v"]], f"{prefix}mixed")
    back = graph.add("Transpose", [mixed], f"{prefix}back", perm=[0, 2, 1, 3])
    whole = graph.weight(f"{prefix}joined", np.array([1, tokens, hidden], "int64"))
    joined = graph.add("Reshape", [back, whole], f"{prefix}heads")
    out = graph.dense(f"{prefix}o.", joined, hidden, hidden)
    first = graph.norm(f"{prefix}n1.", graph.add("Add", [value, out], f"{prefix}r1"), hidden)
    wide = graph.dense(f"{prefix}up.", first, hidden, 4 * hidden)
    narrow = graph.dense(f"{prefix}down.", _gelu(graph, prefix, wide), 4 * hidden, hidden)
    return graph.norm(f"{prefix}n2.", graph.add("Add", [first, narrow], f"{prefix}r2"), hidden)


def _gelu(graph: _Graph, prefix: str, value: str) -> str:
    constants = {
        name: graph.weight(f"{prefix}{name}", np.array(number, "float32"))
        for name, number in (("sqrt2", np.sqrt(2)), ("one", 1), ("half", 0.5))
    }
    ratio = graph.add("Div", [value, constants["sqrt2"]], f"{prefix}ratio")
    erf = graph.add("Erf", [ratio], f"{prefix}erf")
    more = graph.add("Add", [erf, constants["one"]], f"{prefix}more")
    product = graph.add("Mul", [value, more], f"{prefix}twice")
    return graph.add("Mul", [product, constants["half"]], f"{prefix}gelu")


def _tiny_convolutions() -> onnx.ModelProto:
    """Two convolutions, a pooling and a classifier."""
    graph = _Graph(np.random.default_rng(0))
    rng = np.random.default_rng(1)

    def weight(name: str, *shape: int) -> str:
        return graph.weight(name, (rng.standard_normal(shape) * 0.2).astype("float32"))

    value = graph.add("Conv", ["x", weight("w1", 8, 3, 3, 3)], "a", pads=[1, 1, 1, 1])
    value = graph.add("Relu", [value], "b")
    value = graph.add("Conv", [value, weight("w2", 8, 8, 3, 3)], "c", pads=[1, 1, 1, 1])
    value = graph.add("GlobalAveragePool", [value], "d")
    value = graph.add("Flatten", [value], "e")
    graph.add("Gemm", [value, weight("w3", 4, 8)], "y", transB=1)
    made = helper.make_graph(
        graph.nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        graph.weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
