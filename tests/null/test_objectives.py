"""What several shares come to in one number, and one kernel for all of them."""

from __future__ import annotations

import pytest

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.run.jobs import make_jobs
from gpu_aware_tune.search.objectives import combined, most_throughput, one_for_all
from gpu_aware_tune.settings import Objective

# Seconds on 1 and 4 units: one kernel is best on each, one is near the best on both.
KERNELS = {
    "narrow": {1: 1.0, 4: 2.0},
    "wide": {1: 1.3, 4: 1.0},
    "even": {1: 1.12, 4: 1.12},
    "half": {1: 0.5},
}


def test_robust_takes_the_least_worst_loss_and_mean_the_least_on_average() -> None:
    kernels = {name: KERNELS[name] for name in ("narrow", "wide", "even")}
    assert [name for name, _ in one_for_all(kernels, Objective.ROBUST)] == [
        "even",
        "wide",
        "narrow",
    ]
    uneven = {**kernels, "wide": {1: 1.2, 4: 1.0}}
    for objective, wanted, loss in (
        (Objective.MEAN, "wide", 1.1),
        (Objective.ROBUST, "even", 1.12),
    ):
        name, seen = one_for_all(uneven, objective)[0]
        assert name == wanted and seen == pytest.approx(loss)


def test_a_kernel_that_lacks_a_share_is_no_answer_but_sets_the_mark() -> None:
    ranked = dict(one_for_all(KERNELS, Objective.ROBUST))
    assert "half" not in ranked
    assert ranked["even"] == pytest.approx(1.12 / 0.5)


def test_with_one_share_every_objective_is_the_fastest_kernel() -> None:
    kernels = {"a": {2: 3.0}, "b": {2: 2.0}}
    for objective in (Objective.SHARE, Objective.ROBUST, Objective.MEAN):
        assert one_for_all(kernels, objective)[0][0] == "b"
    assert one_for_all({}, Objective.ROBUST) == []


def test_combined() -> None:
    assert combined([1.0, 1.5], Objective.ROBUST) == 1.5
    assert combined([1.0, 1.5], Objective.SHARE) == 1.25


def test_throughput_counts_whole_instances() -> None:
    best, rates = most_throughput({1: 0.010, 2: 0.006, 3: 0.003}, 4)
    assert rates == {
        1: pytest.approx(400),
        2: pytest.approx(333.3, rel=1e-3),
        3: pytest.approx(333.3, rel=1e-3),
    }
    assert best == 1


def test_objectives_that_compare_shares_need_several() -> None:
    with pytest.raises(UserError, match="robust compares shares"):
        make_jobs(["a.onnx"], objective="robust", gpu_pct="30,30")
    with pytest.raises(UserError, match="one model on several shares"):
        make_jobs(["a.onnx", "b.onnx"], objective="mean")
    with pytest.raises(UserError, match="--objective 'best' is unknown"):
        make_jobs(["a.onnx"], objective="best")
    assert (
        make_jobs(["a.onnx"], objective="robust", gpu_pct="30,100").settings.objective == "robust"
    )
