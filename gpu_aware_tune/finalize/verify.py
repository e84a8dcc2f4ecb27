"""Is a whole library numerically correct? Its outputs against those of the user's own file.

For each draw and output, with `scale` the largest finite value that the oracle has there:

    largest error    at most base * scale + 4 * the noise's largest
    RMS error        at most base / 3 * scale + 3 * the noise's RMS
    both, in float16 four steps of its smallest numbers more
    integers         at most 1 in 1000 may differ, and 3 times as many as differ by noise

`base` follows from the type that is computed in and from whether the model is quantised, where it is
the size of a few quantisation steps. The noise is the model's own, measured by `oracle`.

A draw on which that noise would hide any error tells nothing: many networks are chaotic on large inputs.
Such draws are named, and the error that is reported is that of the others. Where an output has no
other draw, it is not called verified. An output that is the same in every draw is named too: whether what
it is computed from is right does not show there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.s_tir import SBlock

from gpu_aware_tune.finalize.oracle import DrawReference, Noise, Reference
from gpu_aware_tune.kernels.tf32 import is_marked
from gpu_aware_tune.model.draws import SPECIAL, DrawKind, is_float
from gpu_aware_tune.model.importer import Model

_BASE = {"float64": 1e-4, "float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 4e-2}
_QUANTISED = 0.03
_INTEGERS = 1e-3  # part of them that may differ
_RMS_PART = 3.0  # the RMS error may be so many times smaller than the largest
_LARGEST_NOISE, _RMS_NOISE = 4.0, 3.0
_TELLING, _TELLING_BASE = (
    0.02,
    10.0,
)  # a limit of at most this, or so many times the base, tells something
_LAST_STEPS = 4.0  # of the smallest that the type has

Outputs = Sequence[np.ndarray]


@dataclass(frozen=True)
class OutputCheck:
    """One output over all ordinary draws: the largest relative error and what is allowed there.

    `telling` is unset where the model's own noise is so large that any error would be allowed.
    """

    name: str
    error: float
    allowed: float
    telling: bool = True

    @property
    def ok(self) -> bool:
        """Whether the error is within its limit, in every draw."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class VerifyReport:
    """A library against the oracle.

    Args:
        oracle: whose numbers it was compared with.
        draws: the draws that were compared.
        outputs: each output's worst draw, of those that tell something; a draw that fails in any case.
        special: what came of NaN and infinity: "as the oracle", or in which draws it differs.
        notes: of the oracle, and which draws tell nothing.
        unvarying: outputs that the oracle gives the same values in all ordinary draws.
    """

    oracle: str
    draws: tuple[str, ...]
    outputs: tuple[OutputCheck, ...]
    special: str
    notes: tuple[str, ...] = ()
    unvarying: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every output is right in every ordinary draw."""
        return all(output.ok for output in self.outputs)

    @property
    def undecided(self) -> tuple[str, ...]:
        """Outputs of which no draw tells whether they are right."""
        return tuple(output.name for output in self.outputs if not output.telling)

    @property
    def max_error(self) -> float:
        """The largest relative error of all outputs."""
        return max((output.error for output in self.outputs), default=0.0)

    @property
    def text(self) -> str:
        """One line for people."""
        worst = max(self.outputs, key=lambda o: o.error / (o.allowed or 1e-30), default=None)
        if worst is None:
            return f"nothing to compare with {self.oracle}"
        text = (
            f"error {worst.error:.1e} (allowed {worst.allowed:.0e}, output {worst.name!r})"
            f" against {self.oracle}, {len(self.draws)} draws of inputs"
        )
        if self.special != AS_ORACLE:
            text += f"; {self.special}"
        if self.undecided:
            names = ", ".join(map(repr, self.undecided))
            text += f"; not verified: the model's own noise would hide any error of {names}"
        if self.unvarying:
            names = ", ".join(map(repr, self.unvarying))
            text += f"; in every draw the same values, where errors may not show: {names}"
        return text


AS_ORACLE = "NaN and infinity as in the oracle"


def compare(reference: Reference, got: Sequence[Outputs], base: float) -> VerifyReport:
    """Compare what a library gave for the reference's draws, in their order, with the reference.

    Args:
        reference: what is right.
        got: the library's outputs for each draw.
        base: see `base_error`.
    """
    worst: dict[str, OutputCheck] = {}
    special, notes = [], list(reference.notes)
    for draw, outputs in zip(reference.draws, got, strict=True):
        checks = _checks(reference, draw, outputs, base)
        if draw.kind in SPECIAL or _overflows(draw):
            differing = [check.name for check in checks if not check.ok]
            if differing:
                special.append(f"draw {draw.kind}: {', '.join(map(repr, differing))} differs")
            continue
        for check in checks:
            before = worst.get(check.name)
            if before is None or _weight(check) > _weight(before):
                worst[check.name] = check
        if untelling := [check for check in checks if not check.telling]:
            largest = max(check.allowed for check in untelling)
            notes.append(f"draw {draw.kind} tells nothing: noise allows an error of {largest:.2g}")
    if unvarying := _unvarying(reference):
        notes.append(f"the same values in every draw: {', '.join(map(repr, unvarying))}")
    draws = tuple(draw.kind.value for draw in reference.draws)
    return VerifyReport(
        reference.oracle,
        draws,
        tuple(worst.values()),
        "; ".join(special) or AS_ORACLE,
        tuple(notes),
        unvarying,
    )


def _unvarying(reference: Reference) -> tuple[str, ...]:
    draws = [draw.outputs for draw in reference.draws if draw.kind not in SPECIAL]
    if len(draws) < 2:
        return ()
    return tuple(
        name
        for name, first, *others in zip(reference.outputs, *draws, strict=True)
        if first.size and all(np.array_equal(first, each) for each in others)
    )


def _overflows(draw: DrawReference) -> bool:
    """Whether large inputs are beyond the range of a float16 model itself, as the oracle shows."""
    return draw.kind == DrawKind.LARGE and any(
        output.dtype == np.float16 and not np.isfinite(output).all() for output in draw.outputs
    )


def base_error(model: Model, computed_in: str) -> float:
    """The relative error that the type allows, before the model's own noise is added.

    Args:
        model: tells whether it is quantised.
        computed_in: see the function of that name.
    """
    base = _BASE[computed_in]
    return max(base, _QUANTISED) if model.is_quantised else base


def computed_in(model: Model) -> str:
    """The coarsest floating point type that a model computes in, "tf32" among them."""
    types = _types(model)
    if "bfloat16" in types or "float16" in types:
        return "bfloat16" if "bfloat16" in types else "float16"
    kernels = model.module.functions.values()
    if any(isinstance(f, tvm.tirx.PrimFunc) and is_marked(f) for f in kernels):
        return "tf32"
    return "float32"


def _types(model: Model) -> set[str]:
    """The types that any kernel reads or writes; inputs, outputs and small weights do not tell."""
    types: set[str] = set()

    def visit(block: Any) -> None:
        types.update(str(region.source.dtype) for region in (*block.reads, *block.writes))

    for function in model.module.functions.values():
        if isinstance(function, tvm.tirx.PrimFunc):
            tvm_ffi.structural_walk(function.body, (SBlock, visit))
    return types


def _checks(
    reference: Reference, draw: DrawReference, got: Outputs, base: float
) -> list[OutputCheck]:
    if len(got) != len(draw.outputs):
        return [OutputCheck("all of them", math.inf, 0.0)]
    rows = zip(reference.outputs, got, draw.outputs, draw.noise, strict=True)
    return [
        _check(name, *_same_type(own, wanted, reference.is_widened), noise, base)
        for name, own, wanted, noise in rows
    ]


def _same_type(
    got: np.ndarray, wanted: np.ndarray, is_widened: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A half-precision output as the oracle gives it, where that computed in float32."""
    if is_widened and got.dtype.name in ("float16", "bfloat16"):
        return got.astype(np.float32), wanted
    return got, wanted


