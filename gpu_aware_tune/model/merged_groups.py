"""An importer converter for convolutions in groups whose channels are no whole blocks of lanes.

The channels of a group of 24 begin in the middle of a block of 16. Two groups together have three blocks, and
as one group, with zeros between what does not belong together, they are computed in whole vectors: twice
the multiply-adds, at several times the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tvm import relax

from gpu_aware_tune.model.integer_operands import constant_of
from gpu_aware_tune.model.operators import dtype_of

_MOST = 2  # times the multiply-adds


def merge_groups(
    builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], lanes: int
) -> Any:
    """Convert a Conv with fewer and larger groups; None where that does not pay."""
    groups = int(attributes.get("group", 1))
    explicit = attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"")
    if groups == 1 or dtype_of(inputs[1]) != "float32" or not explicit:
        return None
    outputs, own, *taps = (int(extent) for extent in inputs[1].ty.shape)
    each = outputs // groups
    merged = lanes // math.gcd(own, each, lanes)
    if merged == 1 or merged > _MOST or groups % merged or len(taps) != 2:
        return None
    if min(own, each) < lanes:  # half a vector does as well
        return None
    weights = constant_of(builder, inputs[1])
    if weights is None:
        return None
    apart = np.zeros((groups // merged, merged, each, merged, own, *taps), np.float32)
    for number in range(merged):
        parts = weights.reshape(groups // merged, merged, each, own, *taps)
        apart[:, number, :, number] = parts[:, number]
    result = relax.op.nn.conv2d(
        inputs[0],
        relax.const(apart.reshape(outputs, merged * own, *taps)),
        strides=attributes.get("strides", [1, 1]),
        padding=attributes.get("pads", [0] * 4),
        dilation=attributes.get("dilations", [1, 1]),
        groups=groups // merged,
    )
    if len(inputs) < 3 or inputs[2] is None:
        return result
    bias = relax.op.reshape(inputs[2], [1, -1, 1, 1])
    return relax.op.add(builder.normalize(result), bias)
