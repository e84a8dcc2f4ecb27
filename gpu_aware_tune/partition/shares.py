"""Percent to units: how many cores or SMs a share of a device comes to under each backend."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.partition.device import Device

# An MPS client never gets less than this, however small its percentage (seen on 132-SM Hopper
# cards).
MPS_MIN_SMS = 8


@dataclass(frozen=True)
class Share:
    """A fraction of a device, and the units it really comes to."""

    percent: int
    units: int
    device: Device

    def describe(self) -> str:
        """One phrase for people: "30 % of 132 SMs = 32 SMs"."""
        total, got = (_count(n, self.device.unit) for n in (self.device.units_total, self.units))
        return f"{self.percent} % of {total} = {got}"


def check_percent(percent: int) -> int:
    """Return `percent` if it is a whole number from 1 to 100, raise `UserError` otherwise."""
    if isinstance(percent, bool) or not isinstance(percent, int) or not 1 <= percent <= 100:
        raise UserError(
            f"--gpu-pct {percent!r} is not a share; allowed: whole numbers from 1 to 100"
        )
    return percent


def core_units(percent: int, total: int) -> int:
    """Cores of a CPU share: rounded down, at least one."""
    return max(1, check_percent(percent) * total // 100)


def green_units(percent: int, device: Device) -> int:
    """SMs of a green context: rounded down to the granularity; 100 % is every SM."""
    if check_percent(percent) == 100:
        return device.units_total
    step = device.unit_step
    return max(device.unit_min, percent * device.units_total // 100 // step * step)


def mps_units(percent: int, total: int) -> int:
    """SMs of an MPS client: the driver rounds down to SM pairs and never goes below eight."""
    if check_percent(percent) == 100:
        return total
    return min(total, max(MPS_MIN_SMS, 2 * (percent * total // 200)))


def mps_percentage(units: int, total: int) -> int:
    """The smallest active-thread percentage that yields `units` SMs."""
    return min(100, -(-100 * units // total))


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" + ("" if number == 1 else "s")
