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


def test_smallest_takes_slots_and_breaks_ties_by_unit() -> None:
    scores = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0])
    units = torch.tensor([4, 9, 2, 0, 7])
    # Units 2 (slot 2), 7 (slot 4), 9 (slot 1) tie at 1.0.
    assert policy.smallest(scores, units, 2).tolist() == [2, 4]
    assert policy.smallest(scores, units, 4).tolist() == [2, 4, 1, 0]


def test_largest_inactive_breaks_ties_by_unit() -> None:
    scores = torch.tensor([9.0, 5.0, 7.0, 5.0, 7.0, 1.0])
    assert policy.largest_inactive(scores, torch.tensor([0]), 3).tolist() == [2, 4, 1]


def test_random_inactive_is_a_function_of_its_key() -> None:
    units = torch.tensor([3, 1])
    state = torch.get_rng_state()
    drawn = policy.random_inactive(units, 50, 10, (0, 2, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(drawn, policy.random_inactive(units, 50, 10, (0, 2, 5)))
    assert not set(drawn.tolist()) & {3, 1}
    assert drawn.unique().numel() == 10
    for key in ((1, 2, 5), (0, 3, 5), (0, 2, 6)):
        assert not torch.equal(drawn, policy.random_inactive(units, 50, 10, key))
