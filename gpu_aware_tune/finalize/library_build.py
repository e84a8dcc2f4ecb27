"""From chosen kernels to a library on disk: compile, measure before and after, verify, export."""

from __future__ import annotations

import select
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gpu_aware_tune.codegen.build_pool import BuildPool
from gpu_aware_tune.errors import TuneError, last_line
from gpu_aware_tune.finalize.selection import Choice
from gpu_aware_tune.measure.measurement import Failure
from gpu_aware_tune.measure.worker import call
from gpu_aware_tune.workers import WorkerHost

if TYPE_CHECKING:
    import numpy as np

    from gpu_aware_tune.finalize.oracle import Reference
    from gpu_aware_tune.model.draws import DrawKind, DrawPlan
    from gpu_aware_tune.model.importer import Model, TensorSpec
    from gpu_aware_tune.partition import Partition

Key = TypeVar("Key", bound=Hashable)

_LIMIT_S = 600.0  # of a worker that times or runs libraries: one that hangs must not hold the run
ROUNDS = 10
ROUND_S = 0.3


@dataclass(frozen=True)
class LibrarySpec:
    """One library to compile: a model with kernels (traces by task hash) for some units.

    `name` tells several of one model and units apart, such as "tuned" and "untuned".
    """

    model: Model
    name: str
    units: int
    target: Mapping[str, Any]
    traces: Mapping[str, str]


