"""What a run's tables and lines say: plans, results, latencies, failures, as text and rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from gpu_aware_tune.events import Finished, Planned, Progress, ShareResult, TaskResult


def format_seconds(seconds: float | None) -> str:
    """Writes seconds with three digits and a fitting unit: "12.3 ms"."""
    if seconds is None:
        return "-"
    units = (("s", 1.0), ("ms", 1e3), ("us", 1e6))
    unit, scale = next((pair for pair in units if seconds * pair[1] >= 0.9995), units[-1])
    value = seconds * scale
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:#.3g} {unit}"


def format_clock(seconds: float) -> str:
    """Writes seconds as "1:05" or "2:03:04"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def format_gain(untuned_s: float | None, tuned_s: float | None) -> str:
    """Writes how many times faster tuned is than untuned: "2.10x"."""
    return f"{untuned_s / tuned_s:.2f}x" if untuned_s and tuned_s else "-"


def format_failures(failures: Mapping[str, int]) -> str:
    """Writes failures by kind, most frequent first: "build 2, timeout 1"."""
    by_count = sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{kind} {count}" for kind, count in by_count if count)


def fraction_done(progress: Progress, time_s: float | None) -> float:
    """Returns how much of the budget is used, by trials or by time, whichever ends first."""
    by_trials = progress.trials_done / progress.trials_total if progress.trials_total else 0.0
    by_time = progress.elapsed_s / time_s if time_s else 0.0
    return min(1.0, max(by_trials, by_time))


def share_labels(planned: Planned) -> dict[int, str]:
    """Returns the short name of each share by its units: "32 SMs"."""
    pairs = zip(planned.units, planned.shares, strict=True)
    return {units: share.rsplit("= ", 1)[-1] for units, share in pairs}


def counts(progress: Progress) -> list[str]:
    total = f"/{progress.trials_total}" if progress.trials_total else ""
    parts = [f"{progress.trials_done}{total} trials", f"{progress.trials_per_min:.0f}/min"]
    failures = format_failures(progress.failures)
    parts += [f"failed: {failures}"] if failures else []
    parts += [f"{format_clock(progress.eta_s)} left"] if progress.eta_s is not None else []
    return parts


def latencies(progress: Progress, labels: Mapping[int, str]) -> list[str]:
    parts = []
    for units, best_s in progress.best_s.items():
        gain = format_gain(progress.untuned_s.get(units), best_s)
        name = labels.get(units, f"{units} units")
        parts.append(f"best on {name}: {format_seconds(best_s)} ({gain} untuned)")
    return parts


def plan_table(planned: Planned) -> Table:
    """Tasks and budget of a run before its first trial."""
    table = Table("task", box=None, pad_edge=False)
    for heading in ("weight", "MFLOP", "known", "trials"):
        table.add_column(heading, justify="right")
    for task in planned.tasks:
        flops = f"{task.flops / 1e6:.1f}"
        numbers = (str(task.weight), flops, str(task.known), str(task.planned_trials))
        table.add_row(_shorten(task.name), *numbers)
    return table


def task_table(tasks: Sequence[TaskResult], labels: Mapping[int, str], rows: int | None) -> Table:
    """The closing table: a row a task, three columns a share; the cheapest tasks are left out."""
    units = list(dict.fromkeys(task.units for task in tasks))
    table = Table("task", box=None, pad_edge=False)
    for heading in ("weight", "trials"):
        table.add_column(heading, justify="right")
    for unit in units:
        where = f"\n{labels.get(unit, f'{unit} units')}" if len(units) > 1 else ""
        for heading in ("untuned", "tuned", "gain"):
            table.add_column(heading + where, justify="right")
    by_name: dict[str, dict[int, TaskResult]] = {}
    for task in tasks:
        by_name.setdefault(task.name, {})[task.units] = task
    costs = {name: _cost(group.values()) for name, group in by_name.items()}
    order = sorted(by_name, key=lambda name: -costs[name])
    for name in order[:rows]:
        group = by_name[name]
        one = next(iter(group.values()))
        cells = [_shorten(name), str(one.weight), str(one.trials)]
        for unit in units:
            found = group.get(unit)
            untuned_s = None if found is None else found.untuned_s
            tuned_s = None if found is None else found.tuned_s
            gain = format_gain(untuned_s, tuned_s)
            cells += [format_seconds(untuned_s), format_seconds(tuned_s), gain]
        table.add_row(*cells)
    hidden = len(order) - len(order[:rows])
    if hidden:
        table.add_row(f"... and {hidden} cheaper tasks (all with -v)")
    return table


def _cost(group: Iterable[TaskResult]) -> float:
    return sum(task.weight * (task.untuned_s or task.tuned_s or 0.0) for task in group)


def reordered_line(finished: Finished) -> str:
    """How far the quick measurements of the search were to be trusted."""
    again = finished.reordered
    if again is None:
        return ""
    changed = f"another kernel was the best for {again.changed}" if again.changed else "same order"
    cost = f", by up to {100 * again.regret:.1f} %" if again.changed else ""
    return f"measured again alone: {again.tasks} tasks, {changed}{cost}"


def closing_lines(finished: Finished, verbose: bool) -> list[str]:
    """What to read last: latency before and after, where the library is, how to load it."""
    trials = f"{finished.trials} trials in {format_clock(finished.elapsed_s)}"
    reason = "interrupted" if finished.interrupted else f"stopped by {finished.stopped_by}"
    failures = format_failures(finished.failures)
    lines = [f"{trials}, {reason}" + (f"; failed: {failures}" if failures else "")]
    if verbose and finished.core_seconds:
        parts = (f"{name} {spent:.1f} s" for name, spent in finished.core_seconds.items())
        lines.append(f"core time: {', '.join(parts)}")
    if verbose and (again := reordered_line(finished)):
        lines.append(again)
    lines += [share_line(share) for share in finished.shares]
    if finished.output is None:
        return [*lines, "nothing was exported; run the same command again to continue"]
    return [
        *lines,
        f"library: {finished.output}",
        f"run it:  tune run {finished.output}",
        f'load it: lib = gpu_aware_tune.load("{finished.output}"); outputs = lib(inputs)',
    ]


def share_line(share: ShareResult) -> str:
    """One share's model latency before and after, and whether its numbers were checked."""
    gain = format_gain(share.untuned_s, share.tuned_s)
    error = "" if share.max_error is None else f", largest error {share.max_error:.1e}"
    checked = f"verified{error}" if share.verified else "not verified"
    before, after = format_seconds(share.untuned_s), format_seconds(share.tuned_s)
    loss = "" if share.loss is None else f", {100 * share.loss:.1f} % above kernels of its own"
    return f"{share.share}: {before} untuned -> {after} tuned ({gain}){loss}, {checked}"


def _shorten(name: str, width: int = 48) -> str:
    return name if len(name) <= width else f"{name[: width - 21]}...{name[-18:]}"
