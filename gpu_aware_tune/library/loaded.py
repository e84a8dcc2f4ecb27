"""A tuned model, ready to be called: the library for the units that are there, and for others."""

from __future__ import annotations

import dataclasses
import statistics
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.checks import (
    check_library,
    check_versions,
    check_weights,
    nearest,
    visible_units,
)
from gpu_aware_tune.library.manifest import Manifest, read_manifest
from gpu_aware_tune.library.places import places_for
from gpu_aware_tune.library.program import Program, Weights, open_vm
from gpu_aware_tune.library.threads import CoreThread, PartitionThread
from gpu_aware_tune.model.importer import TensorSpec, random_inputs

Result = TypeVar("Result")


@dataclass(frozen=True)
class LatencyStats:
    """Milliseconds of one inference over `n` runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    mean_ms: float
    n: int

    @staticmethod
    def of(seconds: list[float]) -> LatencyStats:
        """Sum up the seconds of single runs."""
        ms = np.asarray(seconds) * 1e3
        p10, p90 = (float(value) for value in np.percentile(ms, (10, 90)))
        return LatencyStats(
            statistics.median(ms.tolist()), p10, p90, float(ms.min()), float(ms.mean()), len(ms)
        )


@dataclass(frozen=True)
class _Lane:
    """A program and the thread it runs in; no two lanes share a program, which is not reentrant."""

    units: int
    program: Program
    thread: CoreThread | PartitionThread


class Library:
    """A tuned model, with a library for each share it was tuned for.

    Called with one array per input it gives one array per output. It starts with the library that
    `load` chose; `use` switches to another one, also while calls are under way. On a CPU a library
    runs in a thread of its own, on as many cores as it is used for (see `CoreThread`), so several
    can be used in one process, and the caller's threads keep their cores. On a GPU it runs in a
    thread inside the partition that the manifest names (see `PartitionThread`), and the libraries
    of a process take turns. Calls wait for each other. The threads end with `close`, or with the
    library.

    The folder needs nothing of this package; with TVM alone a library is run like this::

        import json, numpy as np, tvm
        from tvm import relax
        manifest = json.load(open("model.tuned/manifest.json"))
        chosen = {each["units"]: each for each in manifest["libraries"]}[2]
        device = tvm.cpu()  # or tvm.cuda()
        shared = tvm.runtime.load_module("model.tuned/" + chosen["file"])
        vm = relax.VirtualMachine(shared, device)
        weights = tvm.runtime.load_param_dict_from_file("model.tuned/weights.bin").values()
        pack = vm[chosen["entry"].replace("main", "main_transform_params")]
        packed = pack([weight.copyto(device) for weight in weights])
        x = tvm.runtime.tensor(np.zeros(manifest["inputs"][0]["shape"], "float32"), device)
        y = vm[chosen["entry"]](x, *packed)

    (the weights are packed once, into the layouts that this library's kernels want; set
    TVM_NUM_THREADS to the library's units before, or TVM takes half of the machine's cores).
    """

    def __init__(
        self, path: Path, manifest: Manifest, units: int | None, partition: str | None = None
    ) -> None:
        """Open the library for a share; see `load`."""
        self.path = path
        self.about = manifest
        self.inputs, self.outputs = manifest.inputs, manifest.outputs
        self._weights = Weights(path / manifest.weights.file)
        self._closed = False
        self._switching = threading.Lock()
        self._lanes: dict[tuple[str, str, CoreThread | PartitionThread], _Lane] = {}
        self._places = places_for(path, manifest, partition)
        # A process that ends does not wait for a GPU: the driver takes everything back.
        weakref.finalize(self, self._places.stop).atexit = manifest.on_cpu
        check_weights(path, manifest)
        self._lane = self._open_for(units)

    def __repr__(self) -> str:
        return f"Library({str(self.path)!r}, units={self.units})"

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as the file has it, without its checksum."""
        return self.about.as_dict()

    @property
    def units(self) -> int:
        """The units that the library in use was tuned for."""
        return self._lane.units

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores that the library in use runs on; empty on a GPU."""
        return self._lane.thread.cores

    @property
    def evidence(self) -> dict[str, Any]:
        """What the check of the GPU's partition in use has seen; empty on a CPU."""
        thread = self._lane.thread
        return dict(thread.evidence) if isinstance(thread, PartitionThread) else {}

    def use(self, units: int | None = None) -> Library:
        """Switch to the library for a share, as when the share has changed.

        A call that is under way finishes on the library it began with, every later one runs on the
        new one; none waits for the switch, not even while a library is being opened. Once a library
        is open (see `preload`), switching to it takes microseconds.

        On a CPU the library also runs on that many cores from then on, or on all that are visible
        where those are fewer. On a GPU it runs on that many SMs in a green context, or on all that
        are visible. Under MPS and in a MIG instance, and with partition "full", the SMs stay as
        they are and only the code changes. Opening a library uses the GPU, so calls wait for it.

        Args:
            units: the cores or SMs of the new share; the library tuned for the nearest number is
                taken. By default what this process really sees now.

        Returns:
            The library itself.

        Raises:
            UserError: `units` is below 1, the library is closed, its file is damaged, or the GPU
                has no partition of so many SMs.
            SetupError: the partition cannot be had.
        """
        seen = visible_units(self.about) if units is None else units
        with self._switching:
            self._check_open()
            self._lane = self._open_for(seen)
        return self

    def preload(self) -> Library:
        """Open the libraries of all shares and run each once, so that no later switch has to wait.

        Returns:
            The library itself; which share is in use does not change.

        Raises:
            UserError: a library's file is damaged.
        """
        inputs = list(random_inputs(self.inputs, seed=0).values())
        for units in self.about.units:
            with self._switching:
                self._check_open()
                lane = self._open(units, units)
            _run_once(lane, inputs)
        return self

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model once.

        Args:
            inputs: an array for each of `self.inputs`, of its shape and type.

        Returns:
            An array for each of `self.outputs`.

        Raises:
            UserError: an array is missing, unknown, or of another shape or type.
        """
        arrays = check_inputs(self.inputs, inputs)
        results = self._run(lambda program: program(program.place(arrays)))
        return {spec.name: array for spec, array in zip(self.outputs, results, strict=True)}

    def benchmark(
        self,
        repeat: int | None = None,
        seconds: float = 2.0,
        inputs: Mapping[str, np.ndarray] | None = None,
    ) -> LatencyStats:
        """Time inferences one after the other; inputs and weights are on the device before.

        Args:
            repeat: how many; by default as many as fit into `seconds`.
            seconds: how long to go on where `repeat` is not given.
            inputs: what to run on; seeded random arrays by default.
        """
        arrays = check_inputs(self.inputs, inputs or random_inputs(self.inputs, seed=0))
        named = {spec.name: array for spec, array in zip(self.inputs, arrays, strict=True)}

        def measure(program: Program) -> list[float]:
            timer = program.timer(named)
            return timer(seconds) if repeat is None else [timer(0.0)[0] for _ in range(repeat)]

        return LatencyStats.of(self._run(measure))

    def close(self) -> None:
        """End the library's threads after what they are doing; it cannot be called afterwards.

        On a GPU this waits until they have closed their partitions.
        """
        with self._switching:
            self._closed = True
            self._places.close()

    def _run(self, function: Callable[[Program], Result]) -> Result:
        self._check_open()
        lane = self._lane  # read once: a switch meanwhile is the next call's business
        return lane.thread.run(lambda: function(lane.program))

    def _check_open(self) -> None:
        if self._closed:
            raise UserError(f"{self!r} is closed: load it again")

    def _open_for(self, units: int | None) -> _Lane:
        """The library for a share; without one the nearest to what is visible, on its own units."""
        if units is not None and units < 1:
            raise UserError(f"{units} units: a share has at least 1")
        seen = visible_units(self.about) if units is None else units
        chosen = nearest(self.about.units, seen)
        return self._open(chosen, chosen if units is None else units)

    def _open(self, units: int, place: int) -> _Lane:
        """The library for `units` on `place` cores or SMs, opened when it is first asked for."""
        library = self.about.library(units)
        file, entry = library.file, library.entry
        thread = self._places.thread_for(place)
        lane = self._lanes.get((file, entry, thread))
        if lane is None:
            check_library(self.path, self.about, units)
            program = self._program(file, entry, thread)
            lane = self._lanes[file, entry, thread] = _Lane(units, program, thread)
        return lane if lane.units == units else dataclasses.replace(lane, units=units)

    def _program(self, file: str, entry: str, thread: CoreThread | PartitionThread) -> Program:
        path, weights = self.path / file, self._weights
        if isinstance(thread, CoreThread):
            return open_vm(path, weights, entry=entry)
        return thread.run(lambda: open_vm(path, weights, entry=entry))  # kernels pack the weights


def load(
    path: str | Path,
    units: int | None = None,
    preload: bool = False,
    partition: str | None = None,
) -> Library:
    """Load a tuned model from its folder.

    Args:
        path: the folder.
        units: the cores or SMs to run on, as for `Library.use`: the library tuned for the nearest
            number is taken. By default the one tuned for the number of cores this process may use
            (or SMs this GPU has) that comes nearest, on the number it was tuned for.
        preload: open the libraries of the other shares too, for `Library.use`; the weights are
            shared, so this costs little memory.
        partition: how a GPU is shared, in place of what the library was tuned with: "green", "mps",
            "mig", or "full" for all that this process sees.

    Raises:
        UserError: the folder is missing, damaged, or was made by other versions, `units` is below 1,
            or the GPU has no such partition.
        SetupError: the device it was tuned for is not there, or its share is one that this process
            would have to be started in.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_versions(path, manifest)
    library = Library(path, manifest, units, partition)
    return library.preload() if preload else library


