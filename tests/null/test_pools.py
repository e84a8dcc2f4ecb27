"""How a device is divided into slices that measure side by side."""

from __future__ import annotations

from mock_gpu.devices import fake_gpu, null_device

from gpu_aware_tune.partition import Share
from gpu_aware_tune.search.pools import plan_slices

DEVICE = null_device(10)


def units(percents: list[int], most: int, instances: list[int] | None = None) -> list[list[int]]:
    shares = [Share(10 * count, count, DEVICE) for count in percents]
    return [[s.units for s in own] for own in plan_slices(shares, DEVICE, most, instances)]


def test_shares_that_fit_have_a_slice_each_and_large_ones_serve_smaller_shares() -> None:
    assert units([3, 3, 4], most=3) == [[4, 3], [3], [3]]


def test_shares_that_do_not_fit_side_by_side_use_the_larger_slices() -> None:
    assert units([6, 6, 4], most=3) == [[6, 4], [4]]
    assert units([10, 5], most=2) == [[10, 5]]


def test_room_that_is_left_becomes_slices_of_the_smallest_share() -> None:
    assert units([3], most=3) == [[3], [3], [3]]
    assert units([3], most=2) == [[3], [3]]
    assert units([3], most=1) == [[3]]


def test_every_share_is_served_by_some_slice() -> None:
    for given in ([1, 2, 3, 4], [9, 9, 1], [5, 5, 5], [10, 1, 1]):
        planned = units(given, most=len(given))
        assert {count for own in planned for count in own} == set(given)
        assert sum(max(own) for own in planned) <= 10


def test_instances_are_dealt_out_each_once() -> None:
    assert units([3, 2], 2, [2, 3, 3]) == [[3], [2]]
    assert units([3, 3, 2], 3, [2, 3, 3]) == [[3], [2], [3]]
    assert units([2], 3, [2, 2, 5]) == [[2], [2]]


def test_models_of_one_size_take_turns_in_its_only_instance() -> None:
    assert units([3, 3], 2, [2, 3]) == [[3]]
    assert units([3, 3, 2], 3, [2, 3]) == [[3], [2]]


def test_shares_of_one_model_take_turns_each_in_its_instance() -> None:
    assert units([5, 3, 2], 1, [2, 3, 5]) == [[5, 3, 2]]
    assert units([5, 3, 2], 2, [2, 3, 5]) == [[5], [3, 2]]


def test_four_quarters_of_a_gpu() -> None:
    gpu = fake_gpu()
    shares = [Share(25, 32, gpu)] * 4
    assert [len(own) for own in plan_slices(shares, gpu, 4)] == [1, 1, 1, 1]
