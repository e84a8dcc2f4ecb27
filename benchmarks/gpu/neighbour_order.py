"""Do kernels keep their order beside a neighbour? Slices that measure together against one at a time.

    python -m benchmarks.gpu.neighbour_order
    python -m benchmarks.gpu.neighbour_order --trials 64 --time 15 --repeats 1
    python -m benchmarks.gpu.neighbour_order --null           # without a GPU: tries the code

The models are tuned at the same time, each on its own slice of one GPU, in two ways:

    together   the slices measure at the same time, as a run of several models does
    exclusive  one candidate is measured at a time, as with --exclusive

Both begin with an empty record store and have the same seed and number of trials; --time bounds
each search besides. Then the best kernels of each task are measured again, alone, and the run ends.
A task has changed where that made another kernel the best. A neighbour does no harm where the part
of changed tasks is no larger together than exclusive. Two kernels that are equally fast change
places in either way, so that the counts are told with the verdict, and how likely the difference is
by chance.

The ways take turns, every second repeat begins with the other one, and each repeat has a seed of
its own. One model alone is measured on two slices.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.scaffold import gpu_benchmark, gpu_parser

if TYPE_CHECKING:
    from gpu_aware_tune.events import Event
    from gpu_aware_tune.finalize.retiming import Reorder
    from gpu_aware_tune.run.jobs import TuningJob
    from gpu_aware_tune.run.session import Session
    from gpu_aware_tune.search.stage import SearchResult
    from gpu_aware_tune.search.task_set import TaskSet

    Reorders = dict[tuple[str, int], Reorder]

WAYS = ("together", "exclusive")
_BACKENDS = ("green", "mps", "mig")  # those of a GPU that have slices


def main() -> None:
    """Tune in both ways in turns, print a line for each run and what they come to."""
    args = arguments()
    names = args.models.split(",")
    options = {"trials": args.trials, "time_s": args.time, **where(args.partition, args.null)}
    runs: list[dict[str, Any]] = []
    with gpu_benchmark("gpu-neighbour-order", args) as run:
        paths = [path for _, path in run.models()]
        for way, repeat in turns(args.repeats):
            db = run.scratch / f"{way}-{repeat}"
            runs.append({"way": way, "repeat": repeat, **tuned(paths, way, repeat, db, options)})
            print(line(runs[-1]), flush=True)
            found = verdict(runs)
            settings = {"models": names, "repeats": args.repeats, **options}
            run.write(settings=settings, verdict=found, runs=runs)
        print(closing(found))


def arguments() -> argparse.Namespace:
    """The command line; with --null few trials, since it is the code that is tried there."""
    command = gpu_parser(__doc__)
    command.add_argument("--partition", default=_BACKENDS[0], choices=_BACKENDS)
    command.add_argument("--trials", type=int, help="of each model in a run (256; --null: 8)")
    command.add_argument("--time", type=float, help="most seconds of each search (no limit)")
    command.add_argument("--repeats", type=int, help="of both ways (3; --null: 1)")
    args = command.parse_args()
    args.trials = args.trials or (8 if args.null else 256)
    args.repeats = args.repeats or (1 if args.null else 3)
    return args


def where(partition: str, null: bool) -> dict[str, Any]:
    """The options that say what is tuned on: this machine's cores where no GPU is meant."""
    if null:
        return {"target": "llvm", "partition": "cores", "trials_per_iteration": 4}
    return {"target": "cuda", "partition": partition}


def turns(repeats: int) -> Iterator[tuple[str, int]]:
    """The way and the repeat of each run."""
    for repeat in range(repeats):
        for way in reversed(WAYS) if repeat % 2 else WAYS:
            yield way, repeat


