"""Tune a model for a share of the device, then run the library.

python examples/tune_and_run.py model.onnx --gpu-pct 50
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from gpu_aware_tune import tune


def main() -> None:
    """Tune, run once on random inputs, and time the library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--gpu-pct", type=int, default=100, help="share of the device in percent")
    parser.add_argument("--quick", action="store_true", help="only a few trials")
    args = parser.parse_args()

    effort = {"effort": "quick", "trials": 4} if args.quick else {}
    library = tune(args.model, gpu_pct=args.gpu_pct, **effort)
    print(f"{library.path}: tuned for {library.units} units")

    generator = np.random.default_rng(0)
    inputs = {
        spec.name: generator.standard_normal(spec.shape).astype(spec.dtype)
        for spec in library.inputs
    }
    for name, array in library(inputs).items():
        print(f"output {name}: shape {array.shape}, mean {array.mean():.4g}")

    latency = library.benchmark(seconds=0.2 if args.quick else 2.0)
    print(f"latency: median {latency.median_ms:.3f} ms over {latency.n} runs")
    library.close()


if __name__ == "__main__":
    main()
