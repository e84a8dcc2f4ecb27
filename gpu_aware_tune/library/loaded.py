"""A tuned model, ready to be called: the library for the units that are there, and for others."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from gpu_aware_tune.errors import UserError, last_line
from gpu_aware_tune.library.arguments import check_effort, check_inputs, check_units
from gpu_aware_tune.library.checks import (
    check_library,
    check_versions,
    nearest,
    open_shared,
    visible_units,
)
from gpu_aware_tune.library.latency import LatencyStats
from gpu_aware_tune.library.manifest import Manifest, read_manifest
from gpu_aware_tune.library.places import CorePlaces, PartitionPlaces, places_for
from gpu_aware_tune.library.program import Program, Weights, open_vm
from gpu_aware_tune.library.threads import CoreThread, PartitionThread, check_process, run_apart
from gpu_aware_tune.model.importer import random_inputs

Result = TypeVar("Result")


@dataclass(frozen=True)
class _OpenShare:
    """A program and the thread it runs in; no two lanes share a program, which is not reentrant.

    A closed library has no program.
    """

    units: int
    program: Program | None
    thread: CoreThread | PartitionThread


class Library:
    """A tuned model, with a library for each share it was tuned for.

    Called with one array per input it gives one array per output. It starts with the library that
    `load` chose; `use` switches to another one, also while calls are under way. On a CPU a library
    runs in a thread of its own, on as many cores as it is used for (see `CoreThread`), so several
    can be used in one process, and the caller's threads keep their cores. On a GPU it runs in a
    thread inside the partition that the manifest names (see `PartitionThread`), and the libraries
    of a process take turns. Calls wait for each other. The threads end with `close`, with the block
    of `with load(...) as library`, or with the library.

    A library belongs to the process that loaded it: a child that is forked loads its own.

    `about` is the manifest; `manifest` is the same as a dictionary, as in the file.

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
        self,
        path: Path,
        manifest: Manifest,
        units: int | None,
        partition: str | None = None,
        beside: Library | None = None,
    ) -> None:
        """Open the library for a share; see `load`.

        `beside` is one of the same model at another batch size, which lends its threads and, where
        they are the same, its weights.
        """
        self.path = path
        self.about = manifest
        self.inputs, self.outputs = manifest.inputs, manifest.outputs
        self._process = os.getpid()
        self._partition = partition
        same = beside is not None and beside.about.weights.sha256 == manifest.weights.sha256
        self._weights: Weights = (
            beside._weights if beside and same else Weights(path / manifest.weights.file)
        )
        self._closed = False
        self._switching = threading.Lock()
        self._lanes: dict[tuple[str, str, CoreThread | PartitionThread], _OpenShare] = {}
        self._owns_places = beside is None  # it ends the threads; others only use them
        self._places: CorePlaces | PartitionPlaces = (
            beside._places if beside else places_for(path, manifest, partition)
        )
        # At the end of the process the threads end otherwise: see `threads`.
        if self._owns_places:
            weakref.finalize(self, self._places.stop).atexit = False
        open_shared(path, manifest)
        try:
            self._lane = self._open_for(units)
        except BaseException:
            if self._owns_places:
                self._places.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
            UserError: `units` is no whole number from 1 on, the library is closed or of this
                process's parent, its file is damaged, or the GPU has no partition of so many SMs.
            SetupError: the partition cannot be had.
        """
        seen = visible_units(self.about) if units is None else check_units(units)
        self._check_open()
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
        inputs = list(random_inputs(self.about.inputs, seed=0).values())
        self._check_open()
        for units in self.about.units:
            with self._switching:
                self._check_open()
                lane = self._open(units, units)
            _run(lane, lambda program: program(program.place(inputs)))
        return self

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the model once.

        Args:
            inputs: an array for each of `self.inputs`, of its shape and type: of NumPy, or what
                gives its content through DLPack, such as tensors of TVM and PyTorch.

        Returns:
            An array for each of `self.outputs`.

        Raises:
            UserError: an array is missing, unknown, or of another shape or type; the library is
                closed, was loaded before this process was forked, or fails.
        """
        arrays = check_inputs(self.about.inputs, inputs)
        results = self._run(lambda program: program(program.place(arrays)))
        if len(results) != len(self.outputs):
            raise _failed(f"it gave {len(results)} outputs, not {len(self.outputs)}")
        return {spec.name: array for spec, array in zip(self.outputs, results, strict=True)}

    def benchmark(
        self,
        repeat: int | None = None,
        seconds: float = 2.0,
        inputs: Mapping[str, Any] | None = None,
    ) -> LatencyStats:
        """Time inferences one after the other; inputs and weights are on the device before.

        Args:
            repeat: how many; by default as many as fit into `seconds`.
            seconds: how long to go on where `repeat` is not given.
            inputs: what to run on, as for a call; seeded random arrays by default.

        Raises:
            UserError: as for a call, or `repeat` or `seconds` is not above 0.
        """
        count = check_effort(repeat, seconds)
        given = random_inputs(self.about.inputs, seed=0) if inputs is None else inputs
        arrays = check_inputs(self.about.inputs, given)
        named = {spec.name: array for spec, array in zip(self.inputs, arrays, strict=True)}
        self._check_open()
        thread = self._lane.thread

        def measure(program: Program) -> list[float]:
            timer = program.timer(named, lambda: thread.is_ending)
            if count is None:
                return timer(seconds)
            return [timer(0.0)[0] for run in range(count) if run == 0 or not thread.is_ending]

        return LatencyStats.of(self._run(measure))

    def close(self) -> None:
        """End the library's threads after what they have been given; it cannot be called afterwards.

        This waits until they have ended, and on a GPU have closed their partitions; then the memory
        is given back. In a child that was forked it does nothing.
        """
        if self._process != os.getpid():
            return
        with self._switching:
            self._closed = True
            if self._owns_places:
                self._places.close()
            self._lanes.clear()
            self._weights.drop()
            self._lane = dataclasses.replace(self._lane, program=None)
        _return_memory()

    def _run(self, function: Callable[[Program], Result]) -> Result:
        self._check_open()
        return _run(
            self._lane, function
        )  # read once: a switch meanwhile is the next call's business

    def _check_open(self) -> None:
        check_process(self._process)
        if self._closed:
            raise UserError(f"{self!r} is closed: load it again")

    def _open_for(self, units: int | None) -> _OpenShare:
        """The library for a share; without one the nearest to what is visible, on its own units."""
        seen = visible_units(self.about) if units is None else check_units(units)
        chosen = nearest(self.about.units, seen)
        return self._open(chosen, chosen if units is None else seen)

    def _open(self, units: int, place: int) -> _OpenShare:
        """The library for `units` on `place` cores or SMs, opened when it is first asked for."""
        library = self.about.library(units)
        file, entry = library.file, library.entry
        thread = self._places.thread_for(place)
        lane = self._lanes.get((file, entry, thread))
        if lane is None:
            check_library(self.path, self.about, units)
            program = self._program(file, entry, thread)
            lane = self._lanes[file, entry, thread] = _OpenShare(units, program, thread)
        return lane if lane.units == units else dataclasses.replace(lane, units=units)

    def _program(self, file: str, entry: str, thread: CoreThread | PartitionThread) -> Program:
        path, weights = self.path / file, self._weights
        if isinstance(thread, CoreThread):
            return run_apart(lambda: open_vm(path, weights, entry=entry))
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
        UserError: the folder is missing, damaged, or was made by other versions, `units` is no whole
            number from 1 on, or the GPU has no such partition.
        SetupError: the device it was tuned for is not there, or its share is one that this process
            would have to be started in.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_versions(path, manifest)
    library: Library
    if manifest.batches:
        from gpu_aware_tune.library.batched import BatchedLibrary

        library = BatchedLibrary(path, manifest, units, partition)
    elif manifest.further_shapes:
        from gpu_aware_tune.library.several_shapes import ShapesLibrary

        library = ShapesLibrary(path, manifest, units, partition)
    else:
        library = Library(path, manifest, units, partition)
    return library.preload() if preload else library


def _run(lane: _OpenShare, function: Callable[[Program], Result]) -> Result:
    program = lane.program
    if program is None:  # closed meanwhile
        raise UserError("the library is closed: load it again")
    try:
        return lane.thread.run(lambda: function(program))
    except (ValueError, TypeError, RuntimeError) as error:  # TVM's; the arrays were checked before
        raise _failed(last_line(error)) from error


def _failed(text: str) -> UserError:
    return UserError(
        f"the library failed ({text}): load it again; if that does not help, tune again"
    )


def _return_memory() -> None:
    """Give what was freed back to the system: glibc keeps it in the heap of each thread that there was."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # other C libraries have none
        libc.malloc_trim(0)