def tuned(
    paths: Sequence[Path], way: str, seed: int, db: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """One run over all models up to the second measurement; what that changed, and the trials."""
    from gpu_aware_tune.events import Progress
    from gpu_aware_tune.run.jobs import make_jobs
    from gpu_aware_tune.run.session import Session

    begun = time.monotonic()
    slices = max(2, len(paths))
    jobs = make_jobs(
        paths, gpu_pct=100 // slices, slices=slices, exclusive=way == "exclusive", seed=seed,
        patience=0, db=db, **options,
    )  # fmt: skip
    last: dict[str, Progress] = {}
    with Session(jobs.settings) as session:
        stages = searched(session, jobs)
        while True:
            try:
                event = next(stages)
            except StopIteration as end:
                work, found, reorders = end.value
                break
            if isinstance(event, Progress):
                last[event.model] = event
        row = {"backend": session.backend, "units": [goal.units for goal in work.goals]}
        task_names = {task.hash: task.name for task in work.tasks}
    return {
        **row,
        "slices": max(len(event.slices) for event in last.values()),
        "trials": {name: event.trials_done for name, event in last.items()},
        "trials_per_min": sum(event.trials_per_min for event in last.values()),
        "stopped_by": dict(found.stopped_by),
        "failures": dict(found.failures),
        **neighbours(db),
        "tasks": [
            {"task": task_names[task], "units": units, "changed": r.changed, "regret": r.regret}
            for (task, units), r in reorders.items()
        ],
        "seconds": time.monotonic() - begun,
    }


def searched(
    session: Session, job: TuningJob
) -> Generator[Event, None, tuple[TaskSet, SearchResult, Reorders]]:
    """The stages of a run up to the second measurement: what was searched, found and reordered.

    No library is made: this is the same in both ways, and takes time that searches can have.
    """
    from gpu_aware_tune.finalize.retiming import retime
    from gpu_aware_tune.run.models import import_models, recall_models
    from gpu_aware_tune.run.search_stage import run_search, start_workers

    yield from session.find_device(job.goals)
    models = yield from import_models(session, job.goals)
    models, work, known = yield from recall_models(session, models)
    workers = yield from start_workers(session, models, work)
    limit = session.settings.time_s
    found = yield from run_search(session, models, work, known, workers, limit)
    reorders = yield from retime(work, found, known.records, session.settings, workers.pools)
    return work, found, reorders


def neighbours(db: Path) -> dict[str, int]:
    """How many candidates a run measured, and how many of them while another slice did."""
    from gpu_aware_tune.records.store import Store
    from gpu_aware_tune.settings import RECORDS_FILE

    with Store(db / RECORDS_FILE, readonly=True) as store:
        flags = [r.flags.split(",") for r in store.records() if r.seconds is not None]
    return {"measured": len(flags), "beside": sum("together" in own for own in flags)}


def verdict(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of each way over all repeats, and whether order is kept.

    `kept` is None where nothing can be said: a way without tasks, or slices that had no neighbour.
    `chance` is how likely at least so many of the changed tasks are among those measured together,
    if neighbours made no difference (Fisher's exact test).
    """
    of = {way: [run for run in runs if run["way"] == way] for way in WAYS}
    found: dict[str, Any] = {
        way: counted([task for run in own for task in run["tasks"]]) for way, own in of.items()
    }
    beside = sum(run["beside"] for run in of["together"])
    found |= {"beside": beside, "kept": None, "chance": None}
    shares = [found[way]["share"] for way in WAYS]
    if beside and None not in shares:
        found["kept"] = shares[0] <= shares[1]
        found["chance"] = chance(*(found[way][key] for way in WAYS for key in ("tasks", "changed")))
    return found


def counted(tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many tasks changed, and the gain of their new best kernel over the old one."""
    gains = [task["regret"] for task in tasks if task["changed"]]
    return {
        "tasks": len(tasks),
        "changed": len(gains),
        "share": len(gains) / len(tasks) if tasks else None,
        "mean_gain": sum(gains) / len(gains) if gains else 0.0,
        "most_gain": max(gains, default=0.0),
    }


def chance(tasks: int, changed: int, other_tasks: int, other_changed: int) -> float:
    """The part of all ways to deal the changed tasks out that gives the first side so many or more."""
    both = changed + other_changed
    ways = sum(
        math.comb(tasks, count) * math.comb(other_tasks, both - count)
        for count in range(changed, both + 1)
    )
    return ways / math.comb(tasks + other_tasks, both)


def line(run: dict[str, Any]) -> str:
    """One run's figures as text."""
    units = " and ".join(map(str, run["units"]))
    return (
        f"{run['way']} {run['repeat']}: {told(counted(run['tasks']))};"
        f" {sum(run['trials'].values())} trials, {run['trials_per_min']:.0f} a minute;"
        f" {run['beside']} of {run['measured']} candidates had a neighbour"
        f" ({run['backend']}, {run['slices']} slices, {units} units)"
    )


def told(counts: dict[str, Any]) -> str:
    """What the second measurement changed, as text."""
    if not counts["tasks"]:
        return "no task measured again"
    text = f"{counts['changed']} of {counts['tasks']} tasks changed ({100 * counts['share']:.0f} %)"
    if not counts["changed"]:
        return text
    mean, most = 100 * counts["mean_gain"], 100 * counts["most_gain"]
    return f"{text}, gain {mean:.1f} % on average, {most:.1f} % at most"


def closing(found: dict[str, Any]) -> str:
    """The verdict as text, with the counts that it rests on."""
    if found["kept"] is None:
        head = "no verdict" if found["beside"] else "no verdict, no candidate had a neighbour"
    else:
        head = f"order {'kept' if found['kept'] else 'NOT kept'} beside a neighbour"
    counts = "; ".join(f"{way} {told(found[way])}" for way in WAYS)
    likely = found["chance"]
    odds = "" if likely is None else f"; so many together by chance: {100 * likely:.0f} %"
    return f"{head}: {counts}{odds}"


if __name__ == "__main__":
    main()
