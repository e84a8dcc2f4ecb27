"""What a run was asked to do: frozen settings, effort presets, and parsers of the flags."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.input_shapes import Shapes, check_shape, parse_inputs

TARGETS = ("auto", "cuda", "llvm")
NULL_TARGET = "null"  # the fake device of the tests; not offered to users
TF32 = "tf32"  # float32 whose products may be computed in TF32
DTYPES = ("float16", "float32", TF32)
PARTITIONS = ("auto", "cores", "full", "green", "mps", "mig", "null")
RECORDS_FILE = "records.sqlite"
MANIFEST = "manifest.json"  # what a tuned model's folder is known by


class Objective(StrEnum):
    """What a search minimises when a model is tuned for several shares; see `search.objectives`."""

    SHARE = "share"
    ROBUST = "robust"
    MEAN = "mean"
    THROUGHPUT = "throughput"

    @property
    def one_set(self) -> bool:
        """Whether all shares get one set of kernels."""
        return self in (Objective.ROBUST, Objective.MEAN)


class ShareRule(StrEnum):
    """Where a model's share comes from if no percentage is given."""

    EQUAL = "equal"  # parts of the device, for several models
    AUTO = "auto"  # likewise, by their work
    KNEE = "knee"  # of the model's own curve: `--gpu-pct auto`


OBJECTIVES = tuple(Objective)
SHARES = (ShareRule.EQUAL, ShareRule.AUTO)


@dataclass(frozen=True)
class EffortPreset:
    """How hard a run tries where no flag says otherwise.

    `trials` is for the whole model, `patience` the number of trials without a better model latency
    after which a run stops (0 = never), `measure_s` the most seconds one candidate is timed for on
    one share.
    """

    trials: int
    population: int
    generations: int
    trials_per_iteration: int
    patience: int
    measure_s: float


EFFORTS: Mapping[str, EffortPreset] = {
    "quick": EffortPreset(64, 24, 1, 8, 0, 0.03),
    "default": EffortPreset(512, 32, 1, 16, 0, 0.05),
    "full": EffortPreset(2048, 96, 3, 16, 1024, 0.1),
}


@dataclass(frozen=True)
class RunSettings:
    """What holds for a whole run, whichever models it tunes; stored with the run.

    Fields left at None or 0 that `EffortPreset` knows are filled from `effort`, so finished settings
    always show the numbers used. `trials` stays None only where `time_s` alone limits the run.
    To change the effort of existing settings make new ones: `replace` keeps the filled numbers.

    `time_s` is for the whole run, import, baseline and verification included. `slices` is how many
    measure side by side, 0: one for each model. `exclusive` measures one candidate at a time with
    nothing else running. `ray` spreads the search over a Ray cluster: "auto" or HOST:PORT.
    """

    objective: Objective = Objective.SHARE
    target: str = "auto"
    arch: str | None = None
    device: int = 0
    trials: int | None = None
    time_s: float | None = None
    effort: str = "default"
    patience: int | None = None
    db: Path = Path("tuning_logs")
    seed: int = 0
    resume: bool = True
    verify: bool = True
    partition: str = "auto"
    dry_run: bool = False
    max_trials_per_task: int | None = None
    trials_per_iteration: int = 0
    population: int = 0
    generations: int = 0
    measure_s: float = 0.0
    top_k: int = 3
    import_timeout_s: float = 600.0
    build_timeout_s: float = 30.0
    run_timeout_s: float = 10.0
    memory_limit_mb: int = 4096
    slices: int = 0
    exclusive: bool = False
    ray: str | None = None

    def __post_init__(self) -> None:
        _check_choice("--effort", self.effort, tuple(EFFORTS))
        self._fill_from_effort()
        if self.target != NULL_TARGET:
            _check_choice("--target", self.target, TARGETS)
        _check_choice("--partition", self.partition, PARTITIONS)
        _check_choice("--objective", self.objective, OBJECTIVES)
        object.__setattr__(self, "objective", Objective(self.objective))
        if self.ray is not None:
            check_ray(self.ray)
        for flag, value, lowest in self._bounded():
            _check_number(flag, value, lowest)

    def _fill_from_effort(self) -> None:
        effort = EFFORTS[self.effort]
        for item in dataclasses.fields(effort):
            if item.name == "trials" and self.time_s is not None:
                continue  # a run limited by time takes as many trials as fit
            given = getattr(self, item.name)  # 0 means "not given" except where 0 has a meaning
            if given is None or (given == 0 and item.name not in ("trials", "patience")):
                object.__setattr__(self, item.name, getattr(effort, item.name))

    def _bounded(self) -> tuple[tuple[str, float | None, float], ...]:
        return (
            ("--device", self.device, 0),
            ("--trials", self.trials, 1),
            ("--time", self.time_s, 1.0),
            ("--patience", self.patience, 0),
            ("--seed", self.seed, 0),
            ("max_trials_per_task", self.max_trials_per_task, 1),
            ("trials_per_iteration", self.trials_per_iteration, 1),
            ("population", self.population, 2),
            ("generations", self.generations, 1),
            ("measure_s", self.measure_s, 0.001),
            ("top_k", self.top_k, 1),
            ("--import-timeout", self.import_timeout_s, 1.0),
            ("build_timeout_s", self.build_timeout_s, 0.1),
            ("run_timeout_s", self.run_timeout_s, 0.1),
            ("memory_limit_mb", self.memory_limit_mb, 256),
            ("--slices", self.slices, 0),
        )

    @property
    def records_path(self) -> Path:
        """The record store's file, inside the `db` folder."""
        return self.db / RECORDS_FILE

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings as plain JSON values."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: plain(value) for name, value in values.items()}


