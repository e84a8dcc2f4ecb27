"""What a tuned model's folder says of itself: `manifest.json`, its one reader and its one writer.

Reading it imports no TVM. Format 2 has a checksum over the manifest; folders of format 1 have none,
and may lack what `RunFacts` has defaults for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.files import read_regular
from gpu_aware_tune.library.json_fields import FieldError, Fields, finite, parse_object
from gpu_aware_tune.library.recovery import restore
from gpu_aware_tune.model.importer import TensorSpec
from gpu_aware_tune.settings import MANIFEST

FORMAT = 2
LARGEST_BYTES = 16 << 20  # of a manifest

_MOST_UNITS = 1_000_000
_MOST_BYTES = 1 << 50
_MOST_ELEMENTS = (1 << 31) - 1  # of a tensor: TVM's kernels count with 32 bits
_COMPUTED = -1  # an output's extent that only the call knows; an input has none
_MOST_SECONDS = 1e6
_LARGEST = 1e300  # of an error, which is a ratio
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[^./\\\0][^/\\\0]{0,200}")  # a plain name within the folder, not hidden
_ENTRY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")
_CPU = re.compile(r"[A-Za-z0-9._+-]{1,100}")
_DTYPES = frozenset(
    ["bool", "bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (4, 8, 16, 32, 64)]
)


@dataclass(frozen=True)
class FileEntry:
    """A file of the folder: its name there, and what identifies its content."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LibraryEntry:
    """The library for some units: its file, and its function in there; shares may share both."""

    units: int
    file: str
    bytes: int
    sha256: str
    entry: str = "main"


@dataclass(frozen=True)
class ModelId:
    """The model's name, and the hash of the ONNX graph it was compiled from."""

    name: str
    hash: str


@dataclass(frozen=True)
class OutputError:
    """An output's largest relative error in the verification, and what was allowed."""

    name: str
    error: float | None
    allowed: float | None


@dataclass(frozen=True)
class Verification:
    """How a share's library was checked: against what, on which draws of inputs, with what result."""

    oracle: str
    draws: tuple[str, ...]
    outputs: tuple[OutputError, ...]
    special: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShareFacts:
    """A share that the model was tuned for, and the whole model's seconds before and after.

    `loss` is what one set of kernels for all shares costs on this one, as a part of the latency;
    `target` is the JSON of a TVM target.
    """

    units: int
    percent: float | None = None
    text: str | None = None
    target: Mapping[str, Any] = field(default_factory=dict)
    untuned_s: float | None = None
    tuned_s: float | None = None
    max_error: float | None = None
    loss: float | None = None
    verification: Verification | None = None


