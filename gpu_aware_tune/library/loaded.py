"""A tuned model, ready to be called: loading the library for the cores or SMs that are there."""

from __future__ import annotations

import json
import statistics
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tvm
from tvm.target import codegen

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.folder import FORMAT, MANIFEST, WEIGHTS, part_of, versions
from gpu_aware_tune.library.program import Program, open_vm
from gpu_aware_tune.library.threads import CoreThread
from gpu_aware_tune.model import TensorSpec, random_inputs
from gpu_aware_tune.partition.topology import usable_cores

Result = TypeVar("Result")

_CPU = 1  # DLPack's kDLCPU
# Of LLVM's processor features those that code may depend on; the others are advice for tuning.
_INSTRUCTIONS = (
    "sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "popcnt", "lzcnt", "movbe", "gfni", "vaes",
    "vpclmulqdq", "neon", "sve", "dotprod", "fullfp16", "fp16fml", "bf16", "i8mm", "lse",
)  # fmt: skip


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


class Library:
    """A tuned model, loaded for some units of its device.

    Called with one array per input it gives one array per output. On a CPU it runs in a thread of
    its own on `units` cores (see `CoreThread`), so libraries for different units can be used in one
    process, and the caller's threads keep their cores. Calls wait for each other. The thread ends
    with `close`, or with the library.

    The folder needs nothing of this package; with TVM alone a library is run like this::

        import json, numpy as np, tvm
        from tvm import relax
        manifest = json.load(open("model.tuned/manifest.json"))
        device = tvm.cpu()  # or tvm.cuda()
        vm = relax.VirtualMachine(tvm.runtime.load_module("model.tuned/lib-2.so"), device)
        weights = tvm.runtime.load_param_dict_from_file("model.tuned/weights.bin").values()
        packed = vm["main_transform_params"]([weight.copyto(device) for weight in weights])
        x = tvm.runtime.tensor(np.zeros(manifest["inputs"][0]["shape"], "float32"), device)
        y = vm["main"](x, *packed)

    (the weights are packed once, into the layouts that this library's kernels want; set
    TVM_NUM_THREADS to the library's units before, or TVM takes half of the machine's cores).
    """

    def __init__(self, path: Path, manifest: dict[str, Any], units: int, program: Program) -> None:
        self.path = path
        self.manifest = manifest
        self.units = units
        self.inputs = _specs(manifest["inputs"])
        self.outputs = _specs(manifest["outputs"])
        self._program = program
        self._closed = False
        self._cores: CoreThread | None = None
        if program.device.dlpack_device_type() == _CPU:
            self._cores = CoreThread(units)
            weakref.finalize(self, self._cores.stop)

    def __repr__(self) -> str:
        return f"Library({str(self.path)!r}, units={self.units})"

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
        results = self._run(lambda: self._program(self._program.place(arrays)))
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

        def measure() -> list[float]:
            timer = self._program.timer(named)
            return timer(seconds) if repeat is None else [timer(0.0)[0] for _ in range(repeat)]

        return LatencyStats.of(self._run(measure))

    def close(self) -> None:
        """End the library's thread; it cannot be called afterwards."""
        if self._cores is not None:
            self._cores.stop()
        self._closed = True

    def _run(self, function: Callable[[], Result]) -> Result:
        if self._closed:
            raise UserError(f"{self!r} is closed: load it again")
        return function() if self._cores is None else self._cores.run(function)


def load(path: str | Path, units: int | None = None) -> Library:
    """Load a tuned model from its folder.

    Args:
        path: the folder.
        units: which library; by default the one tuned for the number of cores this process may use
            (or SMs this GPU has) that comes nearest.

    Raises:
        UserError: the folder is missing, damaged, or was made by other versions.
        SetupError: the device it was tuned for is not there.
    """
    path = Path(path)
    manifest = read_manifest(path)
    _check_versions(path, manifest)
    libraries = {int(entry["units"]): entry for entry in manifest["libraries"]}
    if units is not None and units not in libraries:
        known = ", ".join(str(count) for count in sorted(libraries))
        raise UserError(f"{path} has no library for {units} units: choose one of {known}")
    chosen = nearest(sorted(libraries), visible_units(manifest)) if units is None else units
    _check_cpu(path, manifest, chosen)
    _check_part(path, libraries[chosen])
    _check_part(path, manifest["weights"])
    program = open_vm(path / libraries[chosen]["file"], path / WEIGHTS)
    return Library(path, manifest, chosen, program)


def nearest(known: list[int], visible: int) -> int:
    """Give the known number of units nearest to what is visible, the smaller of two."""
    return min(known, key=lambda units: (abs(units - visible), units))


def visible_units(manifest: Mapping[str, Any]) -> int:
    """How many units of the manifest's device this process sees."""
    if str(manifest.get("device", "llvm")).startswith("cuda"):
        device = tvm.cuda(0)
        return int(device.multi_processor_count) if device.exist else 0
    return len(usable_cores())


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a folder's manifest.

    Raises:
        UserError: there is none, it is damaged, or of a later format.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give the folder that `tune MODEL` wrote")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        made = int(manifest["format"])
    except FileNotFoundError:
        raise UserError(f"{path} is no tuned model: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / MANIFEST} is damaged ({error}): tune again") from error
    if made > FORMAT:
        raise UserError(f"{path} has format {made}, this version reads up to {FORMAT}: update it")
    missing = {"model", "inputs", "outputs", "libraries", "weights", "versions"} - set(manifest)
    if missing or not manifest["libraries"]:
        named = ", ".join(sorted(missing)) or "libraries"
        raise UserError(f"{path / MANIFEST} is damaged (no {named}): tune again")
    return dict(manifest)


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


def _specs(entries: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(e["name"], tuple(e["shape"]), e["dtype"]) for e in entries)


def _check_versions(path: Path, manifest: Mapping[str, Any]) -> None:
    made, here = manifest["versions"], versions()
    if made.get("tvm") != here["tvm"]:
        raise UserError(
            f"{path} was made with TVM {made.get('tvm')}, this is {here['tvm']}: tune again or"
            f" `pip install apache-tvm=={made.get('tvm')}`"
        )


def _check_cpu(path: Path, manifest: Mapping[str, Any], units: int) -> None:
    """Refuse a library for another processor: an illegal instruction would end this process."""
    shares = [share for share in manifest.get("shares", ()) if share.get("units") == units]
    target = dict(shares[0].get("target", {})) if shares else {}
    wanted, here = target.get("mcpu"), str(codegen.llvm_get_system_cpu())
    if target.get("kind") != "llvm" or not wanted or wanted == here:
        return
    lacking = sorted(_features(wanted) - _features(here))
    if lacking:
        raise UserError(
            f"{path} is compiled for {wanted}; this processor, {here}, lacks"
            f" {', '.join(lacking[:4])}: tune again here, or with --arch {here}"
        )


def _features(cpu: str) -> set[str]:
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})
    names = {str(feature) for feature in codegen.llvm_get_cpu_features(target)}
    return {name for name in names if name.startswith(_INSTRUCTIONS)}


def _check_part(path: Path, entry: Mapping[str, Any]) -> None:
    """Refuse a damaged file before it is mapped and run."""
    file = path / str(entry["file"])
    if not file.is_file():
        raise UserError(f"{path} is incomplete ({entry['file']} is missing): tune again")
    if part_of(file).sha256 != entry["sha256"]:
        raise UserError(f"{file} is damaged (its content has changed): tune again")
