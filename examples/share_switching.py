"""Serve requests while the share changes: one library for two shares, switched by `library.use`.

python examples/share_switching.py model.onnx --gpu-pct 50,100
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from pathlib import Path

import numpy as np

from gpu_aware_tune import Library, load, make_settings, tune_events
from gpu_aware_tune.events import Finished


def main() -> None:
    """Tune for several shares, then switch between them under load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--gpu-pct", default="50,100", help="shares in percent")
    parser.add_argument("--quick", action="store_true", help="only a few trials")
    args = parser.parse_args()

    effort = {"effort": "quick", "trials": 4} if args.quick else {}
    settings = make_settings(gpu_pct=args.gpu_pct, **effort)
    events = list(tune_events(args.model, settings))
    finished = next(event for event in events if isinstance(event, Finished))
    assert finished.output is not None

    library = load(finished.output, preload=True)  # opened now, so that no switch has to wait
    serve(library, [share.units for share in finished.shares], 0.2 if args.quick else 2.0)
    library.close()


def serve(library: Library, units: list[int], seconds: float) -> None:
    """Send requests from a second thread, and give the library each share in turn."""
    inputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in library.inputs}
    latencies_ms: list[float] = []
    errors: list[Exception] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            start = time.perf_counter()
            try:
                library(inputs)
            except Exception as error:
                errors.append(error)
            latencies_ms.append(1e3 * (time.perf_counter() - start))

    thread = threading.Thread(target=client)
    thread.start()
    try:
        for count in units:
            start = time.perf_counter()
            library.use(count)  # requests under way finish on the share they began with
            switch_us = 1e6 * (time.perf_counter() - start)
            before = len(latencies_ms)
            time.sleep(seconds)
            served = latencies_ms[before:]
            median_ms = statistics.median(served) if served else float("nan")
            print(
                f"{count} units: switched in {switch_us:.0f} us,"
                f" {len(served)} requests, median {median_ms:.3f} ms"
            )
    finally:
        stop.set()
        thread.join()
    print(f"{len(latencies_ms)} requests, {len(errors)} failed")


if __name__ == "__main__":
    main()
