"""The cost model behind the baseline schedules: measured, fitted, and judged on what it has not seen.

    python -m benchmarks.tile_model measure resnet50 bert.onnx     # tiles of their kernels, one core
    python -m benchmarks.tile_model judge                          # how well the constants rank them
    python -m benchmarks.tile_model fit --machine znver3           # constants for a machine's tiles

`measure` draws register tiles of each model's heaviest kernels, most of them among the better ones,
builds each, and times it on one core. What the model needs to price a tile is kept beside its time, in
benchmarks/data/tiles-MACHINE.json. The other two commands need that file only.

`judge` prices the tiles with the constants of `kernels/schedules/tile_cost.py` and tells for each kernel
Spearman's rank correlation and the regret: how much slower the tile ranked first is than the best one.
`fit` looks for constants with small regret and small errors, once with all kernels, and once for each
model without that model's kernels, which are then judged with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.environment import environment
from benchmarks.light_models import light_models, write_seeded
from benchmarks.scaffold import host_target

DATA = Path(__file__).parent / "data"
LEAST_STEPS = 200_000  # multiply-adds of a kernel worth a tile
TIMED_S = 0.003  # of one sample
TURNS = 6  # each of two samples
SEARCHED = (
    "full", "half", "odd", "spill", "latency", "load", "port", "broadcast", "unaligned",
    "gather", "l2_line", "far_line", "pack", "store", "reload", "per_tile", "memory", "kept",
)  # fmt: skip
SPREAD = 4.0  # the largest factor between a constant and where the search starts


def main() -> None:
    """Measure, judge or fit."""
    command = argparse.ArgumentParser(description=__doc__)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = command.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("models", nargs="+", help="ONNX files or light models")
    measuring.add_argument("--kernels", type=int, default=6, help="of each model")
    measuring.add_argument("--tiles", type=int, default=24, help="of each kernel")
    measuring.add_argument("--seed", type=int, default=0)
    commands.add_parser("judge")
    fitting = commands.add_parser("fit")
    fitting.add_argument("--machine", required=True, help="of tiles-MACHINE.json")
    fitting.add_argument("--rounds", type=int, default=60, help="of the search")
    args = command.parse_args()
    if args.command == "measure":
        measure(args.models, args.kernels, args.tiles, args.seed)
    elif args.command == "judge":
        for path in sorted(DATA.glob("tiles-*.json")):
            print(f"{path.name}:")
            rows = load(path)["kernels"]
            show(judged(rows, costs_of(rows, path.stem.removeprefix("tiles-"))))
    else:
        rows = load(DATA / f"tiles-{args.machine}.json")["kernels"]
        fit(rows, costs_of(rows, args.machine), args.rounds)


# -- measuring -------------------------------------------------------------------------------------


def measure(models: Sequence[str], kernels: int, tiles: int, seed: int) -> None:
    """Add the kernels of models to this machine's file."""

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    target = host_target(1)
    path = DATA / f"tiles-{target.attrs['mcpu']}.json"
    found = load(path)["kernels"] if path.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        for given in models:
            file = write_seeded(given, Path(scratch)) if given in light_models() else Path(given)
            found = [kernel for kernel in found if kernel["model"] != file.stem]
            for kernel in measured(file, target, kernels, tiles, random.Random(seed)):
                found.append({"model": file.stem, **kernel})
                best = min(tile["seconds"] for tile in kernel["tiles"])
                print(f"{file.stem} {kernel['name']}: {len(kernel['tiles'])} tiles, "
                      f"{2 * kernel['steps'] / best / 1e9:.1f} GFLOP/s at best", flush=True)  # fmt: skip
            path.write_text(json.dumps({"environment": environment(), "kernels": found}) + "\n")
    print(f"written to {path}")


def measured(
    file: Path, target: Any, kernels: int, tiles: int, order: random.Random
) -> Iterator[dict[str, Any]]:
    """A model's heaviest kernels with the times of some of their tiles."""
    from gpu_aware_tune.kernels.schedules.cpu import machine_of, prepared
    from gpu_aware_tune.kernels.schedules.reductions import Reduction
    from gpu_aware_tune.model.importer import load_model
    from gpu_aware_tune.model.tasks import extract

    machine, seen, count = machine_of(target), set(), 0
    tasks = extract(load_model(file, target), target)
    for task in sorted(tasks, key=lambda task: -task.flops * task.weight):
        base, names = prepared(task.module, machine)
        reduction = Reduction(base, names[0], machine) if names else None
        if reduction is None or reduction.steps < LEAST_STEPS or not (every := reduction.tiles()):
            continue
        shape = tuple((axis.extent, axis.reduce) for axis in reduction.axes)
        if shape in seen:
            continue
        seen.add(shape)
        ranked = sorted(every, key=lambda tile: tile.cycles)
        chosen = drawn(ranked, tiles, order)
        times = timed(task, base, names, reduction, chosen, machine, target)
        if len(times) >= tiles // 2:
            count += 1
            yield {**described(task, reduction, machine), "tiles": times}
        if count == kernels:
            return


