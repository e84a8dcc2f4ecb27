"""Kernels tuned at 1 and 2 cores, and one set for both (`robust`), each run on 1 and 2 cores.

    python -m benchmarks.share_table                            # about ten minutes
    python -m benchmarks.share_table --models squeezenet --trials 32

Each model is tuned once, for a set of kernels for each share; then the one set that loses least on
all of them is chosen from the same records. Then the three sets run on every share, all of them in
turns, so that drift of the machine meets all alike. Told are milliseconds, the loss of each set
against the best of its share, and the loss that the tuner itself expected of the one set. The
figures go to benchmarks/results/share-table.json; with `--report FOLDER` a page with figures is
written for each model.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, environment, write_results
from benchmarks.light_models import write_seeded
from benchmarks.scaffold import parser

RESULTS_FILE = RESULTS / "share-table.json"


def main() -> None:
    """Tune, run every set on every share, print the tables, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--models", default="squeezenet,resnet50")
    command.add_argument("--trials", type=int, default=128, help="of the search")
    command.add_argument("--percents", default="50,100", help="the shares")
    command.add_argument("--seconds", type=float, default=0.3, help="of each slice")
    command.add_argument("--rounds", type=int, default=25, help="slices of each set on each share")
    command.add_argument("--report", type=Path, metavar="FOLDER", help="write a page a model")
    args = command.parse_args()
    about, models = environment(), {}
    with tempfile.TemporaryDirectory(prefix="share-table-") as scratch:
        for name in args.models.split(","):
            models[name] = one_model(name, args, about, Path(scratch))
            print(table(name, models[name]), flush=True)
            facts = {"trials": args.trials, "rounds": args.rounds, "seconds": args.seconds}
            write_results(args.results, about, {**facts, "models": models})
    print(f"written to {args.results}")


def one_model(
    name: str, args: argparse.Namespace, about: dict[str, Any], scratch: Path
) -> dict[str, Any]:
    """Tune one model both ways and fill its table."""
    path, db = write_seeded(name, scratch), scratch / f"{name}-records"
    folders = {way: scratch / f"{name}-{way}.tuned" for way in ("share", "robust")}
    expected = {
        way: tuned(path, way, args.percents, args.trials, folder, db)
        for way, folder in folders.items()
    }
    curves = measured(folders, args.seconds, args.rounds)
    if args.report is not None:
        write_report(name, folders["share"], about, curves, db, args.report)
    return {
        "latency_ms": {
            label: {str(point["units"]): point["latency_ms"] for point in curve["points"]}
            for label, curve in curves.items()
        },
        "expected_loss": expected["robust"],
        "curves": curves,
    }


def tuned(
    path: Path, objective: str, percents: str, trials: int, folder: Path, db: Path
) -> dict[str, float | None]:
    """One run of the tuner; by units what one set was expected to lose there."""
    from gpu_aware_tune.events import Finished
    from gpu_aware_tune.settings import make_settings
    from gpu_aware_tune.tuning import tune_events

    settings = make_settings(
        gpu_pct=percents, target="llvm", trials=trials, objective=objective, output=folder, db=db
    )
    (finished,) = (e for e in tune_events(path, settings) if isinstance(e, Finished))
    return {str(share.units): share.loss for share in finished.shares}


def measured(folders: dict[str, Path], seconds: float, rounds: int) -> dict[str, dict[str, Any]]:
    """A curve of each set, all measured in turns."""
    from gpu_aware_tune.partition import choose_backend, find_device, open_partitions
    from gpu_aware_tune.profiling.curves import Curve, measure
    from gpu_aware_tune.profiling.profiles import open_folders, share_for
    from gpu_aware_tune.workers import WorkerHost

    device, _ = find_device("llvm", 0, None)
    backend, _ = choose_backend(device)
    (plain,) = open_folders([folders["share"]])
    sets: dict[str, tuple[Path, int | None]] = {
        f"tuned at {units}": (folders["share"], units) for units in plain.manifest.units
    }
    sets["robust"] = (folders["robust"], None)
    with contextlib.ExitStack() as stack:
        shares = [share_for(device, backend, units) for units in plain.manifest.units]
        partitions = open_partitions(shares, device, backend)
        for partition in partitions:
            stack.callback(partition.close)
        subjects = []
        for folder, pinned in sets.values():
            (opened,) = open_folders([folder], pinned)
            subjects += [opened.subject(partition) for partition in partitions]
        points = measure(stack.enter_context(WorkerHost()), subjects, seconds, rounds)
    curves = {}
    for number, label in enumerate(sets):
        own = tuple(points[number * len(partitions) : (number + 1) * len(partitions)])
        facts = (
            plain.manifest.model.name,
            device.key,
            backend,
            device.unit,
            device.units_total,
            own,
        )
        curves[label] = Curve(*facts).as_dict()
    return curves


def write_report(
    name: str,
    folder: Path,
    about: dict[str, Any],
    curves: dict[str, dict[str, Any]],
    db: Path,
    output: Path,
) -> None:
    """The page of a model's first run, with the curves of the sets tuned at each share."""
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "cli.py"), "report", str(folder), "--db", str(db)]
    command += ["--run", "1"]  # the second one finds all of its trials in the store
    for number, label in enumerate(label for label in curves if label != "robust"):
        path = folder.parent / f"{name}-{number}.json"
        write_results(path, about, curves[label])
        command += ["--profile", str(path)]
    command += ["-o", str(output / f"{name}.html"), "--png", str(output / name)]
    subprocess.run(command, check=True)


def table(name: str, row: dict[str, Any]) -> str:
    """One model's figures as text."""
    found: dict[str, dict[str, float]] = row["latency_ms"]
    units = list(next(iter(found.values())))
    best = {place: min(times[place] for times in found.values()) for place in units}
    lines = [f"{name}: ms (and loss against the best there) on {cores(units)}"]
    for label, times in found.items():
        cells = (f"{times[u]:9.2f} ({times[u] / best[u] - 1:4.1%})" for u in units)
        lines.append(f"    {label:12}" + "".join(cells))
    losses = {u: loss for u, loss in row["expected_loss"].items() if loss is not None}
    lines.append(f"    robust was expected to lose {losses} of its kernels' time")
    return "\n".join(lines)


def cores(units: Sequence[str]) -> str:
    """The shares as text."""
    return ", ".join(f"{count} core{'' if count == '1' else 's'}" for count in units)


if __name__ == "__main__":
    main()