def check_inputs(
    specs: tuple[TensorSpec, ...], inputs: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Give the arrays in the order of `specs`.

    Raises:
        UserError: one is missing, unknown, or of another shape or type.
    """
    names = ", ".join(spec.name for spec in specs)
    for name in inputs:
        if name not in {spec.name for spec in specs}:
            raise UserError(f"unknown input {name!r}: the inputs are {names}")
    arrays = []
    for spec in specs:
        if spec.name not in inputs:
            raise UserError(f"input {spec.name!r} is missing: the inputs are {names}")
        array = np.asarray(inputs[spec.name])
        if str(array.dtype) != spec.dtype:
            raise UserError(f"input {spec.name!r} has type {array.dtype}: it must be {spec.dtype}")
        wanted = spec.shape
        if array.ndim != len(wanted) or any(
            w not in (-1, a) for w, a in zip(wanted, array.shape, strict=True)
        ):
            shown = "x".join(str(extent) for extent in array.shape) or "scalar"
            shape = "x".join("?" if w == -1 else str(w) for w in wanted) or "scalar"
            raise UserError(f"input {spec.name!r} has shape {shown}: it must be {shape}")
        arrays.append(array)
    return arrays


def _run_once(lane: _Lane, inputs: list[np.ndarray]) -> None:
    lane.thread.run(lambda: lane.program(lane.program.place(inputs)))
