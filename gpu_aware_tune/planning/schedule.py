"""A plan: lanes and their cycles of slots, what each model gets, and what is in the way."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.device import PlanDevice

FORMAT = 1


class PlanObjective(StrEnum):
    """What the planner makes the most of."""

    HEADROOM = "headroom"  # the factor by which all rates may grow
    GOODPUT = "goodput"  # weighted requests a second, where not all can be served
    UNITS = "units"  # the fewest units that serve the rates as they are


@dataclass(frozen=True)
class Slot:
    """A run that a lane has reserved in each of its cycles.

    Args:
        model: what runs.
        batch: the most requests that it takes.
        start_s: from the start of the cycle; a slot may reach over its end into the next one.
        length_s: planned, with the margin.
    """

    model: str
    batch: int
    start_s: float
    length_s: float


@dataclass(frozen=True)
class Lane:
    """Units that are set aside for runs, one after the other.

    Args:
        first_unit: its units are `first_unit` to `first_unit + units - 1`; lanes are disjoint.
        units: how wide it is.
        group: lanes with the same number run the same cycle, staggered.
        cycle_s: after which the slots repeat; 0 for a lane that has no slots.
        slots: in order of their starts; none for a lane that only takes what others cannot.
    """

    first_unit: int
    units: int
    group: int
    cycle_s: float
    slots: tuple[Slot, ...]

    @property
    def busy(self) -> float:
        """The part of its time that is reserved."""
        return sum(slot.length_s for slot in self.slots) / self.cycle_s if self.slots else 0.0


@dataclass(frozen=True)
class ModelPlan:
    """What a plan gives to one model.

    Args:
        model: its name.
        rate_per_s: that was asked for.
        served_per_s: of these, what the plan serves; less than asked for where not all fits.
        slo_s: latency objective.
        percentile: of the requests that must meet it.
        weight: against the requests of other models.
        group: the lanes that it runs on; -1 where it gets none.
        batch: the most requests of one run; 0 where it gets no lanes.
        period_s: between two of its starts.
        run_s: planned seconds of one run.
        lowest_per_s: below that rate fewer units would do; 0 where units are not to be saved.
    """

    model: str
    rate_per_s: float
    served_per_s: float
    slo_s: float
    percentile: float
    weight: float
    group: int
    batch: int
    period_s: float
    run_s: float
    lowest_per_s: float

    @property
    def capacity_per_s(self) -> float:
        """The largest rate that the slots hold."""
        return self.batch / self.period_s if self.batch else 0.0

    @property
    def worst_case_s(self) -> float:
        """Planned latency of a request that just missed a start."""
        return self.period_s + self.run_s

    @property
    def lane_share(self) -> float:
        """The lanes' time that it takes, in lanes."""
        return self.run_s / self.period_s if self.batch else 0.0


@dataclass(frozen=True)
class Plan:
    """Lanes with their cycles, and for each model what it gets.

    Args:
        device: what is planned for.
        lanes: disjoint.
        models: in the order of the demands.
        headroom: the factor by which all rates can grow; below 1 they do not fit.
        headroom_limit: what no schedule of these curves can pass; how good the plan is at least.
        objective: what was made the most of.
        margin: the planning latency is so many times the measured p90.
        reason: the one constraint that binds, where the demands do not fit.
        helps: what would make them fit, each a sentence.
    """

    device: PlanDevice
    lanes: tuple[Lane, ...]
    models: tuple[ModelPlan, ...]
    headroom: float
    headroom_limit: float
    objective: PlanObjective
    margin: float
    reason: str | None = None
    helps: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every request is served."""
        return self.headroom >= 1

    @property
    def units_used(self) -> int:
        """Units of lanes with slots."""
        return sum(lane.units for lane in self.lanes if lane.slots)

    def group_lanes(self, group: int) -> tuple[int, ...]:
        """The positions of a group's lanes."""
        return tuple(place for place, lane in enumerate(self.lanes) if lane.group == group)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; `plan.schema.json` describes it."""
        facts = dataclasses.asdict(self)
        for entry, model in zip(facts["models"], self.models, strict=True):
            entry["capacity_per_s"] = model.capacity_per_s
            entry["worst_case_s"] = model.worst_case_s
            entry["lane_share"] = model.lane_share
        return {"format": FORMAT, "fits": self.fits, **facts}


def plan_from_dict(facts: Any, source: str) -> Plan:
    """Read a plan that `Plan.as_dict` wrote.

    Args:
        facts: what the JSON file holds.
        source: the file's name, for errors.

    Raises:
        UserError: it is no plan, or of a later format.
    """
    try:
        made = int(facts["format"])
        if made > FORMAT:
            raise UserError(f"{source} has format {made}, this version reads up to {FORMAT}")
        lanes = tuple(
            Lane(**{**lane, "slots": tuple(Slot(**slot) for slot in lane["slots"])})
            for lane in facts["lanes"]
        )
        names = [item.name for item in dataclasses.fields(ModelPlan)]
        models = tuple(
            ModelPlan(**{name: entry[name] for name in names}) for entry in facts["models"]
        )
        plan = Plan(
            device=PlanDevice(**facts["device"]),
            lanes=lanes,
            models=models,
            headroom=float(facts["headroom"]),
            headroom_limit=float(facts["headroom_limit"]),
            objective=PlanObjective(facts["objective"]),
            margin=float(facts["margin"]),
            reason=facts.get("reason"),
            helps=tuple(facts.get("helps", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        text = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{source} is no plan ({text}): write one with tune plan --json") from error
    check_plan(plan, source)
    return plan


def check_plan(plan: Plan, source: str) -> None:
    """Refuse a plan that breaks its own promises.

    Raises:
        UserError: lanes overlap or leave the device, slots overlap, or an SLO cannot be met.
    """
    end = 0
    for lane in sorted(plan.lanes, key=lambda lane: lane.first_unit):
        if lane.first_unit < end or lane.units < 1:
            raise UserError(f"{source}: the lane at unit {lane.first_unit} overlaps another one")
        end = lane.first_unit + lane.units
        if end > plan.device.units:
            raise UserError(f"{source}: a lane ends at unit {end} of {plan.device.units}")
        free_s = 0.0
        for slot in lane.slots:
            if slot.start_s < free_s - 1e-6:
                raise UserError(f"{source}: two slots of the lane at {lane.first_unit} overlap")
            free_s = slot.start_s + slot.length_s
        if lane.slots and free_s - lane.slots[0].start_s > lane.cycle_s + 1e-6:
            raise UserError(
                f"{source}: the slots of the lane at {lane.first_unit} exceed its cycle"
            )
    for model in plan.models:
        if not (math.isfinite(model.worst_case_s) and model.worst_case_s <= model.slo_s + 1e-6):
            raise UserError(f"{source}: {model.model} cannot meet its SLO")
