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
from gpu_aware_tune.model.operators import dtype_of, pads_are_given, steps_of


def merge_groups(
    builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], lanes: int
) -> Any:
    """Convert a Conv with half as many groups, twice as large; None where that does not pay."""
    groups = int(attributes.get("group", 1))
    if groups % 2 or dtype_of(inputs[1]) != "float32" or not pads_are_given(attributes):
        return None
    outputs, own, *taps = (int(extent) for extent in inputs[1].ty.shape)
    each = outputs // groups
    # Of groups smaller than a vector, half a vector does as well.
    if 2 * math.gcd(own, each, lanes) != lanes or min(own, each) < lanes or len(taps) != 2:
        return None
    weights = constant_of(builder, inputs[1])
    if weights is None:
        return None
    parts = weights.reshape(groups // 2, 2, each, own, *taps)
    merged = np.zeros((groups // 2, 2, each, 2, own, *taps), np.float32)
    for number in range(2):
        merged[:, number, :, number] = parts[:, number]
    result = relax.op.nn.conv2d(
        inputs[0],
        relax.const(merged.reshape(outputs, 2 * own, *taps)),
        **steps_of(attributes, 2),
        groups=groups // 2,
    )
    if len(inputs) < 3 or inputs[2] is None:
        return result
    bias = relax.op.reshape(inputs[2], [1, -1, 1, 1])
    return relax.op.add(builder.normalize(result), bias)
