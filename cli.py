"""Runs the command line from a checkout: `python cli.py model.onnx --gpu-pct 30`."""

from __future__ import annotations

from gpu_aware_tune.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