@dataclass(frozen=True)
class Settings(RunSettings):
    """Everything that one command asks for: a run's settings, and what each of its models gets.

    `share` says where a model's `gpu_pct` comes from if it is not given. `run.jobs.divide` makes of
    it what each model gets.
    """

    gpu_pct: tuple[int, ...] = (100,)
    share: ShareRule | None = None
    output: Path | None = None
    input_shapes: Shapes = field(default_factory=dict)
    further_shapes: tuple[Shapes, ...] = ()
    dtype: str | None = None
    verify_inputs: Path | None = None
    batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype is not None:
            _check_choice("--dtype", self.dtype, DTYPES)
        if self.share is not None:
            if self.share != ShareRule.KNEE:
                _check_choice("--share", str(self.share), SHARES)
            object.__setattr__(self, "share", ShareRule(self.share))
        if not self.gpu_pct:
            raise UserError(
                "--gpu-pct is empty: give one or more whole percentages, such as 30 or 30,50,100"
            )
        for percent in self.gpu_pct:
            check_percent(percent)
        for shapes in (self.input_shapes, *self.further_shapes):
            for name, shape in shapes.items():
                check_shape(name, shape)


_SHORT_NAMES = {
    "time": "time_s", "import_timeout": "import_timeout_s",
    "inputs": "input_shapes", "batch": "batches",
}  # fmt: skip


def make_settings(**options: Any) -> Settings:
    """Builds settings from forms that people write: `gpu_pct=30`, `gpu_pct="30,50"`, `time="10m"`.

    Options that are None mean "not given".

    Raises:
        UserError: An unknown option, or a value out of its range.
    """
    known = {item.name for item in dataclasses.fields(Settings)} | set(_SHORT_NAMES)
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise UserError(f"unknown option {name!r}: {hint}")
    given = {_SHORT_NAMES.get(name, name): value for name, value in given.items()}
    if given.get("gpu_pct") == "auto":
        del given["gpu_pct"]
        given["share"] = ShareRule.KNEE
    convert: dict[str, Callable[[Any], Any]] = {
        "gpu_pct": _percents,
        "time_s": parse_duration,
        "import_timeout_s": partial(parse_duration, flag="--import-timeout"),
        "batches": _batches,
        "output": Path,
        "verify_inputs": Path,
        "db": Path,
    }
    if "input_shapes" in given:
        given["input_shapes"], *further = parse_inputs(given["input_shapes"])
        given["further_shapes"] = tuple(further)
    return Settings(**{name: convert.get(name, _same)(value) for name, value in given.items()})


