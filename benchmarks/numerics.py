"""Are the numbers right? Every light model and slim-320, untuned and tuned, against ONNX Runtime.

    python -m benchmarks.numerics                    # all ten models; about half an hour on two cores
    python -m benchmarks.numerics --models squeezenet,slim-320

Weights are seeded random ones (slim-320 has its own). Errors are relative to the largest reference
value; float32 models are allowed 5e-4, see gpu_aware_tune/verify.py. A finished model is kept in the
results file, and a second call goes on with the others.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, environment, stamp, write_results
from benchmarks.light_models import light_models
from benchmarks.model_latency import SLIM, SLIM_NAME, compiled, model_file
from benchmarks.scaffold import parser
from gpu_aware_tune.events import Finished
from gpu_aware_tune.settings import Settings

RESULTS_FILE = RESULTS / "numerics.json"


def main() -> None:
    """Check the models that the results file does not have yet, then print all."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--models", default=",".join([*light_models(), SLIM_NAME]), metavar="A,B")
    command.add_argument("--slim", type=Path, default=SLIM)
    command.add_argument("--trials", type=int, default=48)
    args = command.parse_args()
    done = json.loads(args.results.read_text())["models"] if args.results.exists() else {}
    wanted, known = args.models.split(","), [*light_models(), SLIM_NAME]
    if unknown := set(wanted) - set(known):
        command.error(f"--models {','.join(sorted(unknown))}: choose of {', '.join(known)}")
    if SLIM_NAME in wanted and SLIM_NAME not in done and not args.slim.is_file():
        wanted.remove(SLIM_NAME)
        print(f"{SLIM_NAME}: left out, {args.slim} is missing (give --slim)")
    for name in wanted:
        if name not in done:
            about = environment()
            row = check(name, args.slim, args.trials)
            done[name] = {**row, "measured": stamp(about)}
            write_results(args.results, about, {"models": done})
            show(name, row)
    print("\nmodel           untuned    tuned      allowed")
    for name, row in done.items():
        show(name, row)
    if any(not row["ok"] for row in done.values()):
        raise SystemExit("FAILED: an error is above what is allowed")


def show(name: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    untuned, tuned = row["untuned"]["ONNX Runtime"], row["tuned"]["ONNX Runtime"]
    print(f"{name:15} {untuned:.1e}    {tuned:.1e}    {row['allowed']:.0e}", flush=True)


def check(name: str, slim: Path, trials: int) -> dict[str, Any]:
    """Tune one model briefly; compare its untuned and its tuned library with ONNX Runtime."""
    import tvm

    from gpu_aware_tune.finalize.verify import verify_library
    from gpu_aware_tune.model.importer import load_model
    from gpu_aware_tune.tuning import tune_events
    from gpu_aware_tune.workers.warm import load_tvm

    load_tvm()
    with tempfile.TemporaryDirectory(prefix="numerics-") as folder:
        path = model_file(name, slim, Path(folder))
        output = Path(folder) / "out"
        how = Settings(target="llvm", trials=trials, db=Path(folder) / "db", output=output)
        finished = [event for event in tune_events(path, how) if isinstance(event, Finished)][-1]
        manifest = json.loads((output / "manifest.json").read_text())
        target = tvm.target.Target(manifest["shares"][0]["target"])
        model = load_model(path, target)
        tuned = verify_library(model, output / f"lib-{finished.shares[0].units}.so", seed=7)
        shared = compiled(model, target, "untuned", Path(folder) / "untuned.so")
        untuned = verify_library(model, shared, seed=7)
    return {
        "ok": tuned.ok and untuned.ok,
        "allowed": tuned.allowed,
        "tuned": dict(tuned.errors),
        "untuned": dict(untuned.errors),
        "trials": finished.trials,
    }


if __name__ == "__main__":
    main()
