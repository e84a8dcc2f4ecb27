"""Curves as the planner sees them, and the files that they come from."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_instances import GPU, INSTANCES, curve, rough_curve

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.curve import Batching, latency_table
from gpu_aware_tune.planning.curve_file import MeasuredPoint, curve_from_dict, read_curve
from gpu_aware_tune.planning.demand import Demand
from gpu_aware_tune.planning.device import PlanDevice, parse_device


def point(units: int, batch: int, ms: float) -> MeasuredPoint:
    return MeasuredPoint(units, batch, ms, 1.2 * ms)


POINTS = [point(16, 2, 12), point(16, 4, 20), point(32, 2, 14), point(32, 4, 16), point(48, 2, 6)]
WIDTHS = (8, 16, 24, 32, 40, 48)


def test_a_lane_runs_the_best_library_that_is_at_most_as_wide() -> None:
    table = latency_table("m", POINTS, WIDTHS, margin=1.0)
    two, four = 1e3 * table.median_s[:, 1], 1e3 * table.median_s[:, 3]
    # The one for 32 units is slower than the one for 16, which runs on 32 units then.
    assert two.tolist() == pytest.approx([math.inf, 12, 12, 12, 12, 6])
    assert four.tolist() == pytest.approx([math.inf, 20, 20, 16, 16, 16])


def test_between_batch_sizes_it_is_affine_and_beyond_them_nothing() -> None:
    table = latency_table("m", POINTS, WIDTHS, margin=1.0)
    on_16 = 1e3 * table.median_s[1]
    assert on_16.tolist() == pytest.approx([12, 12, 16, 20])  # one runs padded to two
    assert table.largest_batch == 4
    padded = latency_table("m", POINTS, WIDTHS, margin=1.0, batching=Batching.PADDED)
    assert (1e3 * padded.median_s[1]).tolist() == pytest.approx([12, 12, 20, 20])


def test_a_larger_batch_that_is_faster_limits_the_smaller_ones() -> None:
    table = latency_table("m", [point(8, 1, 9), point(8, 2, 5), point(8, 4, 7)], (8,), margin=1.0)
    assert (1e3 * table.median_s[0]).tolist() == pytest.approx([5, 5, 6, 7])


def test_the_plan_reckons_with_p90_times_the_margin() -> None:
    table = latency_table("m", POINTS, WIDTHS, margin=1.5)
    assert table.planned_s[1, 1] == pytest.approx(1.5 * 1.2 * 12e-3)


def test_tables_of_random_curves_never_rise_with_units_nor_fall_with_the_batch() -> None:
    for seed in range(INSTANCES):
        made = rough_curve("m", GPU, random.Random(seed))
        for batching in Batching:
            table = latency_table("m", made.points, GPU.widths, batching=batching)
            finite = np.where(np.isfinite(table.planned_s), table.planned_s, 1e9)
            assert (np.diff(finite, axis=0) <= 0).all()
            assert (np.diff(finite, axis=1) >= 0).all()
            assert (table.planned_s >= table.median_s).all()


def test_the_batch_of_a_period() -> None:
    even = Demand("m", 100, 0.1)
    assert [even.batch_for(seconds) for seconds in (0.001, 0.01, 0.0101, 0.05)] == [1, 1, 2, 5]
    assert even.batch_for(0.01, scale=3) == 3
    bursty = Demand("m", 100, 0.1, percentile=97.72, cv=1)  # two standard deviations
    assert bursty.batch_for(0.09) == 9 + 2 * 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rate_per_s", 0, "rate 0 of m is not allowed: give requests a second above 0"),
        ("rate_per_s", math.inf, "rate inf"),
        ("slo_s", -0.1, "slo -0.1"),
        ("percentile", 100, "percentile 100 of m is not allowed: give a number between 50 and 100"),
        ("weight", 0, "weight 0"),
        ("cv", -1, "cv -1"),
    ],
)
def test_demands_that_cannot_be_are_refused(field: str, value: float, message: str) -> None:
    facts: dict[str, Any] = {"model": "m", "rate_per_s": 1.0, "slo_s": 0.1, field: value}
    with pytest.raises(UserError, match=message):
        Demand(**facts)


def test_devices_are_read_from_text() -> None:
    assert parse_device("H100, 132 SMs") == PlanDevice("H100", 132, "SM", 8)
    assert parse_device("EPYC, 16 cores") == PlanDevice("EPYC", 16, "core", 1)
    assert parse_device("A, 10 sm, step 2").widths == (2, 4, 6, 8, 10)
    assert PlanDevice("H100", 132).widths == (*range(8, 129, 8), 132)
    for text in ("H100", "132 SMs", ", 132 SMs", "H100, many SMs"):
        with pytest.raises(UserError, match=r"--device .* give a form such as"):
            parse_device(text)
    with pytest.raises(UserError, match="0 SMs"):
        parse_device("H100, 0 SMs")


def as_dict(**changes: object) -> dict[str, object]:
    made = curve("m", GPU)
    points = [
        {"units": p.units, "batch": p.batch, "latency_ms": p.latency_ms, "p90_ms": p.p90_ms}
        for p in made.points
    ]
    facts = {"model": "m", "device": "cuda/GPU/sm_90a", "unit": "SM", "units_total": 132}
    return {**facts, "points": points, **changes}


def test_a_saved_curve_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(as_dict()))
    read = read_curve(path)
    assert read.points == curve("m", GPU).points
    assert (read.device_name, read.units_total) == ("GPU", 132)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([], "is no JSON object"),
        (as_dict(model=""), "model '' is no name"),
        (as_dict(unit="W"), "unit 'W' is not allowed; allowed: SM, core"),
        (as_dict(units_total=0), "units_total 0 is no whole number from 1 on"),
        (as_dict(points=[]), "has no points"),
        (as_dict(points=[1]), "point 0 is no JSON object"),
        (as_dict(points=[{"units": 8, "batch": 1}]), "point 0: latency_ms None is no number"),
        (as_dict(points=[{"units": 8, "batch": 0, "latency_ms": 1}]), "batch 0"),
        (as_dict(points=[{"units": True, "batch": 1, "latency_ms": 1}]), "units True"),
        (as_dict(points=[{"units": 8, "batch": 1, "latency_ms": math.nan}]), "latency_ms nan"),
        (as_dict(points=[{"units": 200, "batch": 1, "latency_ms": 1}]), "200 units of a device"),
    ],
)
def test_malformed_curves_are_refused(facts: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        curve_from_dict(facts, "m.json")
    assert "m.json" in str(caught.value)


def test_files_that_are_no_curves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read curve"):
        read_curve(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_curve(tmp_path / "bad.json")
