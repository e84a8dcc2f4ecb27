"""What is to be served: models with their folders and latency objectives, from lists or a fleet.toml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.fleet import (
    check_keys,
    model_name,
    parse_slo,
    read_number,
    read_toml,
    split_list,
)

_KEYS = {"name", "library", "rate", "slo", "percentile", "weight"}
_PLAN_KEYS = {"curve", "cv"}  # of a fleet.toml that is planned with too


@dataclass(frozen=True)
class Deployment:
    """A model to serve.

    Args:
        folders: that `tune MODEL` wrote, one for each batch size.
        slo_s: latency objective: seconds from a request's arrival to its answer.
        name: what clients call it; the model's own name by default.
        rate_per_s: expected requests a second; without it the plan begins with equal loads.
        percentile: of the requests that must meet the objective.
        weight: of a request against those of other models.
    """

    folders: tuple[Path, ...]
    slo_s: float
    name: str | None = None
    rate_per_s: float | None = None
    percentile: float = 99.0
    weight: float = 1.0


def read_deployments(path: Path) -> list[Deployment]:
    """The models of a `fleet.toml`, as `tune plan` takes it; each needs `library` and `slo`.

    `library` is a folder, or a list of folders of one model at several batch sizes; they are looked
    for beside the file.

    Raises:
        UserError: something in it cannot be used, with what and what is allowed.
    """
    entries = read_toml(path).get("models")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} has no [[models]]: give one for each, with library and slo")
    return [
        _deployment(entry, f"{path}, model {number}", path.parent)
        for number, entry in enumerate(entries, 1)
    ]


def make_deployments(
    folders: Sequence[Path], slo: str | None, rate: str | None = None
) -> list[Deployment]:
    """Deployments of folders on the command line; those of one model are its batch sizes.

    Args:
        folders: that `tune MODEL` wrote.
        slo: latency objectives such as "25ms,50ms", one for each model or for all.
        rate: expected requests a second such as "120,40", likewise.

    Raises:
        UserError: a list is missing, has the wrong length, or what it holds is wrong.
    """
    by_name: dict[str, list[Path]] = {}
    for folder in folders:
        by_name.setdefault(model_name(folder), []).append(folder)
    if slo is None:
        raise UserError("--slo is missing: give one for each model, such as 25ms,50ms")
    slos = [parse_slo(text) for text in split_list("slo", slo, len(by_name))]
    told = [None] * len(by_name) if rate is None else parse_rates(rate, len(by_name))
    rows = zip(by_name.values(), slos, told, strict=True)
    return [Deployment(tuple(own), slo_s, rate_per_s=r) for own, slo_s, r in rows]


def _deployment(entry: Any, where: str, beside: Path) -> Deployment:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} is no table: write [[models]] above its library and slo")
    check_keys(entry, _KEYS | _PLAN_KEYS, where)
    library, slo = entry.get("library"), entry.get("slo")
    folders = library if isinstance(library, list) else [library]
    if not folders or not all(isinstance(folder, str) for folder in folders):
        raise UserError(
            f"{where}: library is needed: the folder that `tune MODEL` wrote, or several"
        )
    if not isinstance(slo, str):
        raise UserError(f"{where}: slo is needed, such as slo = '50ms'")
    name = entry.get("name")
    return Deployment(
        folders=tuple(beside / str(folder) for folder in folders),
        slo_s=parse_slo(slo),
        name=None if name is None else str(name),
        rate_per_s=read_number(entry, "rate", where, 0.0) or None,
        percentile=read_number(entry, "percentile", where, 99.0),
        weight=read_number(entry, "weight", where, 1.0),
    )


def parse_rates(text: str, count: int) -> list[float]:
    """Read requests a second such as "120,40", one for each of `count` models or for all.

    Raises:
        UserError: they are something else.
    """
    try:
        rates = [float(part) for part in split_list("rate", text, count)]
    except ValueError:
        raise UserError(
            f"--rate {text!r} is no list of numbers: give a form such as 120,40"
        ) from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise UserError(f"--rate {text!r}: give requests a second above 0")
    return rates
