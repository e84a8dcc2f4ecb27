"""Convolutions in groups whose channels are no whole blocks: two groups as one, or parts of a vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_check import assert_correct
from onnx_graphs import F32, node_model
from test_layouts import MACHINE, Node, blocked, compared, load, shapes
from tiny_library import default_traces, target
from tvm.s_tir import Schedule

from gpu_aware_tune.kernels.schedules.blocks import block_names, block_of, is_reduction
from gpu_aware_tune.kernels.schedules.reductions import Reduction

NETWORK: list[Node] = [
    ("Conv", ["x", "first"], "a", {}),
    ("Conv", ["a", "grouped"], "b", {"group": 4, "pads": [1, 1, 1, 1]}),
    ("Relu", ["b"], "c", {}),
    ("Conv", ["c", "last"], "d", {}),
]


def filters(channels: int) -> dict[str, tuple[int, ...]]:
    wide = 4 * channels
    return {
        "first": (wide, 16, 1, 1),
        "grouped": (wide, channels, 3, 3),
        "last": (16, wide, 1, 1),
    }


@pytest.mark.parametrize(("channels", "granule"), [(20, 4), (8, 8), (32, 0)])
def test_the_channels_of_a_group_that_a_vector_may_hold(
    channels: int, granule: int, tmp_path: Path
) -> None:
    model = load(tmp_path / "m.onnx", NETWORK, filters(channels), shape=(1, 16, 6, 6))
    (name,) = (name for name in blocked(model) if "relu" in name)
    schedule = Schedule(model.module[name].with_attr("global_symbol", "main"))
    (block,) = (each for each in block_names(schedule) if is_reduction(block_of(schedule, each)))
    image, _ = Reduction(schedule, block, MACHINE).operands
    lanes = 4
    if granule:
        assert image.strides[lanes] is None and image.granules[lanes] == granule
    else:
        assert image.strides[lanes] == 0, "a whole block reads one group"
    mine = load(tmp_path / "n.onnx", NETWORK, filters(channels), shape=(1, 16, 6, 6), cpu=target())
    assert compared(mine, default_traces(mine), tmp_path).ok


@pytest.mark.parametrize(("channels", "merged"), [(24, 48), (40, 80), (8, 8), (20, 20), (16, 16)])
def test_two_groups_become_one_where_they_then_are_whole_blocks(
    channels: int, merged: int, tmp_path: Path
) -> None:
    model = load(tmp_path / "m.onnx", NETWORK, filters(channels), shape=(1, 16, 6, 6))
    (name,) = (name for name in blocked(model) if "relu" in name)
    _, stored, *_ = shapes(model, name)
    assert np.prod(stored) == 4 * channels * merged * 9
    mine = load(tmp_path / "n.onnx", NETWORK, filters(channels), shape=(1, 16, 6, 6), cpu=target())
    assert compared(mine, default_traces(mine), tmp_path).ok


@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(4, 24, 40), (2, 6, 6), (6, 6, 10)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_merged_groups_as_onnxruntime(
    groups: int, inputs: int, outputs: int, has_bias: bool
) -> None:
    generator = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    x = drawn(2, groups * inputs, 7, 6)
    constants = {"w": drawn(groups * outputs, inputs, 3, 3)}
    if has_bias:
        constants["b"] = drawn(groups * outputs)
    options: dict[str, Any] = {
        "group": groups,
        "pads": [1, 0, 2, 1],
        "strides": [2, 1],
        "dilations": [1, 2],
    }
    made = node_model("Conv", {"x": x}, constants, [("y", F32)], **options)
    assert_correct(made, {"x": x})
