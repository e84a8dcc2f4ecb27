"""RoiAlign as ONNX defines it.

TVM's importer moves a region by half a pixel before it scales it, not after, and takes the largest
interpolated value where ONNX takes the largest of what the four neighbours contribute.

Source: He et al., arXiv 1703.06870, section 3; the ONNX operator RoiAlign, set 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import te, tirx

HALF_PIXEL = b"half_pixel"


def roi_align(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """The converter; see `operators`. Its coordinates are by half pixels where nothing else is said."""
    data, rois, images = inputs
    if images.ty.shape is None or data.ty.shape is None:
        return None

    def computed(x: te.Tensor, regions: te.Tensor, of_image: te.Tensor) -> te.Tensor:
        return _aligned(x, regions, of_image, attributes)

    return builder.emit_te(computed, data, rois, images, primfunc_name_hint="roi_align")


def _aligned(
    data: te.Tensor, rois: te.Tensor, images: te.Tensor, attributes: Mapping[str, Any]
) -> te.Tensor:
    """Regions (R, 4), each of the image (R,) of `data` (N, C, H, W), as (R, C, height, width)."""
    dtype = rois.dtype
    half_pixel = attributes.get("coordinate_transformation_mode", HALF_PIXEL) == HALF_PIXEL
    scale = tirx.const(attributes.get("spatial_scale", 1.0), dtype)
    samples = int(attributes.get("sampling_ratio", 0))
    largest = attributes.get("mode", b"avg") == b"max"
    sizes = int(attributes.get("output_height", 1)), int(attributes.get("output_width", 1))
    extents = data.shape[2:]

    def places(region: Any, axis: int, cell: Any) -> tuple[Any, Any]:
        """How many samples a cell has along an axis (0: of rows), and where sample i is."""
        offset = tirx.const(0.5 if half_pixel else 0.0, dtype)
        start, end = (rois[region, place] * scale - offset for place in (1 - axis, 3 - axis))
        length = end - start
        if not half_pixel:  # a region has a pixel at least
            length = te.max(length, tirx.const(1.0, dtype))
        step = length / tirx.const(sizes[axis], dtype)
        # A region may end before it begins.
        by_length = te.max(te.ceil(step).astype("int32"), 0)
        count = tirx.const(samples, "int32") if samples > 0 else by_length

        def place(sample: Any) -> Any:
            parts = te.max(count, 1).astype(dtype)
            within = (sample.astype(dtype) + tirx.const(0.5, dtype)) * step / parts
            return start + cell.astype(dtype) * step + within

        return count, place

    def neighbours(at: Any, extent: Any) -> list[tuple[Any, Any]]:
        """The two pixels beside a place of an axis and what each weighs."""
        inside = te.min(te.max(at, tirx.const(0.0, dtype)), (extent - 1).astype(dtype))
        low = inside.astype("int32")
        high = te.min(low + 1, extent - 1)
        part = inside - low.astype(dtype)
        return [(low, tirx.const(1.0, dtype) - part), (high, part)]

    def element(r: Any, c: Any, y: Any, x: Any) -> Any:
        (rows, row), (columns, column) = places(r, 0, y), places(r, 1, x)
        # Once at least: a sum over nothing would not even be set to zero.
        ry, rx = (
            te.reduce_axis((0, te.max(count, 1)), name)
            for count, name in ((rows, "ry"), (columns, "rx"))
        )
        image = te.min(te.max(images[r].astype("int32"), 0), data.shape[0] - 1)
        at = row(ry.var), column(rx.var)
        parts = [
            (data[image, c, v, u] * (p * q).astype(data.dtype))
            for v, p in neighbours(at[0], extents[0])
            for u, q in neighbours(at[1], extents[1])
        ]
        outside = tirx.any(
            *(place < tirx.const(-1.0, dtype) for place in at),
            *(place > e.astype(dtype) for place, e in zip(at, extents, strict=True)),
        )
        none = tirx.const(0.0, data.dtype)
        if largest:
            value = te.max(te.max(parts[0], parts[1]), te.max(parts[2], parts[3]))
            return te.max(tirx.Select(outside, none, value), axis=[ry, rx])
        value = parts[0] + parts[1] + parts[2] + parts[3]
        return te.sum(tirx.Select(outside, none, value), axis=[ry, rx])

    shape = (rois.shape[0], data.shape[1], *sizes)
    found = te.compute(shape, element, name="roi_align")

    def finished(r: Any, c: Any, y: Any, x: Any) -> Any:
        count = places(r, 0, y)[0] * places(r, 1, x)[0]
        value = found[r, c, y, x]
        if not largest:
            value = value / te.max(count, 1).astype(data.dtype)
        return tirx.Select(count > 0, value, tirx.const(0.0, data.dtype))

    return te.compute(shape, finished, name="roi_aligned")