def drawn(ranked: Sequence[Any], count: int, order: random.Random) -> list[Any]:
    """Tiles of all ranks, as many between 1 and 10 as between 10 and 100."""
    chosen = set(range(min(4, len(ranked))))
    while len(chosen) < min(count, len(ranked)):
        chosen.add(int(len(ranked) ** order.random()) - 1)
    return [ranked[index] for index in sorted(chosen)]


def timed(
    task: Any,
    base: Any,
    names: Sequence[str],
    reduction: Any,
    tiles: Sequence[Any],
    machine: Any,
    target: Any,
) -> list[dict[str, Any]]:
    """Tiles that TVM takes with their seconds, the least of several turns."""
    import tvm

    rng = np.random.default_rng(0)
    buffers = [tvm.runtime.tensor(values(rng, shape, dtype)) for shape, dtype in task.args]
    timers: dict[Any, Any] = {}
    numbers: dict[Any, int] = {}
    best: dict[Any, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tile in tiles:
            path = Path(folder) / f"{len(timers)}.so"
            if build(task, base, names, reduction, tile, machine, target, path):
                timers[tile] = tvm.runtime.load_module(str(path))
    for turn in range(1 + TURNS):  # the machine's speed changes: in turns it does so for all alike
        for tile, module in timers.items():
            number = numbers.get(tile, 1)
            evaluator = module.time_evaluator("main", tvm.cpu(), number=number, repeat=2)
            seconds = min(float(value) for value in evaluator(*buffers).results)
            numbers[tile] = max(1, round(TIMED_S / seconds))
            if turn:
                best[tile] = min(best.get(tile, math.inf), seconds)
    return [{**dataclasses.asdict(tile), "seconds": seconds} for tile, seconds in best.items()]


def build(
    task: Any,
    base: Any,
    names: Sequence[str],
    reduction: Any,
    tile: Any,
    machine: Any,
    target: Any,
    path: Path,
) -> bool:
    """Build a kernel with a tile; False where TVM refuses it."""
    from gpu_aware_tune.codegen.build_pool import compile_kernel
    from gpu_aware_tune.kernels.schedules.cpu import finished, with_tile
    from gpu_aware_tune.kernels.traces import trace_to_json

    tried = with_tile(base, reduction, tile)
    if tried is base:
        return False
    trace = trace_to_json(finished(tried, names[1:], machine).trace)
    try:
        compile_kernel(task.module, trace, target, path)
    except Exception as error:  # whatever a bad schedule makes TVM raise
        print(f"  {task.name}: a tile does not build ({type(error).__name__})")
        return False
    return True


def values(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Random floats, zeros of other types."""
    if dtype.startswith("float"):
        return np.asarray(rng.random(tuple(shape), dtype=np.float32)).astype(dtype)
    return np.zeros(tuple(shape), dtype)


def described(task: Any, reduction: Any, machine: Any) -> dict[str, Any]:
    """What the cost model reads of a reduction, without TVM's objects."""

    def access(operand: Any) -> dict[str, Any]:
        fields = {f.name: getattr(operand, f.name) for f in dataclasses.fields(operand)}
        return {**fields, "buffer": [int(extent) for extent in operand.buffer.shape]}

    return {
        "name": task.name,
        "steps": reduction.steps,
        "machine": [machine.lanes, machine.registers, machine.units],
        "axes": [dataclasses.asdict(axis) for axis in reduction.axes],
        "operands": [access(operand) for operand in reduction.operands],
        "result": access(reduction.result),
        "weights": sorted(reduction.weights),
    }


# -- judging ---------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """A file of tiles."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def costs_of(rows: Sequence[Mapping[str, Any]], processor: str) -> Any:
    """The constants that the baseline schedules use on the machine of measured kernels."""
    from gpu_aware_tune.kernels.schedules.tile_cost import costs_for

    lanes, _, _ = rows[0]["machine"]
    return costs_for(lanes, processor)


class Kernel:
    """A measured kernel, to be priced with any constants."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        from gpu_aware_tune.kernels.schedules.access import Access, Axis
        from gpu_aware_tune.kernels.schedules.tile_cost import Tile

        def access(fields: Mapping[str, Any]) -> Access:
            lists = {name: tuple(fields[name]) for name in ("strides", "granules", "dims")}
            buffer = SimpleNamespace(shape=fields["buffer"])
            return Access(buffer, fields["elements"], fields["itemsize"], **lists)

        self.name, self.model = f"{row['model']} {row['name']}", str(row["model"])
        self._axes = [Axis(**axis) for axis in row["axes"]]
        self._operands = [access(operand) for operand in row["operands"]]
        self._result, self._weights = access(row["result"]), frozenset(row["weights"])
        self._machine = row["machine"]
        self._tiles = [
            Tile(
                tile["vector"],
                tile["lanes"],
                tuple(tile["counts"]),
                tuple(tile["packed"]),
                0.0,
                tile["passes"],
                tuple((number, position) for number, position in tile["panels"]),
            )
            for tile in row["tiles"]
        ]
        self.seconds = np.array([tile["seconds"] for tile in row["tiles"]])

    def cycles(self, costs: Any) -> np.ndarray:
        """What the model expects of each tile."""
        from gpu_aware_tune.kernels.schedules.tile_cost import Machine, priced, priced_in_passes

        lanes, registers, units = self._machine
        machine = Machine(lanes, registers, units, costs)
        common = (self._axes, self._operands)
        return np.array(
            [
                (
                    priced_in_passes(tile, *common, machine)
                    if tile.passes > 1
                    else priced(tile, *common, self._result, machine, self._weights)
                ).cycles
                for tile in self._tiles
            ]
        )


def judged(rows: Sequence[Mapping[str, Any]], costs: Any) -> list[tuple[str, float, float]]:
    """Of each kernel its name, the rank correlation and the regret."""
    from scipy.stats import spearmanr

    found = []
    for kernel in map(Kernel, rows):
        cycles = kernel.cycles(costs)
        correlation = float(spearmanr(cycles, kernel.seconds).statistic)
        regret = kernel.seconds[cycles.argmin()] / kernel.seconds.min() - 1
        found.append((kernel.name, correlation, float(regret)))
    return found


def show(rows: Sequence[tuple[str, float, float]]) -> None:
    """A table of what `judged` gives."""
    for name, correlation, regret in rows:
        print(f"  {name[:70]:70} rank correlation {correlation:5.2f}, regret {100 * regret:4.0f} %")
    correlations, regrets = [row[1] for row in rows], [row[2] for row in rows]
    print(f"  {len(rows)} kernels: correlation {statistics.median(correlations):.2f} in the median, "
          f"regret {100 * statistics.fmean(regrets):.1f} % in the mean, "
          f"{100 * max(regrets):.0f} % at most")  # fmt: skip


# -- fitting ---------------------------------------------------------------------------------------


def fit(rows: Sequence[Mapping[str, Any]], start: Any, rounds: int) -> None:
    """Print constants for all kernels, and how such constants do on models left out of the fit."""
    kernels = [Kernel(row) for row in rows]
    print("as it is:")
    show(judged(rows, start))
    left_out: list[tuple[str, float, float]] = []
    for model in sorted({kernel.model for kernel in kernels}):
        others = [kernel for kernel in kernels if kernel.model != model]
        costs = searched(others, start, rounds)
        left_out += judged([row for row in rows if row["model"] == model], costs)
    print("fitted, each model's kernels with the constants of the other models:")
    show(left_out)
    costs = searched(kernels, start, rounds)
    print("fitted to all:")
    show(judged(rows, costs))
    print("constants:", {name: round(getattr(costs, name), 3) for name in SEARCHED})


def searched(kernels: Sequence[Kernel], start: Any, rounds: int) -> Any:
    """The constants with the least loss that differential evolution finds around those given."""
    from scipy.optimize import differential_evolution

    names = [name for name in SEARCHED if getattr(start, name) > 0]  # what costs nothing stays so
    origin = np.log([getattr(start, name) for name in names])

    def costs(vector: np.ndarray) -> Any:
        return dataclasses.replace(
            start, **dict(zip(names, map(float, np.exp(vector)), strict=True))
        )

    result = differential_evolution(
        lambda vector: loss(kernels, costs(vector)),
        [(value - math.log(SPREAD), value + math.log(SPREAD)) for value in origin],
        maxiter=rounds,
        popsize=2,
        x0=origin,
        rng=0,
        polish=False,
    )
    return costs(result.x)


def loss(kernels: Sequence[Kernel], costs: Any) -> float:
    """Errors of the logarithms, the better a tile the heavier, and the tile picked, softly."""
    total = 0.0
    for kernel in kernels:
        expected, actual = np.log(kernel.cycles(costs)), np.log(kernel.seconds)
        over = actual - actual.min()
        weight = np.exp(-2 * over)
        errors = expected - actual
        errors -= np.average(errors, weights=weight)
        picks = np.exp(-12 * (expected - expected.min()))
        total += float(np.average(errors**2, weights=weight) + (picks * over).sum() / picks.sum())
    return total / len(kernels)


if __name__ == "__main__":
    main()
