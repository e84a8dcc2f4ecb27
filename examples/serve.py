"""Serve a tuned model in this process: an engine with a latency objective, asked from asyncio.

python examples/serve.py model.onnx --slo-ms 100
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import numpy as np

from gpu_aware_tune import Deployment, Engine, TuneError, make_settings, tune_events
from gpu_aware_tune.events import Finished


def main() -> None:
    """Tune for half and for the whole of this machine's cores, then serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--slo-ms", type=float, default=100.0, help="latency objective")
    parser.add_argument("--quick", action="store_true", help="only a few trials")
    args = parser.parse_args()

    effort = {"effort": "quick", "trials": 4} if args.quick else {}
    settings = make_settings(gpu_pct="50,100", **effort)
    events = list(tune_events(args.model, settings))
    finished = next(event for event in events if isinstance(event, Finished))
    assert finished.output is not None

    with Engine([Deployment((finished.output,), slo_s=args.slo_ms / 1e3)]) as engine:
        asyncio.run(ask(engine, 50))


async def ask(engine: Engine, count: int) -> None:
    """Send requests one after the other, and some at once; what would be late is refused."""
    (model,) = engine.models
    inputs = {spec.name: np.zeros(np.abs(spec.shape), spec.dtype) for spec in model.inputs}
    latencies_ms = []
    for _ in range(count):
        start = time.perf_counter()
        await engine.infer(model.name, inputs)
        latencies_ms.append(1e3 * (time.perf_counter() - start))
    print(f"one at a time: median {np.median(latencies_ms):.3f} ms")

    tasks = [engine.infer(model.name, inputs) for _ in range(count)]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    refused = sum(isinstance(answer, TuneError) for answer in answers)
    print(f"{count} at once: {count - refused} answered, {refused} refused")
    counts = engine.statistics(model.name)
    print(f"{counts.success.count} answered, {counts.fail.count} failed")


if __name__ == "__main__":
    main()