@dataclass(frozen=True)
class TaskFacts:
    """A kernel of the library for some units; `weight` is how often the model calls it."""

    name: str
    hash: str
    units: int
    weight: int
    seconds: float | None = None
    origin: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run knows about its library, besides the model and the files."""

    device: str = "llvm"
    backend: str | None = None
    seed: int | None = None
    objective: str | None = None
    shares: tuple[ShareFacts, ...] = ()
    tasks: tuple[TaskFacts, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest(RunFacts):
    """The content of `manifest.json`; `libraries` are in ascending order of units.

    `batches` are further batch sizes, each with a folder of its own inside (see `batches`), and
    `further_shapes` is the number of further shapes (see `several_shapes`); `threads` is the code of
    the threads that run kernels on a CPU (see `partition.thread_pool`).
    """

    model: ModelId
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    libraries: tuple[LibraryEntry, ...]
    weights: FileEntry
    versions: Mapping[str, str]
    created: str | None = None
    batches: tuple[int, ...] = ()
    further_shapes: int = 0
    threads: FileEntry | None = None
    format: int = FORMAT

    @property
    def units(self) -> list[int]:
        """The units that the folder has libraries for, in ascending order."""
        return [library.units for library in self.libraries]

    @property
    def on_cpu(self) -> bool:
        """Whether the folder is for a CPU; otherwise it is for a CUDA GPU."""
        return not self.device.startswith("cuda")

    def library(self, units: int) -> LibraryEntry:
        """The library for exactly these units, which are among `units`."""
        return next(library for library in self.libraries if library.units == units)

    def target(self, units: int) -> Mapping[str, Any]:
        """The TVM target that the library for these units was compiled for; empty if unknown."""
        return next((share.target for share in self.shares if share.units == units), {})

    def as_dict(self) -> dict[str, Any]:
        """The JSON object, without its checksum."""
        first = ("format", "model", "inputs", "outputs", "libraries", "weights", "versions")
        values = dataclasses.asdict(self)
        ordered = {name: values[name] for name in (*first, "created")} | values
        plain: dict[str, Any] = json.loads(json.dumps(finite(ordered)))
        return plain


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest.

    Raises:
        OSError: the file cannot be written.
    """
    values = manifest.as_dict()
    text = json.dumps({**values, "checksum": _checksum(values)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and check a folder's manifest.

    A folder whose replacement was killed half-way is put back first.

    Raises:
        UserError: there is none, it is damaged, or of a later format.
    """
    if not folder.is_dir() and not restore(folder):
        raise UserError(f"{folder} is no folder: give the folder that `tune MODEL` wrote")
    path = folder / MANIFEST
    try:
        values = parse_object(read_regular(path, LARGEST_BYTES))
        made = values.whole("format", 1, 1 << 53)
        if made > FORMAT:
            raise UserError(
                f"{folder} has format {made}, this version reads up to {FORMAT}: update it"
            )
        if made >= 2 and values.text("checksum") != _checksum(values.value):
            raise FieldError("its content does not have its checksum")
        return _manifest(values, made)
    except FileNotFoundError:
        raise UserError(f"{folder} is no tuned model: it has no {MANIFEST}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): tune again") from error
    except FieldError as error:
        raise UserError(f"{path} is damaged ({error}): tune again") from error


def _checksum(values: Mapping[str, Any]) -> str:
    """The SHA-256 of the canonical JSON: sorted names, no blanks, ASCII, without the checksum."""
    rest = {name: value for name, value in values.items() if name != "checksum"}
    try:
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a number such as 1e999
        raise FieldError("a number in it is too large") from None
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(values: Fields, made: int) -> Manifest:
    model = values.object("model")
    libraries = tuple(sorted(map(_library, values.objects("libraries")), key=lambda e: e.units))
    if not libraries:
        raise FieldError("libraries is empty")
    _check_single("libraries", [str(library.units) for library in libraries])
    versions = values.lines("versions")
    if "tvm" not in versions:
        raise FieldError("versions.tvm is missing")
    return Manifest(
        model=ModelId(model.text("name"), model.text("hash")),
        inputs=_specs(values, "inputs", 0),
        outputs=_specs(values, "outputs", _COMPUTED),
        libraries=libraries,
        weights=_file(values.object("weights")),
        versions=versions,
        created=values.optional("created", values.line),
        batches=values.optional("batches", lambda n: values.wholes(n, 1, _MOST_ELEMENTS)) or (),
        further_shapes=values.optional("further_shapes", lambda n: values.whole(n, 0, 4096)) or 0,
        threads=values.optional("threads", lambda name: _file(values.object(name))),
        format=made,
        device=values.optional("device", values.line) or "llvm",
        backend=values.optional("backend", values.line),
        seed=values.optional("seed", lambda name: values.whole(name, -(1 << 63), 1 << 64)),
        objective=values.optional("objective", values.line),
        shares=values.optional("shares", lambda n: tuple(map(_share, values.objects(n)))) or (),
        tasks=values.optional("tasks", lambda n: tuple(map(_task, values.objects(n)))) or (),
    )


def _specs(values: Fields, name: str, least: int) -> tuple[TensorSpec, ...]:
    specs = tuple(_spec(each, least) for each in values.objects(name))
    _check_single(name, [spec.name for spec in specs])
    return specs


def _spec(values: Fields, least: int) -> TensorSpec:
    shape = values.wholes("shape", least, _MOST_ELEMENTS)
    elements = 1
    for extent in shape:
        elements *= max(extent, 1)
    if elements > _MOST_ELEMENTS:
        raise values.wrong("shape", f"of at most {_MOST_ELEMENTS} elements")
    if values.text("dtype") not in _DTYPES:
        raise values.wrong("dtype", "the name of a type")
    return TensorSpec(values.text("name"), shape, values.text("dtype"))


def _file(values: Fields) -> FileEntry:
    return FileEntry(
        _matching(values, "file", _FILE, "a plain file name"),
        values.whole("bytes", 0, _MOST_BYTES),
        _matching(values, "sha256", _SHA256, "a SHA-256 in hexadecimal"),
    )


def _library(values: Fields) -> LibraryEntry:
    part = _file(values)
    entry = values.optional("entry", lambda n: _matching(values, n, _ENTRY, "a function's name"))
    units = values.whole("units", 1, _MOST_UNITS)
    return LibraryEntry(units, part.file, part.bytes, part.sha256, entry or "main")


def _share(values: Fields) -> ShareFacts:
    target: dict[str, Any] = {}
    if values.value.get("target") is not None:
        described = values.object("target")
        target = described.value
        described.optional("kind", described.line)
        described.optional("mcpu", lambda n: _matching(described, n, _CPU, "a processor's name"))
    return ShareFacts(
        units=values.whole("units", 1, _MOST_UNITS),
        percent=values.optional("percent", lambda name: values.number(name, 0, 100)),
        text=values.optional("text", values.line),
        target=target,
        untuned_s=_optional(values, "untuned_s", 0, _MOST_SECONDS),
        tuned_s=_optional(values, "tuned_s", 0, _MOST_SECONDS),
        max_error=_optional(values, "max_error", 0, _LARGEST),
        loss=_optional(values, "loss", -1, _LARGEST),
        verification=values.optional("verification", lambda n: _verification(values.object(n))),
    )


def _verification(values: Fields) -> Verification:
    return Verification(
        oracle=values.text("oracle"),
        draws=values.texts("draws"),
        outputs=tuple(
            OutputError(
                output.text("name"),
                _optional(output, "error", 0, _LARGEST),
                _optional(output, "allowed", 0, _LARGEST),
            )
            for output in values.objects("outputs")
        ),
        special=values.text("special"),
        notes=values.optional("notes", values.texts) or (),
    )


def _task(values: Fields) -> TaskFacts:
    return TaskFacts(
        name=values.text("name"),
        hash=values.text("hash"),
        units=values.whole("units", 1, _MOST_UNITS),
        weight=values.whole("weight", 1, 1 << 40),
        seconds=_optional(values, "seconds", 0, _MOST_SECONDS),
        origin=values.optional("origin", values.line),
    )


def _optional(values: Fields, name: str, low: float, high: float) -> float | None:
    number: float | None = values.optional(name, lambda name: values.number(name, low, high))
    return number


def _matching(values: Fields, name: str, pattern: re.Pattern[str], wanted: str) -> str:
    text = values.line(name)
    if not pattern.fullmatch(text):
        raise values.wrong(name, wanted)
    return text


def _check_single(where: str, names: list[str]) -> None:
    """Refuse names that are there twice."""
    for name, following in zip(sorted(names), sorted(names)[1:], strict=False):
        if name == following:
            raise FieldError(f"{where} has {name!r} twice")