def _check(
    name: str, got: np.ndarray, wanted: np.ndarray, noise: Noise, base: float
) -> OutputCheck:
    """One output of one draw; the error is the larger of both kinds, each as a part of its limit."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return OutputCheck(name, math.inf, base)
    if got.size == 0:
        return OutputCheck(name, 0.0, base)
    if not is_float(wanted.dtype.name):
        part = float(np.mean(got != wanted))
        allowed = max(_INTEGERS, _RMS_NOISE * noise.largest)
        return OutputCheck(name, part, allowed, _tells(allowed, base))
    own, right = got.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(right)
    if not np.array_equal(own[~finite], right[~finite], equal_nan=True):
        return OutputCheck(name, math.inf, base)
    if not np.isfinite(own[finite]).all():
        return OutputCheck(name, math.inf, base)
    if not finite.any():
        return OutputCheck(name, 0.0, base)
    apart = np.abs(own[finite] - right[finite])
    scale = float(np.abs(right[finite]).max()) or 1.0
    largest = float(apart.max()) / scale
    rms = float(np.sqrt(np.mean(np.square(apart)))) / scale
    steps = _LAST_STEPS * _smallest_step(wanted.dtype)
    allowed = base + (_LARGEST_NOISE * noise.largest + steps) / scale
    allowed_rms = base / _RMS_PART + (_RMS_NOISE * noise.rms + steps) / scale
    error = max(largest, rms * allowed / allowed_rms)
    return OutputCheck(name, error, allowed, _tells(allowed, base))


def _tells(allowed: float, base: float) -> bool:
    """Whether a limit is narrow enough to find an error."""
    return allowed <= max(_TELLING, _TELLING_BASE * base)


def _smallest_step(dtype: np.dtype[Any]) -> float:
    """The distance of the smallest numbers of a type: what vanishes in it is rounded to that."""
    return 2.0**-24 if dtype == np.float16 else 0.0


def _weight(check: OutputCheck) -> tuple[bool, bool, float]:
    """What an output's draws are ranked by: what fails, then what tells something, then how bad it is."""
    badness = check.error / check.allowed if check.allowed else check.error
    return not check.ok, check.telling, badness
