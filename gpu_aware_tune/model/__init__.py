"""ONNX graph -> `Model` (a fused Relax module) -> its tasks."""
