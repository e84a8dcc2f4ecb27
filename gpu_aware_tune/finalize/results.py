"""What a run reports at its end, and what the library's manifest says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gpu_aware_tune.events import Reordered, ShareResult, TaskResult
from gpu_aware_tune.finalize.retiming import Reorder
from gpu_aware_tune.finalize.selection import Choice
from gpu_aware_tune.finalize.verify import VerifyReport
from gpu_aware_tune.library.manifest import (
    OutputError,
    RunFacts,
    ShareFacts,
    TaskFacts,
    Verification,
)
from gpu_aware_tune.records.task_records import TaskRecords

if TYPE_CHECKING:
    from gpu_aware_tune.partition import Device, Share
    from gpu_aware_tune.settings import RunSettings


def task_results(
    choices: Sequence[Choice], records: TaskRecords, trials: Mapping[str, int]
) -> tuple[TaskResult, ...]:
    """The rows of the closing table; `trials` are those of each task, by hash."""
    rows = []
    for choice in choices:
        baseline = records.baseline(choice.task.hash, choice.units)
        rows.append(
            TaskResult(
                name=choice.task.name,
                units=choice.units,
                weight=choice.task.weight,
                trials=trials[choice.task.hash],
                untuned_s=baseline.best_s if baseline else None,
                tuned_s=choice.seconds or None,
                origin=choice.origin,
            )
        )
    return tuple(rows)


def share_results(
    shares: Sequence[Share],
    latency_s: Mapping[tuple[str, int], float],
    reports: Mapping[int, VerifyReport],
    losses: Mapping[int, float],
) -> tuple[ShareResult, ...]:
    """The model's latency on each share, before ("untuned") and after ("tuned")."""
    return tuple(
        ShareResult(
            share=share.describe(),
            units=share.units,
            untuned_s=latency_s.get(("untuned", share.units)),
            tuned_s=latency_s.get(("tuned", share.units)),
            verified=share.units in reports and not reports[share.units].undecided,
            max_error=reports[share.units].max_error if share.units in reports else None,
            loss=losses.get(share.units),
        )
        for share in shares
    )


def losses(choices: Sequence[Choice], records: TaskRecords) -> dict[int, float]:
    """What the chosen kernels cost on each share on top of the fastest ones there, as a part of these."""
    chosen: dict[int, float] = {}
    own: dict[int, float] = {}
    for choice in choices:
        fastest = records.fastest_s(choice.task.hash, choice.units) or choice.seconds
        chosen[choice.units] = chosen.get(choice.units, 0.0) + choice.task.weight * choice.seconds
        own[choice.units] = own.get(choice.units, 0.0) + choice.task.weight * fastest
    return {units: chosen[units] / seconds - 1 for units, seconds in own.items() if seconds}


def manifest(
    device: Device,
    backend: str,
    settings: RunSettings,
    shares: Sequence[Share],
    results: Sequence[ShareResult],
    choices: Sequence[Choice],
    reports: Mapping[int, VerifyReport],
) -> RunFacts:
    """What the exported folder says about the run, besides the model and the files.

    `results` are those of `shares`, in their order; `reports` are of the shares that were verified.
    """
    return RunFacts(
        device=device.key,
        backend=backend,
        seed=settings.seed,
        objective=settings.objective,
        shares=tuple(
            ShareFacts(
                units=share.units,
                percent=share.percent,
                text=share.describe(),
                target=device.target(share.units),
                untuned_s=result.untuned_s,
                tuned_s=result.tuned_s,
                max_error=result.max_error,
                loss=result.loss,
                verification=_verification(reports.get(share.units)),
            )
            for share, result in zip(shares, results, strict=True)
        ),
        tasks=tuple(
            TaskFacts(
                name=choice.task.name,
                hash=choice.task.hash,
                units=choice.units,
                weight=choice.task.weight,
                seconds=choice.seconds,
                origin=choice.origin,
            )
            for choice in choices
        ),
    )


def _verification(report: VerifyReport | None) -> Verification | None:
    """Which oracle, which inputs, which error for each output; None where nothing was verified."""
    if report is None:
        return None
    return Verification(
        oracle=report.oracle,
        draws=tuple(report.draws),
        outputs=tuple(OutputError(o.name, o.error, o.allowed) for o in report.outputs),
        special=report.special,
        notes=tuple(report.notes),
    )


def reordered(reorders: Sequence[Reorder]) -> Reordered | None:
    """Sum up what measuring alone changed; None where nothing was measured again."""
    if not reorders:
        return None
    regret = max(reorder.regret for reorder in reorders)
    return Reordered(len(reorders), sum(reorder.changed for reorder in reorders), regret)
