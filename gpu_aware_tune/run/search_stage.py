"""The search as a stage of a run: its workers, its baseline schedules, its budgets."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass

from gpu_aware_tune.events import Event, Note, Stage, StageName
from gpu_aware_tune.run.models import ImportedModel, target_of
from gpu_aware_tune.run.session import Session
from gpu_aware_tune.search.budget import Budget
from gpu_aware_tune.search.pipeline import TaskSpec
from gpu_aware_tune.search.pools import Pools, PoolSettings, plan_slices
from gpu_aware_tune.search.sources import CandidatePipeline
from gpu_aware_tune.search.stage import SearchContext, SearchResult, search
from gpu_aware_tune.search.task_set import Known, TaskSet

# Below this, starting threads costs more than the kernel itself, so that the unscheduled one may win.
_LIGHT_FLOPS = 2e6


@dataclass(frozen=True)
class RunWorkers:
    """The workers of a run.

    Args:
        pools: this machine's.
        pipeline: what searches, builds and measures: this machine's, or that of a cluster.
        baselines: traces of each task's baseline schedules; "" stands for the unscheduled kernel.
    """

    pools: Pools
    pipeline: CandidatePipeline
    baselines: Mapping[str, Sequence[str]]


def start_workers(
    session: Session,
    models: Sequence[ImportedModel],
    work: TaskSet,
    here: bool = False,
    seeded: Collection[str] = (),
) -> Generator[Event, None, RunWorkers]:
    """Start measuring, build and search workers, and make the baseline schedules in them.

    Args:
        here: only this machine's, though the run has a cluster.
        seeded: tasks whose search starts from what another size of the model has found: they need
            one baseline schedule only.
    """
    settings = _pool_settings(session, models)
    specs = {task.hash: TaskSpec(task.args, work.units_of(task.hash)) for task in work.tasks}
    modules = {task.hash: task.module_json for task in work.tasks}
    pools = session.stack.enter_context(Pools(session.host, settings))
    text = pools.start(specs, modules)
    pipeline: CandidatePipeline = pools.pipeline
    if (
        session.settings.ray is not None and not here
    ):  # the local ones stay for what comes after the search
        pipeline = yield from _join_cluster(session, settings, specs, modules)
    yield Note(text)
    return RunWorkers(pools, pipeline, _baselines(pools, work, modules, seeded))


def run_search(
    session: Session,
    models: Sequence[ImportedModel],
    work: TaskSet,
    known: Known,
    workers: RunWorkers,
    time_s: float | None,
) -> Generator[Event, None, SearchResult]:
    """Open the runs' rows, measure the baseline, and search.

    Args:
        time_s: how long baseline and search may take; None: no limit.
    """
    settings = session.settings
    run_ids = {model.name: _open_row(session, model, models, workers.pools) for model in models}
    yield Stage(StageName.SEARCH, "measuring the baseline schedules, then searching")
    context = SearchContext(
        settings, work, known, session.backend, run_ids, workers.baselines, session.stop
    )
    budgets = {m: Budget(settings.trials, time_s, settings.patience or 0) for m in work.models}
    return (yield from search(context, workers.pipeline, budgets))


def measure_baseline(
    session: Session, work: TaskSet, known: Known, workers: RunWorkers
) -> Generator[Event, None, SearchResult]:
    """Measure the baseline schedules alone."""
    context = SearchContext(
        session.settings, work, known, session.backend, {}, workers.baselines, session.stop
    )
    budgets = {model: Budget(None, None, 0) for model in work.models}
    return (yield from search(context, workers.pipeline, budgets, trials=False))


def _open_row(
    session: Session, model: ImportedModel, models: Sequence[ImportedModel], pools: Pools
) -> int:
    settings = {**session.settings.as_dict(), **model.goal.as_dict()}
    machine = {
        **session.machine(),
        "units": list(model.units),
        "evidence": pools.evidence(model.units),
        "model": model.name,
        "model_hash": model.model.hash,
        "models": [other.name for other in models],
        "tasks": [
            {"hash": task.hash, "name": task.name, "weight": task.weight} for task in model.tasks
        ],
    }
    return session.open_row(model.name, settings, machine)


def _join_cluster(
    session: Session,
    pools: PoolSettings,
    specs: Mapping[str, TaskSpec],
    modules: Mapping[str, str],
) -> Generator[Event, None, CandidatePipeline]:
    """Start workers like this machine's own on every machine of a Ray cluster."""
    import tvm

    from gpu_aware_tune import __version__
    from gpu_aware_tune.cluster import NodeSetup, connect

    settings = session.settings
    assert settings.ray is not None
    versions = (__version__, tvm.__version__)
    setup = NodeSetup(pools, specs, modules, settings.arch, versions, settings.exclusive)
    cluster, text = connect(settings.ray, setup, session.stack)
    yield Note(text)
    for line in cluster.wait():
        yield Note(line)
    return cluster


def _pool_settings(session: Session, models: Sequence[ImportedModel]) -> PoolSettings:
    from gpu_aware_tune.partition import SIDE_BY_SIDE, instance_units
    from gpu_aware_tune.search.candidates import SearchSettings

    settings, device = session.settings, session.device
    shares = [share for model in models for share in model.shares]
    most = settings.slices or len(models)
    if session.backend not in SIDE_BY_SIDE:
        most = 1
    return PoolSettings(
        device=device,
        backend=session.backend,
        slices=plan_slices(shares, device, most, instance_units(device, session.backend)),
        target=target_of(models, device),
        search=SearchSettings(
            settings.population,
            settings.generations,
            settings.trials_per_iteration,
            settings.seed,
            units=max(s.units for s in shares) if device.kind == "cuda" else 0,
        ),
        build_timeout_s=settings.build_timeout_s,
        run_timeout_s=settings.run_timeout_s,
        memory_bytes=settings.memory_limit_mb << 20,
    )


def _baselines(
    pools: Pools, work: TaskSet, modules: Mapping[str, str], seeded: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """The baseline schedules of every task, made side by side in the build workers.

    On a CPU the unscheduled kernel ("") of light ones is among them. It binds no GPU threads: the
    host would run it, on addresses of the device.
    """
    target = dict(pools.target)
    on_cpu = target["kind"] == "llvm"
    calls = {
        task.hash: (baseline_traces, (modules[task.hash], target, task.hash in seeded))
        for task in work.tasks
    }
    found = {
        task: answer if isinstance(answer, tuple) else ()
        for task, answer in pools.builders.call_all(calls)
    }
    baselines = {}
    for task in work.tasks:
        traces = found[task.hash]
        unscheduled = on_cpu and (task.flops < _LIGHT_FLOPS or not traces)
        baselines[task.hash] = (*traces, *([""] if unscheduled else []))
    return baselines


def baseline_traces(
    module_json: str, target: Mapping[str, object], only_one: bool
) -> tuple[str, ...]:
    """The baseline schedules of one kernel, the most promising first (in a worker)."""
    import tvm

    from gpu_aware_tune.kernels.schedules import baseline_schedules
    from gpu_aware_tune.kernels.traces import module_from_json, trace_to_json

    on = tvm.target.Target(dict(target))
    module = module_from_json(module_json)
    found = baseline_schedules(module, on, 1) if only_one else baseline_schedules(module, on)
    return tuple(dict.fromkeys(trace_to_json(schedule.trace) for schedule in found))
