"""Tune a model in a build pipeline: follow the events, write a summary, fail if it is not good.

    python examples/build_pipeline.py model.onnx --gpu-pct 30,100 --max-ms 5 --summary summary.json

Exit code 0: every library is numerically verified and fast enough; 1: one is not; 2 and 3: the model
or the machine cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gpu_aware_tune import Settings, TuneError, make_settings, tune_events
from gpu_aware_tune.events import Finished, Note, Planned, Progress, Stage


def main() -> int:
    """Tune, write the summary, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--gpu-pct", default="100", help="shares in percent, such as 30,100")
    parser.add_argument("--max-ms", type=float, help="the largest latency allowed on each share")
    parser.add_argument("--summary", type=Path, default=Path("summary.json"))
    parser.add_argument("--quick", action="store_true", help="only a few trials")
    args = parser.parse_args()

    effort = {"effort": "quick", "trials": 4} if args.quick else {}
    try:
        finished = run(args.model, make_settings(gpu_pct=args.gpu_pct, **effort))
    except TuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    args.summary.write_text(json.dumps(summary(finished), indent=1) + "\n")
    bad = faults(finished, args.max_ms)
    for fault in bad:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if bad else 0


def run(model: Path, settings: Settings) -> Finished:
    """Tune one model; print one line for each event of interest."""
    finished = None
    for event in tune_events(model, settings):
        if isinstance(event, Stage):
            print(event.text)
        elif isinstance(event, Note):
            print(f"{event.level}: {event.text}")
        elif isinstance(event, Planned):
            print(f"{len(event.tasks)} tasks, {event.trials} trials, {', '.join(event.shares)}")
        elif isinstance(event, Progress):
            print(f"{event.trials_done} of {event.trials_total} trials")
        elif isinstance(event, Finished):
            finished = event
    assert finished is not None  # a run that was not a dry run ends with it
    return finished


def summary(finished: Finished) -> dict[str, object]:
    """Return what the pipeline keeps of a run, as JSON values."""
    return {
        "model": finished.model,
        "library": None if finished.output is None else str(finished.output),
        "trials": finished.trials,
        "failures": dict(finished.failures),
        "shares": [
            {
                "share": share.share,
                "units": share.units,
                "untuned_ms": milliseconds(share.untuned_s),
                "tuned_ms": milliseconds(share.tuned_s),
                "verified": share.verified,
            }
            for share in finished.shares
        ],
    }


def faults(finished: Finished, max_ms: float | None) -> list[str]:
    """Return why the libraries must not be shipped; empty if they may be."""
    if finished.output is None:
        return [f"{finished.model}: no library was exported"]
    found = []
    for share in finished.shares:
        if not share.verified:
            found.append(f"{share.share}: the numbers were not verified")
        tuned_ms = milliseconds(share.tuned_s)
        if max_ms is not None and (tuned_ms is None or tuned_ms > max_ms):
            found.append(f"{share.share}: {tuned_ms} ms, at most {max_ms} ms are allowed")
    return found


def milliseconds(seconds: float | None) -> float | None:
    """Convert seconds, rounded to a microsecond; None stays None."""
    return None if seconds is None else round(1e3 * seconds, 3)


if __name__ == "__main__":
    raise SystemExit(main())