class CompiledLibraries:
    """The libraries that a run has compiled so far: none is compiled twice.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[Hashable, Path] = {}

    def path_of(self, spec: LibrarySpec) -> tuple[Path, bool]:
        """The path of a library, and whether it is there already; if not, the caller writes it."""
        key = (spec.model.hash, spec.units, tuple(sorted(spec.target.items(), key=str)),
               frozenset(spec.traces.items()))  # fmt: skip
        known = self._paths.get(str(key))
        if known is not None:
            return known, known.exists()
        path = self._paths[str(key)] = self._folder / f"library-{len(self._paths)}.so"
        return path, False


def compile_all(
    specs: Sequence[LibrarySpec], builders: BuildPool, compiled: CompiledLibraries
) -> dict[tuple[str, str, int], Path]:
    """Compile libraries side by side in the build workers, each different one once.

    Returns:
        The path of each, by (the model's name, name, units).

    Raises:
        TuneError: a library did not compile, with what TVM said.
    """
    from gpu_aware_tune.kernels.traces import module_to_json

    texts = {id(item.model): module_to_json(item.model.module) for item in specs}
    paths, calls = {}, {}
    for item in specs:
        path, is_there = compiled.path_of(item)
        paths[item.model.name, item.name, item.units] = path
        if not is_there:
            args = (texts[id(item.model)], dict(item.target), dict(item.traces))
            what = f"{item.model.name}: the {item.name} library for {item.units} units"
            calls[path] = _Call(compile_to_file, args, path, what)
    _call_all(builders, calls)
    return paths


def compile_together(
    wanted: Sequence[LibrarySpec], builders: BuildPool, folder: Path
) -> dict[str, Path]:
    """Compile for each model one library that holds all of its shares, equal kernels once.

    It is exported for all of these units, with `entry="main_{units}"`; see `compile.merge_shares`.

    Returns:
        The path of each, by the model's name.

    Raises:
        TuneError: a library did not compile, with what TVM said.
    """
    from gpu_aware_tune.kernels.traces import module_to_json

    shares: dict[str, list[LibrarySpec]] = {}
    for item in wanted:
        shares.setdefault(item.model.name, []).append(item)
    calls = {}
    for number, (name, items) in enumerate(shares.items()):
        path = folder / f"shares-{number}.so"
        described = {item.units: (dict(item.target), dict(item.traces)) for item in items}
        args = (module_to_json(items[0].model.module), described)
        calls[name] = _Call(
            compile_shares_to_file, args, path, f"{name}: the library of all shares"
        )
    return _call_all(builders, calls)


@dataclass(frozen=True)
class _Call:
    """A function for a build worker that writes a library and gives the error's text, or None.

    After its arguments it gets the path, and in how many processes it may compile.
    """

    function: Callable[..., str | None]
    args: tuple[Any, ...]
    path: Path
    what: str


def _call_all(builders: BuildPool, calls: Mapping[Key, _Call]) -> dict[Key, Path]:
    done: dict[Key, Path] = {}
    jobs = max(1, len(builders.workers) // max(1, len(calls)))
    work = {
        key: (call_.function, (*call_.args, str(call_.path), jobs)) for key, call_ in calls.items()
    }
    for key, answer in builders.call_all(work):
        if answer is not None:
            text = answer.text if isinstance(answer, Failure) else answer
            raise TuneError(f"{calls[key].what} did not compile: {text}")
        done[key] = calls[key].path
    return done


def compile_to_file(
    module_json: str, target: dict[str, Any], traces: Mapping[str, str], path: str, jobs: int
) -> str | None:
    """Compile one library (in a worker); gives the error's text, or None."""
    import tvm

    from gpu_aware_tune.codegen.compile import prepare

    wanted = tvm.target.Target(target)
    return _to_file(module_json, target, path, jobs, lambda module: prepare(module, wanted, traces))


def compile_shares_to_file(
    module_json: str,
    shares: Mapping[int, tuple[dict[str, Any], Mapping[str, str]]],
    path: str,
    jobs: int,
) -> str | None:
    """Compile one library for several shares (in a worker); gives the error's text, or None."""
    import tvm

    from gpu_aware_tune.codegen.compile import prepare_shares

    wanted = {units: (tvm.target.Target(t), traces) for units, (t, traces) in shares.items()}
    target, _ = shares[max(shares)]
    return _to_file(module_json, target, path, jobs, lambda module: prepare_shares(module, wanted))


def _to_file(
    module_json: str,
    target: Mapping[str, Any],
    path: str,
    jobs: int,
    prepare: Callable[[Any], Any],
) -> str | None:
    import tvm

    from gpu_aware_tune.codegen.compile import build
    from gpu_aware_tune.codegen.cuda_toolchain import link as link_cubins
    from gpu_aware_tune.codegen.cuda_toolchain import packer
    from gpu_aware_tune.codegen.side_by_side import build_side_by_side
    from gpu_aware_tune.kernels.traces import module_from_json
    from gpu_aware_tune.library import link

    try:
        module, on = prepare(module_from_json(module_json)), tvm.target.Target(dict(target))
        if target["kind"] == "cuda":  # build workers make source; a library holds cubins
            packed = {"fcompile": link_cubins, "fpack_imports": packer(str(target["arch"]))}
            build(module, on).export_library(path, **packed)
            return None
        with tempfile.TemporaryDirectory(dir=Path(path).parent) as parts:
            executable, objects = build_side_by_side(module, on, Path(parts), jobs)
            link(executable, path, objects)
    except Exception as error:  # sent to the parent, which stops the run with it
        return f"{type(error).__name__}: {last_line(error)}"
    return None


def time_on(
    host: WorkerHost,
    partition: Partition,
    libraries: Mapping[str, Path],
    weights: Path,
    model: Model,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Seconds of one inference of each library on a partition, in a worker of its own.

    The libraries take turns, so that drift of the machine meets all of them alike, and the lowest
    tenth of each counts, as for kernels: on a shared machine disturbances only ever add time.
    """
    args = (
        {name: str(path) for name, path in libraries.items()},
        str(weights),
        model.inputs,
        rounds,
    )
    answer: dict[str, float] = _inside(host, partition, time_libraries, args, "timing")
    return answer


def run_on(
    host: WorkerHost,
    partition: Partition,
    library: Path,
    entry: str,
    weights: Path,
    reference: Reference,
) -> list[list[np.ndarray]]:
    """A library's outputs on a partition for each draw of a reference, in a worker of its own.

    A wrong kernel may crash or hang.

    Args:
        library: the `.so`.
        entry: its function, "main_2" for 2 units where it holds several shares.
        weights: the file that `save_weights` wrote.
        reference: whose inputs it gets.
    """
    # The inputs' description, not themselves: what a worker starts with is one small message.
    kinds = tuple(draw.kind for draw in reference.draws)
    args = (str(library), str(weights), entry, reference.plan, kinds)
    answer: list[list[np.ndarray]] = _inside(host, partition, run_library, args, "running")
    return answer


def _inside(
    host: WorkerHost,
    partition: Partition,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    doing: str,
) -> Any:
    """What a function gives in a worker inside a partition; a worker that dies or hangs is an error."""
    worker = host.spawn(call, partition, function, args, env=partition.env())
    why = f"no answer in {_LIMIT_S:.0f} s"
    try:
        if select.select([worker], [], [], _LIMIT_S)[0]:
            return worker.recv()
        partition.before_kill(worker.pid)
    except EOFError:
        why = ""
    finally:
        ended = worker.kill().text
    raise TuneError(f"{doing} the library on {partition} failed: {why or ended}")


def time_libraries(
    libraries: Mapping[str, str], weights: str, specs: Sequence[TensorSpec], rounds: int
) -> dict[str, float]:
    """See `time_on` (in the worker)."""
    from gpu_aware_tune.library import open_vm
    from gpu_aware_tune.measure.timing import percentile_10
    from gpu_aware_tune.model.importer import random_inputs

    inputs = random_inputs(specs, seed=0)
    timers = {name: open_vm(path, weights).timer(inputs) for name, path in libraries.items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].extend(timer(ROUND_S / len(timers)))
    return {name: percentile_10(values) for name, values in samples.items()}


def run_library(
    library: str, weights: str, entry: str, plan: DrawPlan, kinds: Sequence[DrawKind]
) -> list[list[np.ndarray]]:
    """See `run_on` (in the worker)."""
    from gpu_aware_tune.library import open_vm

    program = open_vm(library, weights, entry=entry)
    return [program(program.place(list(plan.arrays(kind).values()))) for kind in kinds]


def traces_of(choices: Sequence[Choice], units: int) -> dict[str, str]:
    """The traces of one share's choices by task hash; unscheduled kernels are left out."""
    return {c.task.hash: c.trace for c in choices if c.units == units and c.trace}