def _batches(value: str | int | Iterable[int]) -> tuple[int, ...]:
    try:
        given = [value] if isinstance(value, int) else value
        parts = given.split(",") if isinstance(given, str) else given
        sizes = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        sizes = ()
    if not sizes or len(set(sizes)) < len(sizes) or not 0 < min(sizes) <= max(sizes) <= 4096:
        raise UserError(
            f"--batch {value!r}: give different batch sizes from 1 to 4096, such as 1,4"
        )
    return tuple(sorted(sizes))


def parse_percents(text: str) -> tuple[int, ...]:
    """Reads "30" or "30,50,100" as percentages, in their order."""
    percents = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*%?\s*", part):
            raise UserError(
                f"--gpu-pct {text!r} is not a percentage: "
                "give whole numbers from 1 to 100, such as 30 or 30,50,100"
            )
        percents.append(check_percent(int(part.strip(" %"))))
    return tuple(percents)


def check_percent(percent: int | float) -> int:
    """Returns `percent` where it is a whole number from 1 to 100."""
    if isinstance(percent, bool) or not isinstance(percent, int) or not 1 <= percent <= 100:
        raise UserError(
            f"--gpu-pct {percent} is out of range: give whole percentages from 1 to 100"
        )
    return percent


_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str | float, flag: str = "--time") -> float:
    """Reads 90, "90s", "10m", "1.5h" or "1h30m", given as `flag`, as seconds."""
    if not isinstance(text, str):
        return float(text)
    compact = text.replace(" ", "").lower()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", compact):
        return float(compact)
    if (
        not re.fullmatch(
            r"([0-9]+(\.[0-9]+)?h)?([0-9]+(\.[0-9]+)?m)?([0-9]+(\.[0-9]+)?s)?", compact
        )
        or not compact
    ):
        raise UserError(
            f"{flag} {text!r} is not a duration: give seconds, or a form like 90s, 10m, 2h, 1h30m"
        )
    parts = re.findall(r"([0-9.]+)([hms])", compact)
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def check_ray(address: str) -> str:
    """Returns `address` where it is "auto" or HOST:PORT."""
    if address != "auto" and not re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}", address):
        raise UserError(
            f"--ray {address!r} is not an address: give auto, or HOST:PORT as `ray start --head`"
            " prints it"
        )
    return address


def _check_number(flag: str, value: float | None, lowest: float) -> None:
    """Refuses what is below `lowest`, and fractions where `lowest` is a whole number."""
    if value is None:
        return
    kinds = int if isinstance(lowest, int) else (int, float)
    name = "whole number" if isinstance(lowest, int) else "number"
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{flag} {value!r} is not a {name}: give one of at least {lowest:g}")
    if not math.isfinite(value) or value < lowest:
        raise UserError(f"{flag} {value:g} is out of range: give a {name} of at least {lowest:g}")


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{flag} {value!r} is unknown: choose one of {', '.join(choices)}")


def _percents(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        return parse_percents(value)
    if isinstance(value, int | float):
        return (check_percent(value),)  # a float is refused there
    return tuple(value)


def check_replaceable(folder: Path) -> None:
    """Checks that a model's folder may be written: it is new, empty, or a tuned model.

    Raises:
        UserError: it is something else.
    """
    if not os.path.lexists(folder) or (folder / MANIFEST).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UserError(f"{folder} exists and is no tuned model: choose another output folder")


def _same(value: Any) -> Any:
    return value


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path | StrEnum) else value


QUICK = Settings(effort="quick")
DEFAULT = Settings(effort="default")
FULL = Settings(effort="full")
