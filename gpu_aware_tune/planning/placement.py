"""How many devices of a kind serve all demands, and which model goes where."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.branching import Grouper, best_grouping
from gpu_aware_tune.planning.lanes import Occupancy, Workload
from gpu_aware_tune.planning.search import cheapest_cost

_MOST_PARTS = 1024


@dataclass(frozen=True)
class Placement:
    """Models on devices.

    Args:
        devices: for each device its models, each with the part of its rate that goes there.
        least_devices: fewer are not enough for any schedule.
    """

    devices: tuple[tuple[tuple[int, float], ...], ...]
    least_devices: int

    def workload(self, work: Workload, device: int) -> Workload:
        """The workload of one of the devices."""
        placed = self.devices[device]
        demands = tuple(
            dataclasses.replace(
                work.demands[model], rate_per_s=work.demands[model].rate_per_s * part
            )
            for model, part in placed
        )
        return Workload(work.device, demands, tuple(work.tables[model] for model, _ in placed))


def place(work: Workload, grouper: Grouper = best_grouping) -> Placement:
    """Place models on as few devices as can be: first fit, those with most work first.

    A model that is too much for one device is divided into the fewest equal parts that fit one each.

    Raises:
        UserError: a rate is out of all proportion.
    """
    cost = cheapest_cost(work)
    areas = [float(c) * demand.rate_per_s for c, demand in zip(cost, work.demands, strict=True)]
    pieces: list[tuple[float, int, float]] = []
    for model, area in enumerate(areas):
        parts = _parts(work, model, grouper)
        pieces += [(area / parts, model, 1 / parts)] * parts
    devices: list[list[tuple[int, float]]] = []
    for _, model, part in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        for placed in devices:
            taken = all(other != model for other, _ in placed)
            if taken and _fits(work, [*placed, (model, part)], grouper):
                placed.append((model, part))
                break
        else:
            devices.append([(model, part)])
    least = math.ceil(sum(areas) / work.device.units - 1e-9)
    return Placement(tuple(tuple(sorted(placed)) for placed in devices), max(1, least))


def _parts(work: Workload, model: int, grouper: Grouper) -> int:
    """Into how many equal parts a model must be divided so that each fits a device."""
    parts = 1
    while not _fits(work, [(model, 1 / parts)], grouper):
        parts += 1
        if parts > _MOST_PARTS:
            demand = work.demands[model]
            raise UserError(
                f"rate {demand.rate_per_s:g} of {demand.model} needs more than {_MOST_PARTS} devices"
            )
    return parts


def _fits(work: Workload, placed: list[tuple[int, float]], grouper: Grouper) -> bool:
    part = Placement((tuple(placed),), 1).workload(work, 0)
    return grouper(Occupancy(part), work.device.units).units <= work.device.units
