"""An ONNX graph as a torch module with the same weights, for the operators of the benchmark models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Attributes = dict[str, Any]


def torch_module(path: Path) -> Any:
    """A `torch.nn.Module` that computes what the file says; inputs in the graph's order."""
    import torch

    graph = onnx.load(path).graph
    constants = {t.name: numpy_helper.to_array(t).copy() for t in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    outputs = [value.name for value in graph.output]
    steps = [
        (
            node.op_type,
            list(node.input),
            list(node.output),
            {a.name: helper.get_attribute_value(a) for a in node.attribute},
        )
        for node in graph.node
    ]
    unknown = sorted({kind for kind, *_ in steps} - set(OPERATORS))
    if unknown:
        raise ValueError(f"operators that this benchmark does not translate: {', '.join(unknown)}")

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shapes = {k: v.tolist() for k, v in constants.items() if v.dtype == np.int64}
            self.places = {}
            for number, (name, array) in enumerate(constants.items()):
                if name not in self.shapes:
                    self.places[name] = f"w{number}"
                    self.register_buffer(f"w{number}", torch.from_numpy(array))

        def forward(self, *given: Any) -> Any:
            values: dict[str, Any] = dict(zip(inputs, given, strict=True))
            for name, place in self.places.items():
                values[name] = getattr(self, place)
            values.update(self.shapes)
            for kind, sources, targets, attributes in steps:
                arguments = [values[source] if source else None for source in sources]
                values[targets[0]] = OPERATORS[kind](arguments, attributes)
            return tuple(values[name] for name in outputs)

    return Graph().eval()


def _functional() -> Any:
    import torch.nn.functional

    return torch.nn.functional


def _padded(x: Any, attributes: Attributes, value: float = 0.0) -> tuple[Any, list[int]]:
    """The symmetric padding that torch's operators take; others are applied beforehand."""
    pads = list(attributes.get("pads", [0, 0, 0, 0]))
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID", ""):
        raise ValueError("auto_pad is not translated")
    if pads[:2] == pads[2:]:
        return x, pads[:2]
    return _functional().pad(x, (pads[1], pads[3], pads[0], pads[2]), value=value), [0, 0]


def _conv(given: list[Any], attributes: Attributes) -> Any:
    x, padding = _padded(given[0], attributes)
    bias = given[2] if len(given) > 2 else None
    return _functional().conv2d(
        x, given[1], bias, list(attributes.get("strides", [1, 1])), padding,
        list(attributes.get("dilations", [1, 1])), attributes.get("group", 1),
    )  # fmt: skip


def _max_pool(given: list[Any], attributes: Attributes) -> Any:
    x, padding = _padded(given[0], attributes, float("-inf"))
    strides = list(attributes.get("strides", [1, 1]))
    return _functional().max_pool2d(x, list(attributes["kernel_shape"]), strides, padding)


def _average_pool(given: list[Any], attributes: Attributes) -> Any:
    x, padding = _padded(given[0], attributes)
    strides = list(attributes.get("strides", [1, 1]))
    counted = bool(attributes.get("count_include_pad", 0))
    return _functional().avg_pool2d(
        x, list(attributes["kernel_shape"]), strides, padding, count_include_pad=counted
    )


def _batch_norm(given: list[Any], attributes: Attributes) -> Any:
    x, gain, shift, mean, variance = given
    epsilon = attributes.get("epsilon", 1e-5)
    return _functional().batch_norm(x, mean, variance, gain, shift, False, 0.0, epsilon)


def _gemm(given: list[Any], attributes: Attributes) -> Any:
    a = given[0].t() if attributes.get("transA") else given[0]
    b = given[1].t() if attributes.get("transB") else given[1]
    product = attributes.get("alpha", 1.0) * (a @ b)
    return product + attributes.get("beta", 1.0) * given[2] if len(given) > 2 else product


def _reshape(given: list[Any], attributes: Attributes) -> Any:
    shape = [given[0].shape[n] if extent == 0 else extent for n, extent in enumerate(given[1])]
    return given[0].reshape(shape)


def _layer_norm(given: list[Any], attributes: Attributes) -> Any:
    gain = given[1]
    return _functional().layer_norm(
        given[0], gain.shape, gain, given[2], attributes.get("epsilon", 1e-5)
    )


OPERATORS: dict[str, Callable[[list[Any], Attributes], Any]] = {
    "Add": lambda given, _: given[0] + given[1],
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Div": lambda given, _: given[0] / given[1],
    "Erf": lambda given, _: given[0].erf(),
    "Flatten": lambda given, _: given[0].flatten(1),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda given, _: given[0].mean((2, 3), keepdim=True),
    "LayerNormalization": _layer_norm,
    "MatMul": lambda given, _: given[0] @ given[1],
    "MaxPool": _max_pool,
    "Mul": lambda given, _: given[0] * given[1],
    "Relu": lambda given, _: given[0].relu(),
    "Reshape": _reshape,
    "Softmax": lambda given, attributes: given[0].softmax(attributes.get("axis", -1)),
    "Sum": lambda given, _: sum(given[1:], given[0]),
    "Transpose": lambda given, attributes: given[0].permute(list(attributes["perm"])),
    "Unsqueeze": lambda given, attributes: given[0][(None,) * len(attributes["axes"])],
}
