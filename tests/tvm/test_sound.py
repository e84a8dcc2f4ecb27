"""Convolutions along one axis, as models of sound have them: in blocks of channels too."""

from __future__ import annotations

from pathlib import Path

from test_layouts import Node, blocked, compared, load, shapes
from tiny_library import default_traces, target

from gpu_aware_tune.kernels.schedules.cpu import machine_of

# A feature extractor of a speech model: convolutions with strides, a residual one, a grouped
# one, and a product behind.
NETWORK: list[Node] = [
    ("Conv", ["x", "first"], "a", {"strides": [5]}),
    ("Sigmoid", ["a"], "b", {}),
    ("Conv", ["b", "second"], "c", {"strides": [2]}),
    ("Tanh", ["c"], "d", {}),
    ("Conv", ["d", "third"], "e", {"pads": [2, 2], "dilations": [2]}),
    ("Add", ["d", "e"], "f", {}),
    ("Conv", ["f", "grouped"], "g", {"group": 2, "pads": [1, 1]}),
    ("Conv", ["g", "last"], "h", {}),
    ("Transpose", ["h"], "i", {"perm": [0, 2, 1]}),
    ("MatMul", ["i", "product"], "j", {}),
]
FILTERS = {
    "first": (32, 1, 10),
    "second": (64, 32, 3),
    "third": (64, 64, 3),
    "grouped": (32, 32, 3),
    "last": (32, 32, 1),
    "product": (32, 24),
}


def test_images_of_one_axis_go_in_blocks(tmp_path: Path) -> None:
    model = load(tmp_path / "m.onnx", NETWORK, FILTERS, shape=(2, 1, 500), cpu=target())
    lanes = machine_of(target()).lanes
    names = blocked(model)
    assert len(names) >= 3 and all(name.endswith(f"_nchw{lanes}c") for name in names)
    assert any((2, 64 // lanes, 49, lanes) in shapes(model, name) for name in names)
    assert compared(model, {}, tmp_path).ok
    assert compared(model, default_traces(model), tmp_path).ok


def test_the_weights_of_several_products_are_no_filter(tmp_path: Path) -> None:
    nodes: list[Node] = [
        ("MatMul", ["x", "first"], "a", {}),
        ("Relu", ["a"], "b", {}),
        ("MatMul", ["b", "second"], "c", {}),
    ]
    filters = {"first": (32, 48, 64), "second": (32, 64, 16)}
    model = load(tmp_path / "m.onnx", nodes, filters, shape=(32, 16, 48), cpu=target())
    assert blocked(model) == []
    assert compared(model, {}, tmp_path).ok
