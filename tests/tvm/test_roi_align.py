"""RoiAlign in all of its modes, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_check import assert_correct

REGIONS = np.array(
    [
        [0, 0, 30, 22],
        [3.7, 1.2, 25.1, 19.9],
        [-9, -7, 60, 51],  # beyond the image
        [12, 9, 12.3, 9.2],  # less than a pixel
        [20, 15, 8, 4],  # the wrong way round
    ],
    np.float32,
)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(
    ("opset", "coordinates"),
    [(13, None), (16, None), (16, "half_pixel"), (16, "output_half_pixel")],
)
def test_regions_are_pooled_as_onnx_runtime_does(
    opset: int, mode: str, coordinates: str | None, scale: float, samples: int
) -> None:
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.standard_normal((2, 3, 11, 16)).astype(np.float32),
        "rois": REGIONS,
        "images": np.array([0, 1, 0, 1, 1]),
    }
    told = {} if coordinates is None else {"coordinate_transformation_mode": coordinates}
    node = helper.make_node(
        "RoiAlign", list(feeds), ["y"], mode=mode, spatial_scale=scale, sampling_ratio=samples,
        output_height=4, output_width=3, **told,
    )  # fmt: skip
    kinds = {"x": TensorProto.FLOAT, "rois": TensorProto.FLOAT, "images": TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in feeds.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "regions", inputs, [output])
    opsets = [helper.make_opsetid("", opset)]
    assert_correct(helper.make_model(graph, opset_imports=opsets, ir_version=8), feeds)
