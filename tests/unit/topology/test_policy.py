"""The pure decisions, against rules worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dst_train.topology import policy


def test_drop_fraction_decays_by_cosine() -> None:
    assert policy.cosine_drop_fraction(0.3, 0, 100) == pytest.approx(0.3)
    assert policy.cosine_drop_fraction(0.3, 50, 100) == pytest.approx(0.15)
    assert policy.cosine_drop_fraction(0.3, 25, 100) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert policy.cosine_drop_fraction(0.3, 100, 100) == 0.0


def test_explore_shrinks_by_cosine_over_the_first_two_fifths() -> None:
    assert policy.active_count(20, 10, 0, 100) == 20
    assert policy.active_count(20, 10, 20, 100) == 15
    assert policy.active_count(20, 10, 10, 100) == round(10 + 5 * (1 + math.sqrt(0.5)))
    assert policy.active_count(20, 10, 40, 100) == policy.active_count(20, 10, 90, 100) == 10


def test_temperature_falls_by_cosine_and_stays() -> None:
    assert policy.temperature(5.0, 1.0, 0, 80) == 5.0
    assert policy.temperature(5.0, 1.0, 40, 80) == pytest.approx(3.0)
    assert policy.temperature(5.0, 1.0, 80, 80) == policy.temperature(5.0, 1.0, 99, 80) == 1.0


def _numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _all_but(count: int, *absent: int) -> torch.Tensor:
    among = torch.ones(count, dtype=torch.bool)
    among[list(absent)] = False
    return among


def test_lowest_breaks_ties_by_unit_and_tells_the_margin() -> None:
    scores = _numbers(3.0, 0.0, 1.0, 1.0, 4.0, 1.0)
    units, margin = policy.lowest(scores, _all_but(6, 1), 2)
    assert (units.tolist(), margin) == ([2, 3], 0.0)
    units, margin = policy.lowest(scores, _all_but(6, 1), 4)
    assert (units.tolist(), margin) == ([0, 2, 3, 5], 0.25)
    assert policy.lowest(scores, _all_but(6, 1), 5)[1] is None  # nothing is passed over
    assert policy.lowest(scores, _all_but(6, 1), 0)[1] is None


def test_highest_breaks_ties_by_unit() -> None:
    scores = _numbers(9.0, 5.0, 7.0, 5.0, 7.0, 1.0)
    units, margin = policy.highest(scores, _all_but(6, 0), 3)
    assert (units.tolist(), margin) == ([1, 2, 4], 0.0)
    assert policy.highest(scores, _all_but(6, 0), 2)[1] == pytest.approx(2 / 7)


def test_sampled_is_in_proportion_to_weight() -> None:
    weight = _numbers(1.0, 0.0, 3.0)
    orders = [policy.sampled(weight, (draw,)).argsort(descending=True).tolist() for draw in range(2000)]
    # 3 standard deviations of 2000 draws of probability 3/4 are 0.03.
    assert sum(order[0] == 2 for order in orders) / 2000 == pytest.approx(0.75, abs=0.03)
    assert all(order[2] == 1 for order in orders)
    assert torch.equal(policy.sampled(weight, (7,)), policy.sampled(weight, (7,)))


def test_each_group_gives_equally_many() -> None:
    scores = _numbers(1.0, 2.0, 8.0, 4.0, 6.0, 5.0)
    units, margin = policy.lowest(scores, _all_but(6, 0), 1, groups=2)
    assert (units.tolist(), margin) == ([1, 3], pytest.approx(0.2))  # of 2 against 8 and of 4 against 5


def test_random_scores_are_a_function_of_their_key() -> None:
    state = torch.get_rng_state()
    drawn = policy.random_scores(50, (0, 2, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(drawn, policy.random_scores(50, (0, 2, 5)))
    for key in ((1, 2, 5), (0, 3, 5), (0, 2, 6)):
        assert not torch.equal(drawn, policy.random_scores(50, key))
