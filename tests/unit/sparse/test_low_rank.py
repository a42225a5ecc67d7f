"""The low-rank path of a sparse layer: its formula, and that it changes nothing before it starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import DiagonalLinear, LowRank, sparsify
from dst_train.topology import Topology


@pytest.mark.parametrize(("in_features", "out_features"), [(12, 20), (20, 12)])
def test_the_path_adds_up_times_down(in_features: int, out_features: int) -> None:
    layer = DiagonalLinear(in_features, out_features, sparsity=0.7, rank=3, dtype=torch.float64)
    assert (layer.low_rank.up.shape, layer.low_rank.down.shape) == ((out_features, 3), (3, in_features))
    x = torch.randn(2, 5, in_features, dtype=torch.float64)
    nn.init.normal_(layer.low_rank.up)
    with_path, dense = layer(x), layer.to_dense()
    layer.low_rank.active = False
    path = torch.einsum("...n,rn,mr->...m", x, layer.low_rank.down, layer.low_rank.up)
    torch.testing.assert_close(with_path, layer(x) + path)
    torch.testing.assert_close(with_path, nn.functional.linear(x, dense, layer.bias))


def test_down_is_random_with_variance_1_over_in_features_and_does_not_learn() -> None:
    path = LowRank(4096, 8, 8, generator=torch.Generator().manual_seed(0))
    # 32,768 draws: the standard deviation of their variance is 0.8 %.
    assert path.down.var().item() * 4096 == pytest.approx(1.0, rel=0.04)
    assert not path.up.any()
    assert [name for name, _ in path.named_parameters()] == ["up"]
    assert sorted(path.state_dict()) == ["down", "up"]
    again = LowRank(4096, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    assert torch.equal(again.down, path.down.bfloat16())


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_does_not_fit(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank={rank}: must be from 1 to 8, the smaller side"):
        LowRank(16, 8, rank)


def test_sparsify_gives_diagonal_layers_a_path_and_counts_it() -> None:
    def build(**more: int) -> tuple[nn.Sequential, object]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
        return model, sparsify(model, [{"match": "0", "sparsity": 0.75}], **more)

    (plain, without), (model, report) = build(), build(rank=2)
    assert torch.equal(model[0].offsets, plain[0].offsets)
    assert torch.equal(model[0].values, plain[0].values)
    assert torch.equal(model[0].low_rank.down, build(rank=2)[0][0].low_rank.down)
    # up is learned; the product reads up and down.
    assert report.layers[0].parameters == without.layers[0].parameters + 32 * 2
    assert report.parameters == without.parameters + 32 * 2
    assert report.density == without.density + 2 * (16 + 32) / (16 * 32)
    with pytest.raises(ValueError, match=r"layer 0 .*rank=17: must be from 1 to 16"):
        build(rank=17)
    for pattern in ("unstructured", "sr_ste", "butterfly", "sdgp"):
        with pytest.raises(
            ValueError, match=f"rank=2: only diagonal layers have a low-rank path, this one is {pattern}"
        ):
            sparsify(nn.Sequential(nn.Linear(8, 8)), [{"match": "0", "sparsity": 0.5, "pattern": pattern}], rank=2)


def _train(rank: int, active_from: int, steps: int = 9) -> list[dict[str, Tensor]]:
    """The state of a small model after each step, with decay, clipping and topology updates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16))
    sparsify(model, [{"match": "*", "sparsity": 0.75}], rank=rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    topology = Topology(model, every=2, total_steps=12).bind(optimizer)
    states = []
    for step in range(steps):
        for module in model.modules():
            if isinstance(module, LowRank):
                module.active = step >= active_from
        optimizer.zero_grad()
        (model(torch.randn(12, 16)) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        topology.step()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return states


def test_training_is_the_same_to_the_bit_until_the_path_starts() -> None:
    without, late = _train(rank=0, active_from=0), _train(rank=3, active_from=6)
    for step in range(9):
        same = [torch.equal(without[step][name], late[step][name]) for name in without[step]]
        assert all(same) == (step < 6), step  # in step 6 clipping sees the gradient of up
        assert bool(late[step]["0.low_rank.up"].any()) == (step >= 6)
    assert torch.equal(late[0]["0.low_rank.down"], late[-1]["0.low_rank.down"])


def test_parameters_may_be_cast_without_buffers() -> None:
    """As DeepSpeed does for bf16 parameters."""
    path = LowRank(6, 5, 2)
    path.up.data = torch.randn(5, 2).bfloat16()
    x = torch.randn(3, 6).bfloat16()
    assert path(x).dtype == path.to_dense().dtype == torch.bfloat16
    torch.testing.assert_close(path(x), x @ path.to_dense().t(), rtol=2**-6, atol=2**-6)
