"""ONNX file -> a static, folded graph of operators that TVM imports correctly; knows no TVM.

In the order of the work: `read` (with `limits`, `tensors` and `order`), `shapes`, `upgrade`, `fold` (with
`branches`), `expand` (with `rules`, which lists the rules of the modules that it imports), `refuse`,
`convert`, `batch_norm`; `stages` runs them. `facts` and `rewriter` are what they all use. `validity` says
whose fault it is where all of that fails.
"""

from __future__ import annotations

from gpu_aware_tune.onnx_prepare.read import read_model
from gpu_aware_tune.onnx_prepare.stages import prepare, prepare_detached

__all__ = ["prepare", "prepare_detached", "read_model"]
