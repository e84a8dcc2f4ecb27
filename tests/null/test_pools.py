"""How a device is divided into slices that measure side by side."""

from __future__ import annotations

import pytest

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.partition import Share
from gpu_aware_tune.pools import plan_slices
from gpu_aware_tune.testing import fake_gpu, null_device

DEVICE = null_device(10)


def units(percents: list[int], nested: bool, most: int) -> list[list[int]]:
    shares = [Share(10 * count, count, DEVICE) for count in percents]
    return [[s.units for s in own] for own in plan_slices(shares, DEVICE, nested, most)]


def test_shares_that_fit_have_a_slice_each_and_large_ones_serve_smaller_shares() -> None:
    assert units([3, 3, 4], nested=True, most=3) == [[4, 3], [3], [3]]


def test_shares_that_do_not_fit_side_by_side_use_the_larger_slices() -> None:
    assert units([6, 6, 4], nested=True, most=3) == [[6, 4], [4]]
    assert units([10, 5], nested=True, most=2) == [[10, 5]]


def test_room_that_is_left_becomes_slices_of_the_smallest_share() -> None:
    assert units([3], nested=True, most=3) == [[3], [3], [3]]
    assert units([3], nested=True, most=2) == [[3], [3]]
    assert units([3], nested=True, most=1) == [[3]]


def test_every_share_is_served_by_some_slice() -> None:
    for given in ([1, 2, 3, 4], [9, 9, 1], [5, 5, 5], [10, 1, 1]):
        planned = units(given, nested=True, most=len(given))
        assert {count for own in planned for count in own} == set(given)
        assert sum(max(own) for own in planned) <= 10


def test_a_backend_that_cannot_nest_refuses_what_does_not_fit() -> None:
    assert units([5, 5], nested=False, most=2) == [[5], [5]]
    with pytest.raises(UserError, match="do not fit side by side on 10"):
        units([6, 5], nested=False, most=2)


def test_four_quarters_of_a_gpu() -> None:
    gpu = fake_gpu()
    shares = [Share(25, 32, gpu)] * 4
    assert [len(own) for own in plan_slices(shares, gpu, True, 4)] == [1, 1, 1, 1]
