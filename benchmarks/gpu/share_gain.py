"""What tuning for a share gains on that share, and what four shares in one search cost.

    python -m benchmarks.gpu.share_gain                       # about two minutes a model
    python -m benchmarks.gpu.share_gain --models bert --time 120
    python -m benchmarks.gpu.share_gain --null                # without a GPU: tries the code

One search tunes a model for 10, 30, 50 and 100 % of the GPU. Each of the four libraries is then run
on each of the four shares. The diagonal against the 100 % row is the gain: how much faster the
library made for a share is there than the one made for the whole GPU. A second search for 100 %
alone with the same time tells what the other three shares cost in trials.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import ROOT
from benchmarks.scaffold import asked, die_with_parent, gpu_benchmark, gpu_parser, take_turns, tell

if TYPE_CHECKING:
    import numpy as np

    from gpu_aware_tune.partition import Partition

KEPT = ROOT / "build" / "gpu-bench"  # vs_torch.py takes its libraries from here
_TIMEOUT_S = 60
_ROUNDS = 5


def main() -> None:
    """Tune, run every library on every share, print the tables."""
    command = gpu_parser(__doc__)
    command.add_argument("--shares", default="10,30,50,100")
    command.add_argument("--time", type=float, default=40.0, help="seconds of each search")
    command.add_argument("--seconds", type=float, default=1.0, help="of each timing")
    command.add_argument("--child", metavar="JSON", help=argparse.SUPPRESS)
    args = command.parse_args()
    if args.child:
        die_with_parent()
        tell(latencies(**json.loads(args.child)))
        return
    percents = tuple(int(part) for part in args.shares.split(","))
    rows: dict[str, dict[str, Any]] = {}
    settings = {"shares": percents, "time_s": args.time}
    with gpu_benchmark("gpu-share-gain", args) as run:
        for name, path in run.models():
            rows[name] = {}
            for row in one_model(name, path, percents, args, run.scratch):
                rows[name] |= row
                run.write(settings=settings, models=rows)
            print(table(name, rows[name]), flush=True)


def one_model(
    name: str, path: Path, percents: tuple[int, ...], args: argparse.Namespace, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Tune one model twice and fill its table, piece by piece."""
    kept = (scratch if args.null else KEPT) / f"{name}.tuned"
    kept.parent.mkdir(parents=True, exist_ok=True)
    four = tuned(path, percents, kept, args, scratch / f"{name}-four")
    units = four["units"]
    yield {"units": units, "four": four}
    lines: dict[str, dict[str, float]] = {}
    for place in units:
        cell = {"folder": str(kept), "units": place, "seconds": args.seconds}
        lines[str(place)] = measured(cell)
        yield {"on": dict(lines)}
    yield gains(lines, units)
    yield {"one": tuned(path, (100,), scratch / f"{name}-one.tuned", args, scratch / f"{name}-one")}


def tuned(
    path: Path, percents: tuple[int, ...], output: Path, args: argparse.Namespace, db: Path
) -> dict[str, Any]:
    """One run of the tuner; its trials, its time and the units of its shares."""
    from gpu_aware_tune.events import Finished, Planned, Progress
    from gpu_aware_tune.settings import Settings
    from gpu_aware_tune.tuning import tune_events

    begun = time.monotonic()
    settings = Settings(
        gpu_pct=percents, target="llvm" if args.null else "cuda", time_s=args.time, db=db,
        trials=4 if args.null else None, output=output, resume=False,
    )  # fmt: skip
    if args.null:
        settings = dataclasses.replace(settings, trials_per_iteration=4)
    found: dict[str, Any] = {}
    for event in tune_events(path, settings):
        if isinstance(event, Planned):
            found["units"], found["backend"] = list(event.units), event.backend
        elif isinstance(event, Progress):
            found["trials_per_min"] = event.trials_per_min
        elif isinstance(event, Finished):
            found["trials"] = event.trials
            found["failures"] = dict(event.failures)
            found["tuned_s"] = {str(share.units): share.tuned_s for share in event.shares}
            found["untuned_s"] = {str(share.units): share.untuned_s for share in event.shares}
    return {**found, "seconds": time.monotonic() - begun}


def measured(cell: dict[str, Any]) -> dict[str, float]:
    """Seconds of every library of a folder on one share, in a process of its own."""
    found, why = asked(["-m", "benchmarks.gpu.share_gain", "--child", json.dumps(cell)], _TIMEOUT_S)
    if found is None:
        raise SystemExit(f"{cell} failed: {why}")
    return found


def latencies(folder: str, units: int, seconds: float) -> dict[str, float]:
    """Median seconds of each library inside the partition of `units` (in the child)."""
    from gpu_aware_tune.library import open_vm
    from gpu_aware_tune.library.program import Weights

    root = Path(folder)
    manifest, inputs = described(root)
    weights = Weights(root / "weights.bin")
    with inside(manifest, units):
        timers = {
            str(each["units"]): open_vm(
                root / each["file"], weights, entry=each.get("entry", "main")
            ).timer(inputs)
            for each in manifest["libraries"]
        }
        samples = take_turns(timers, _ROUNDS, seconds / _ROUNDS)
    return {made_for: statistics.median(values) for made_for, values in samples.items()}


def described(library: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest of a library's folder, and random inputs for it."""
    from gpu_aware_tune.model.importer import TensorSpec, random_inputs

    manifest = json.loads((library / "manifest.json").read_text())
    specs = [TensorSpec(e["name"], tuple(e["shape"]), e["dtype"]) for e in manifest["inputs"]]
    return manifest, random_inputs(specs, seed=0)


@contextlib.contextmanager
def inside(manifest: dict[str, Any], units: int) -> Iterator[Partition | None]:
    """The partition that a library was made for; None where its backend needs none to be opened."""
    from gpu_aware_tune.partition import partition_for

    with contextlib.ExitStack() as stack:
        partition = partition_for(manifest, units)
        if partition is not None:
            stack.callback(partition.close)
            stack.enter_context(partition.timing_context())
        yield partition


def gains(lines: dict[str, dict[str, float]], units: list[int]) -> dict[str, Any]:
    """The library of the whole GPU over the one made for the share, on each share."""
    whole = str(max(units))
    gain = {place: found[whole] / found[place] for place, found in lines.items()}
    return {"gain": gain, "median_gain": statistics.median(gain.values())}


def table(name: str, row: dict[str, Any]) -> str:
    """One model's figures as text."""
    units = row["units"]
    head = f"{name}: ms of the library tuned for (down) on (across) so many units"
    lines = [head, " " * 8 + "".join(f"{place:>10}" for place in units)]
    for made_for in units:
        cells = (1e3 * row["on"][str(place)][str(made_for)] for place in units)
        lines.append(f"{made_for:>8}" + "".join(f"{cell:10.3f}" for cell in cells))
    lines.append("    gain" + "".join(f"{row['gain'][str(place)]:9.2f}x" for place in units))
    rates = {which: row[which]["trials_per_min"] for which in ("four", "one")}
    lines.append(
        f"        {len(units)} shares in one search {rates['four']:.0f} trials a minute, one share"
        f" {rates['one']:.0f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
