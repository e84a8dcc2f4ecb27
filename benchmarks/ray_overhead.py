"""What Ray costs: the same search through Ray on this one machine, and without it, taking turns.

    python -m benchmarks.ray_overhead --rounds 3

Each round tunes a light model twice from nothing: with local pools, and through a Ray cluster that
is started for it. Printed and kept: seconds per trial of the search stage, how long the cluster and
its workers take to start, and the bytes of the messages per trial (pickled; the modules that each
machine gets once are told apart).
"""

from __future__ import annotations

import json
import pickle
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.environment import RESULTS, environment, write_results
from benchmarks.light_models import write_seeded
from benchmarks.scaffold import parser
from gpu_aware_tune.cluster import members
from gpu_aware_tune.cluster.messages import NodeSetup
from gpu_aware_tune.events import Note, Stage, Trial
from gpu_aware_tune.settings import Settings
from gpu_aware_tune.tuning import tune_events

RESULTS_FILE = RESULTS / "ray-overhead.json"


class CountingMembers(members.Members):
    """Counts the bytes of what is sent and received."""

    moved: ClassVar[Counter[str]] = Counter()

    def __init__(self, setup: NodeSetup) -> None:
        super().__init__(setup)
        self.moved["setup"] += len(pickle.dumps(setup))

    def flush(self) -> None:
        """Count what goes out."""
        for member in self._members.values():
            self.moved["sent"] += len(pickle.dumps(member.outgoing)) if member.outgoing else 0
        super().flush()

    def receive(self, wait_s: float) -> Iterator[Any]:
        """Count what comes in."""
        for member, news in super().receive(wait_s):
            self.moved["received"] += len(pickle.dumps(news))
            yield member, news


def main() -> None:
    """Take turns, print the table, write the results file."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--model", default="squeezenet")
    command.add_argument("--trials", type=int, default=128)
    command.add_argument("--rounds", type=int, default=3)
    args = command.parse_args()
    members.Members = CountingMembers  # type: ignore[misc]
    about = environment()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ray-overhead-") as name:
        path = write_seeded(args.model, Path(name))
        for number in range(args.rounds):
            ways = (None, "auto") if number % 2 == 0 else ("auto", None)
            for way in ways:
                row = tune_once(path, Path(name) / f"{number}-{way}", args.trials, way)
                rows.append({"round": number, "ray": way is not None, **row})
                print(rows[-1], flush=True)
    per_trial = {
        way: statistics.median(row["s_per_trial"] for row in rows if row["ray"] == way)
        for way in (False, True)
    }
    through = [row for row in rows if row["ray"]]
    result = {
        "local_s_per_trial": per_trial[False],
        "ray_s_per_trial": per_trial[True],
        "overhead": per_trial[True] / per_trial[False] - 1,
        "start_s": statistics.median(row["start_s"] for row in through),
        "bytes_per_trial": statistics.median(row["bytes_per_trial"] for row in through),
        "setup_bytes": through[0]["setup_bytes"],
    }
    print(json.dumps(result, indent=1))
    how = {"model": args.model, "trials": args.trials, "rounds": args.rounds}
    write_results(args.results, about, {"how": how, "all": result, "rounds": rows})


def tune_once(path: Path, folder: Path, trials: int, ray: str | None) -> dict[str, Any]:
    """One run from nothing; stops after the search."""
    settings = Settings(
        target="llvm", trials=trials, patience=0, db=folder / "db", output=folder / "out", ray=ray
    )
    CountingMembers.moved.clear()
    marks: dict[str, float] = {}
    done = 0
    stream = tune_events(path, settings)
    for event in stream:
        if isinstance(event, Stage):
            marks[event.text] = time.monotonic()
            if event.name == "retime":
                break
        elif isinstance(event, Note) and "Ray cluster" in event.text:
            marks["connected"] = time.monotonic()
        elif isinstance(event, Note) and "build workers" in event.text:
            marks["workers"] = time.monotonic()
        done += isinstance(event, Trial)
    stream.close()  # type: ignore[attr-defined]
    moved = CountingMembers.moved
    return {
        "trials": done,
        "s_per_trial": (marks["measuring the best again, alone"] - marks["searching"]) / trials,
        "start_s": marks["workers"] - marks["measuring the untuned schedules"],
        "bytes_per_trial": (moved["sent"] + moved["received"]) / done,
        "setup_bytes": moved["setup"],
    }


if __name__ == "__main__":
    main()
