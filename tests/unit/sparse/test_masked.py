"""MaskedLinear against masks worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from dst_train.sparse import MaskedLinear


def _layer(pattern: str, sparsity: float = 0.75, size: int = 1, **kwargs: Any) -> MaskedLinear:
    torch.manual_seed(0)
    return MaskedLinear(8, 12, pattern=pattern, sparsity=sparsity, size=size, **kwargs)


def test_masks_have_the_form_of_their_pattern() -> None:
    assert _layer("unstructured").mask.sum() == 24
    assert _layer("constant_fan_in").mask.sum(1).tolist() == [2] * 12
    assert (_layer("n_m", size=4).mask.view(24, 4).sum(1) == 1).all()
    wise = _layer("tile_wise", size=3).mask
    assert wise.sum() == 24
    assert torch.equal(wise[::3].repeat_interleave(3, 0), wise)
    tiles = _layer("block", size=4, sparsity=0.5).mask.view(3, 4, 2, 4).float().mean((1, 3))
    assert sorted(tiles.flatten().tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("pattern", "size", "units", "groups", "entries"),
    [
        ("unstructured", 1, 96, 1, 1),
        ("constant_fan_in", 1, 96, 12, 1),
        ("n_m", 4, 96, 24, 1),
        ("block", 2, 24, 1, 4),
        ("tile_wise", 3, 32, 1, 3),
        ("shuffled_block", 1, 96, 1, 1),
        ("shuffled_block", 2, 24, 1, 4),
    ],
)
def test_units_partition_the_weight(pattern: str, size: int, units: int, groups: int, entries: int) -> None:
    layer = _layer(pattern, size=size)
    assert (layer.num_units, layer.num_groups, layer.unit_entries) == (units, groups, entries)
    slots = layer.slot_of(torch.arange(96))
    assert slots.bincount().tolist() == [entries] * units
    for slot in (0, units // 2, units - 1):
        assert torch.equal(slots[layer.elements(torch.tensor([slot]))], torch.full((entries,), slot))
    # Groups are runs of units, and of elements: rows, or N:M groups along a row.
    if groups > 1:
        assert torch.equal(slots // (units // groups), torch.arange(96) // (96 // groups))


@pytest.mark.parametrize(
    ("pattern", "size"), [("unstructured", 1), ("n_m", 4), ("block", 2), ("tile_wise", 3), ("shuffled_block", 1)]
)
def test_replace_moves_whole_units(pattern: str, size: int) -> None:
    layer = _layer(pattern, size=size)
    before = layer.units()
    dropped = before[before >= 0][:2]
    grown = torch.nonzero(before < 0).flatten()[:2]
    touched = layer.replace(dropped, grown)
    assert set(touched.tolist()) == {*dropped.tolist(), *grown.tolist()}
    after = layer.units()
    assert (after[dropped] == -1).all()
    assert torch.equal(after[grown], grown)
    changed = torch.nonzero((before >= 0) != (after >= 0)).flatten()
    assert set(changed.tolist()) == set(touched.tolist())
    expected = torch.zeros(96, dtype=torch.bool)
    expected[layer.elements(after[after >= 0])] = True
    assert torch.equal(layer.mask.flatten(), expected)


def test_shuffled_blocks_are_blocks_in_another_order_that_a_checkpoint_carries() -> None:
    layer = _layer("shuffled_block", size=2, sparsity=0.5)
    rows, columns = layer.rows.argsort(), layer.columns.argsort()
    assert rows.tolist() != list(range(12))
    tiles = layer.mask[rows][:, columns].view(6, 2, 4, 2).float().mean((1, 3)).flatten()
    assert sorted(tiles.tolist()) == [0.0] * 12 + [1.0] * 12
    assert torch.equal(tiles.bool(), layer.units() >= 0)
    elements = layer.elements(torch.tensor([3]))
    assert layer.slot_of(elements).tolist() == [3] * 4
    at = {(layer.rows[e // 8].item() // 2, layer.columns[e % 8].item() // 2) for e in elements.tolist()}
    assert at == {(0, 3)}
    other = MaskedLinear(8, 12, pattern="shuffled_block", sparsity=0.5, size=2)
    assert not torch.equal(other.rows, layer.rows)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.units(), layer.units())
    assert torch.equal(other.slot_of(torch.arange(96)), layer.slot_of(torch.arange(96)))


def test_forward_gradient_and_scores() -> None:
    layer = _layer("block", size=2, dtype=torch.float64)
    x, dy = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight * layer.mask, layer.bias))
    y.backward(dy)
    gradient = dy.t() @ x
    torch.testing.assert_close(layer.weight.grad, gradient * layer.mask, rtol=1e-12, atol=1e-12)
    expected = gradient.abs().view(6, 2, 4, 2).mean((1, 3)).flatten().float()
    # Products of 5 tokens in float32.
    torch.testing.assert_close(layer.unit_scores(x, dy, None), expected, rtol=1e-5, atol=1e-5)
    doubled = layer.unit_scores(x, dy, lambda block, first_column: 2 * block)
    torch.testing.assert_close(doubled, 2 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("explore", [1.0, 2.0])
def test_initial_values_have_the_variance_of_those_that_stay_and_are_zero_where_absent(explore: float) -> None:
    layer = _layer("unstructured", explore=explore)
    weight = torch.randn(12, 8)
    layer.load_dense_init(weight, torch.ones(12))
    torch.testing.assert_close(layer.weight, weight * 2 * layer.mask)
    assert torch.equal(layer.to_dense(), layer.weight)
    assert (layer.bias == 1).all()


def test_explore_starts_with_more_units_in_every_group() -> None:
    layer = _layer("constant_fan_in", explore=2.0)
    assert (layer.num_start, layer.num_final) == (48, 24)
    assert layer.mask.sum(1).tolist() == [4] * 12
    assert _layer("n_m", size=4, explore=math.inf).mask.all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pattern": "spiral"}, "pattern='spiral': choose one of unstructured"),
        ({"pattern": "unstructured", "sparsity": 1.0}, r"sparsity=1.0: must be in \[0, 1\)"),
        ({"pattern": "unstructured", "explore": 0.0}, "explore=0.0: must be at least 1"),
        ({"pattern": "n_m", "size": 3}, "size=3: must divide in_features=8"),
        ({"pattern": "tile_wise", "size": 8}, "size=8: must divide out_features=12"),
        ({"pattern": "block", "size": 8}, "size=8: must divide out_features=12"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _layer(**kwargs)
