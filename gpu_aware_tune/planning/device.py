"""The device that a plan is made for: how many units it has and which widths a lane may have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpu_aware_tune.errors import UserError

SM_STEP = 8  # granularity of a green context's split


@dataclass(frozen=True)
class PlanDevice:
    """A device as the planner sees it.

    Args:
        name: for people, such as "H100".
        units: cores or SMs.
        unit: "SM" or "core".
        step: a lane is a multiple of this wide, or as wide as the device.
    """

    name: str
    units: int
    unit: str = "SM"
    step: int = SM_STEP

    def __post_init__(self) -> None:
        if self.units < 1 or not 1 <= self.step <= self.units:
            raise UserError(
                f"device {self.name!r} with {self.units} {self.unit}s in steps of {self.step}:"
                " it needs at least one unit, and a step from 1 to that number"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """The units that a lane may have, in ascending order."""
        return tuple(sorted({*range(self.step, self.units + 1, self.step), self.units}))

    def count(self, units: int) -> str:
        """Write a number of units: "48 SMs"."""
        return f"{units} {self.unit}{'' if units == 1 else 's'}"


def parse_device(text: str) -> PlanDevice:
    """Read "H100, 132 SMs" or "EPYC, 16 cores, step 2".

    Raises:
        UserError: it is neither.
    """
    found = re.fullmatch(
        r"\s*(.*?)\s*,\s*(\d+)\s*(sm|core)s?\s*(?:,\s*step\s*(\d+)\s*)?", text, re.IGNORECASE
    )
    if found is None or not found[1]:
        raise UserError(
            f"--device {text!r} is not NAME, N SMs or NAME, N cores: give a form such as"
            " 'H100, 132 SMs' or 'EPYC, 16 cores'"
        )
    unit = "SM" if found[3].lower() == "sm" else "core"
    units = int(found[2])
    step = int(found[4]) if found[4] else default_step(unit, units)
    return PlanDevice(found[1], units, unit, step)


def default_step(unit: str, units: int) -> int:
    """The granularity of a lane where none is told: 8 SMs, or 1 core."""
    return min(SM_STEP, max(units, 1)) if unit == "SM" else 1
