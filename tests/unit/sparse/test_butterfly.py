"""Pixelated Butterfly against masks and budgets worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst_train.sparse import ButterflyLinear, sparse_layers, sparsify
from dst_train.sparse.butterfly import flat_butterfly


def test_flat_butterfly_by_hand() -> None:
    assert flat_butterfly(4, 1).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert flat_butterfly(4, 2).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]


def test_equals_the_sum_of_butterfly_factors() -> None:
    """A factor of stride s has, in each diagonal block of 2 s, all entries at distance 0 or s."""
    total = torch.zeros(16, 16)
    for stride in (1, 2, 4):
        one = torch.eye(stride)
        total += torch.block_diag(*[torch.cat([torch.cat([one, one], 1), torch.cat([one, one], 1)])] * (8 // stride))
    assert torch.equal(flat_butterfly(16, 3), total > 0)


def test_budget_by_hand() -> None:
    # 16 x 64 = 1024 entries, 8 x 8 blocks of 2 x 8. Of 512 entries 384 may be B's: 3 of 8 blocks of a row, the identity and two
    # factors. 128 are left, and a rank takes 16 + 64.
    layer = ButterflyLinear(64, 16, sparsity=0.5, size=2)
    assert (layer.blocks, layer.factors, int(layer.mask.sum())) == (8, 2, 384)
    assert (layer.rank, layer.num_final) == (1, 384 + 80)
    # Of 410 entries 307 may be B's: 2.4 of 8 blocks of a row: the identity and one factor, 256; 154 are left.
    layer = ButterflyLinear(64, 16, sparsity=0.6, size=2)
    assert (layer.factors, int(layer.mask.sum()), layer.rank) == (1, 256, 1)
    assert torch.equal(layer.mask, flat_butterfly(8, 1).repeat_interleave(2, 0).repeat_interleave(8, 1))


def test_forward_and_gradient() -> None:
    torch.manual_seed(0)
    layer = ButterflyLinear(16, 32, sparsity=0.6, size=2, dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        layer.mix.fill_(0.7)
    g = torch.sigmoid(torch.tensor(0.7, dtype=torch.float64))
    dense = g * layer.weight * layer.mask + (1 - g) * layer.up @ layer.down
    torch.testing.assert_close(layer(x), x @ dense.t() + layer.bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.to_dense(), dense, rtol=1e-12, atol=1e-12)
    layer(x).square().sum().backward()
    assert not layer.weight.grad[~layer.mask].any()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())


def test_a_rule_makes_it_and_the_output_varies_as_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    x = torch.randn(512, 256)
    before = float(model(x).detach().var())
    report = sparsify(model, [{"match": "0", "sparsity": 0.8, "pattern": "butterfly", "size": 16}])
    assert isinstance(model[0], ButterflyLinear)
    assert report.density == model[0].num_final / 256**2 == pytest.approx(0.2, abs=512 / 256**2)
    assert not sparse_layers(model)
    # Equal in expectation; seeds are 1 % off.
    assert float(model(x).detach().var()) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.0, "size": 2}, r"sparsity=1.0: must be in \[0, 1\)"),
        ({"sparsity": 0.5, "size": 5}, "size=5: must cut 32 x 16 into n x n blocks with n = 16 / size a power of 2"),
        ({"sparsity": 0.5, "size": 16}, "size=16: must cut"),
        (
            {"sparsity": 0.9, "size": 2},
            "sparsity=0.9: blocks of size 2 need a density of 0.3333; use a smaller size or",
        ),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ButterflyLinear(16, 32, **kwargs)


def test_over_zeros_the_low_rank_part_learns() -> None:
    layer = ButterflyLinear(64, 16, sparsity=0.5, size=2)
    layer.load_dense_init(torch.zeros(16, 64), None)
    assert not layer.to_dense().any()
    layer(torch.randn(4, 64)).sub(1.0).square().mean().backward()
    assert layer.up.grad.any()
