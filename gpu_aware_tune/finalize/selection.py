"""Which kernel of each task goes into the library: the best one whose numbers are right."""

from __future__ import annotations

import os
import traceback
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpu_aware_tune.codegen.build_pool import BuildPool
from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.events import Event, Level, Note, Origin
from gpu_aware_tune.measure.measurement import Failure, FailureKind
from gpu_aware_tune.model.tasks import Task
from gpu_aware_tune.records.rows import UNFIT
from gpu_aware_tune.records.task_records import TaskRecords
from gpu_aware_tune.search.objectives import one_for_all, usable
from gpu_aware_tune.settings import Objective, RunSettings


@dataclass(frozen=True)
class Choice:
    """The kernel of one task on one share; `trace` "" stands for the unscheduled kernel."""

    task: Task
    units: int
    trace: str
    seconds: float
    origin: Origin


def choose(
    tasks: Sequence[Task],
    units: Sequence[int],
    records: TaskRecords,
    baselines: Mapping[str, Sequence[str]],
    builders: BuildPool,
    settings: RunSettings,
    target: Mapping[str, object],
    verified: Collection[tuple[str, str]] = (),
) -> Generator[Event, None, tuple[Choice, ...]]:
    """Choose the kernel of each task and share: the fastest there or, with `robust` and `mean`, on all.

    Each is run against the unscheduled kernel on random inputs, in a build worker, because a wrong
    kernel may crash. A mismatch marks its record wrong, and the next best is taken. So is it where
    a trace cannot be applied to its kernel; that is checked without `settings.verify`, too.

    Args:
        tasks: of one model.
        units: of its shares.
        records: where the kernels are.
        baselines: traces of each task's baseline schedules, for tasks of which nothing was measured.
        builders: to check kernels with.
        settings: of the run.
        target: JSON of what kernels are built for.
        verified: kernels, as (task hash, trace), that need no check.
    """
    passed = set(verified)
    refused: set[tuple[str, str]] = set()  # of those that no record tells to be wrong
    groups = [tuple(units)] if settings.objective.one_set else [(count,) for count in units]
    undecided = [(task, group) for task in tasks for group in groups]
    seed = settings.seed if settings.verify else None
    unfit = 0
    chosen: list[Choice] = []
    while undecided:
        picked = [
            _best(task, group, records, settings.objective, baselines, refused)
            for task, group in undecided
        ]
        todo = {
            (choices[0].task.hash, choices[0].trace): choices[0]
            for choices in picked
            if choices[0].trace and (choices[0].task.hash, choices[0].trace) not in passed
        }
        for choice, problem in _checks(list(todo.values()), builders, target, seed):
            name = choice.task.hash, choice.trace
            if problem is None:
                passed.add(name)
                continue
            refused.add(name)
            if problem == UNFIT:
                unfit += 1
                records.mark_unfit(*name)
                continue
            records.mark_wrong(choice.task.hash, units, choice.trace)
            yield Note(f"{choice.task.name}: a kernel was wrong ({problem})", Level.WARNING)
        retry = []
        for pair, choices in zip(undecided, picked, strict=True):
            if (choices[0].task.hash, choices[0].trace) in refused:
                retry.append(pair)
            else:
                chosen += choices
        undecided = retry
    if unfit:
        yield Note(f"{unfit} schedules in the records do not fit their kernels; left out")
    return tuple(chosen)


def _best(
    task: Task,
    units: Sequence[int],
    records: TaskRecords,
    objective: Objective,
    baselines: Mapping[str, Sequence[str]],
    refused: Collection[tuple[str, str]],
) -> list[Choice]:
    """The best kernel of a task for some units together; where nothing has run, by rule.

    What was measured again goes first: a quick number that happens to be low must not win. That holds
    where some kernel was measured again on each of the units; those of one alone say nothing of
    the others.
    """
    found = {u: records.all(task.hash, u) for u in units}
    known = usable(found)
    retimed = {u: [r for r in own if r.retimed] for u, own in found.items()}
    again = usable(retimed) if all(retimed.values()) else {}
    ranked = one_for_all(again, objective) or one_for_all(known, objective)
    if not ranked:
        first = next((t for t in baselines[task.hash] if (task.hash, t) not in refused), "")
        origin = Origin.BASELINE if first else Origin.UNSCHEDULED
        return [Choice(task, count, first, 0.0, origin) for count in units]
    trace = ranked[0][0]
    origin = Origin.UNSCHEDULED
    if trace:
        origin = Origin(next(r.origin for r in found[units[0]] if r.trace == trace))
    return [Choice(task, u, trace, known[trace].get(u, 0.0), origin) for u in units]


def _checks(
    choices: Sequence[Choice], builders: BuildPool, target: Mapping[str, object], seed: int | None
) -> Iterator[tuple[Choice, str | None]]:
    """Check kernels in the build workers; gives what is wrong with each, or None."""
    by_name = {(choice.task.hash, choice.trace): choice for choice in choices}
    calls = {
        name: (check_kernel, (choice.task.module_json, choice.trace, target, seed))
        for name, choice in by_name.items()
    }
    for name, answer in builders.call_all(calls):
        choice = by_name[name]
        if not isinstance(answer, Failure):
            yield choice, answer
            continue
        if answer.kind == FailureKind.ERROR:  # no verdict: the record must not be marked wrong
            raise TuneError(f"checking {choice.task.name} failed: {answer.text}")
        yield choice, answer.kind  # the kernel crashed, hung or ate the memory


def check_kernel(
    module_json: str, trace: str, target: Mapping[str, object], seed: int | None
) -> str | None:
    """Run one kernel against the unscheduled one (in a worker); returns what is wrong, or None.

    Args:
        module_json, trace, target: the kernel.
        seed: of the inputs; None: only see whether the trace can be applied.
    """
    import tvm

    from gpu_aware_tune.finalize.kernel_check import verify_kernel
    from gpu_aware_tune.kernels.traces import TraceError, apply_trace, module_from_json

    module, on = module_from_json(module_json), tvm.target.Target(dict(target))
    try:
        apply_trace(trace, module)
    except TraceError:
        return UNFIT
    if seed is None:
        return None
    try:
        check = verify_kernel(module, trace, on, seed)
    except Exception:
        if on.kind.name == "cuda" and tvm.cuda().exist:
            # The kernel's fault has ended this process's context, for the next kernel too: to end
            # the process counts as this one's crash, and the pool starts another.
            traceback.print_exc()
            os._exit(1)
        raise
    return None if check.ok else f"error {check.max_error:.1e}"
