"""Convolutions in groups whose channels are no whole blocks: a vector may hold a part of a block."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_layouts import MACHINE, Node, blocked, compared, load
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


@pytest.mark.parametrize(("channels", "granule"), [(24, 8), (8, 8), (32, 0), (20, 4)])
def test_the_channels_of_a_group_that_a_vector_may_hold(
    channels: int, granule: int, tmp_path: Path
) -> None:
    wide = 4 * channels
    filters = {
        "first": (wide, 16, 1, 1),
        "grouped": (wide, channels, 3, 3),
        "last": (16, wide, 1, 1),
    }
    model = load(tmp_path / "m.onnx", NETWORK, filters, shape=(1, 16, 6, 6))
    (name,) = (name for name in blocked(model) if "relu" in name)
    schedule = Schedule(model.module[name].with_attr("global_symbol", "main"))
    (block,) = (each for each in block_names(schedule) if is_reduction(block_of(schedule, each)))
    image, _ = Reduction(schedule, block, MACHINE).operands
    lanes = 4
    if granule:
        assert image.strides[lanes] is None and image.granules[lanes] == granule
    else:
        assert image.strides[lanes] == 0, "a whole block reads one group"
    mine = load(tmp_path / "n.onnx", NETWORK, filters, shape=(1, 16, 6, 6), cpu=target())
    assert compared(mine, default_traces(mine), tmp_path).ok
