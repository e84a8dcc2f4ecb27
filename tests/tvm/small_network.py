"""A small network of two convolutions and a classifier, for the tests that tune."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_network(
    path: Path,
    classes: int = 10,
    channels: int = 16,
    residual: bool = False,
    seed: int = 0,
    batch: int | str = 1,
    size: int | str = 12,
    kernel: int = 1,
) -> Path:
    """Input x, two convolutions, with `residual` their sum, pooling and a classifier, output y.

    Convolutions of one pixel compile in half of the time of larger ones.
    """
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return numpy_helper.from_array((rng.standard_normal(shape) * scale).astype("float32"), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[kernel // 2] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], pads=[kernel // 2] * 4),
        *([helper.make_node("Add", ["b", "c"], ["d"])] if residual else []),
        helper.make_node("GlobalAveragePool", ["d" if residual else "c"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, classes])],
        [
            weight("w1", channels, 8, kernel, kernel),
            weight("w2", channels, channels, kernel, kernel),
            weight("w3", classes, channels),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path
