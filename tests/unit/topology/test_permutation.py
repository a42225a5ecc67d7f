"""Learned orders of a layer's inputs: what an update moves, by hand, and that resuming changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import DiagonalLinear, sparsify
from dst_train.topology import Ranks, Topology, editor_for
from dst_train.topology.growth import Measured
from dst_train.topology.permutation import Movable, assign_greedily, movable_positions, reorder

SHAPES = [(12, 20, 1), (20, 12, 1), (12, 12, 3)]


def _layer(in_features: int, out_features: int, band: int = 1, **more: Any) -> DiagonalLinear:
    torch.manual_seed(0)
    layer = DiagonalLinear(in_features, out_features, sparsity=0.7, band=band, permute=True, **more)
    layer.order.copy_(torch.randperm(in_features))
    return layer


@pytest.mark.parametrize(("in_features", "out_features", "band"), SHAPES)
def test_to_dense_is_the_weight_of_the_inputs_as_they_come(in_features: int, out_features: int, band: int) -> None:
    layer = _layer(in_features, out_features, band, dtype=torch.float64, rank=2)
    nn.init.normal_(layer.low_rank.up)
    x = torch.randn(3, 4, in_features, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.linear(x, layer.to_dense(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    (ours,), (theirs,) = (torch.autograd.grad(y.square().sum(), x) for y in (layer(x), expected))
    torch.testing.assert_close(ours, theirs)
    twin = DiagonalLinear(in_features, out_features, sparsity=0.7, band=band, permute=True, rank=2, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    layer.load_dense_init(torch.arange(1.0, in_features * out_features + 1).view(out_features, in_features), None)
    nn.init.zeros_(layer.low_rank.up)
    kept = layer.to_dense() * (layer.num_start / layer.num_units) ** 0.5
    expected = torch.arange(1.0, in_features * out_features + 1, dtype=torch.float64).view(out_features, in_features)
    torch.testing.assert_close(kept, expected * (kept != 0))


def test_without_a_permutation_there_is_no_buffer() -> None:
    layer = DiagonalLinear(8, 8, sparsity=0.5)
    x = torch.randn(2, 8)
    assert layer.order is None
    assert layer.arrange(x) is x
    assert "order" not in layer.state_dict()


@pytest.mark.parametrize(("in_features", "out_features", "band"), SHAPES)
def test_positions_of_values_and_gains_against_the_dense_weight(in_features: int, out_features: int, band: int) -> None:
    layer = _layer(in_features, out_features, band)
    layer.order.copy_(torch.arange(in_features))
    elements = torch.arange(layer.values.numel())
    with torch.no_grad():
        layer.values.copy_(layer.position_of(elements).view_as(layer.values) + 1.0)
    dense = layer.to_dense()
    present = dense != 0
    assert torch.equal(dense, present * torch.arange(1.0, in_features + 1))
    gradient, positions = torch.randn(out_features, in_features), torch.tensor([1, 4, 5, 11])
    blocks = [layer.position_gains(gradient[:, i : i + 5], i, positions) for i in range(0, in_features, 5)]
    expected = [[float(gradient[present[:, p], q].abs().sum()) for q in positions] for p in positions]
    torch.testing.assert_close(sum(blocks), torch.tensor(expected))


def test_inputs_are_handed_out_by_the_largest_gain() -> None:
    gains = torch.tensor([[5.0, 9.0, 1.0], [4.0, 8.0, 2.0], [7.0, 3.0, 6.0]])
    assert assign_greedily(gains).tolist() == [1, 2, 0]  # 9, then 7, and what is left
    assert assign_greedily(torch.ones(4, 4)).tolist() == [0, 1, 2, 3]
    assert assign_greedily(torch.zeros(0, 0)).tolist() == []
    random = assign_greedily(torch.rand(50, 50, generator=torch.Generator().manual_seed(0)))
    assert random.sort().values.tolist() == list(range(50))


def test_the_weakest_positions_and_their_reordering_by_hand() -> None:
    """Main diagonal and the one below it of a 20 x 20 weight: position p has the entries of rows p and p + 1."""
    layer = DiagonalLinear(20, 20, sparsity=0.9, permute=True)
    layer.replace(layer.units(), torch.tensor([0, 1]))
    with torch.no_grad():
        layer.values.fill_(1.0)
        layer.values[:, [3, 7]] = 0.1
        layer.order.copy_(torch.arange(20).flip(0))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0)
    layer(torch.randn(5, 20)).square().sum().backward()
    optimizer.step()
    editor, state = editor_for(optimizer), optimizer.state[layer.values]
    chosen = movable_positions({"other": DiagonalLinear(20, 20, sparsity=0.9), "layer": layer}, 1.0, editor, Ranks())[
        "layer"
    ]
    assert chosen.positions.tolist() == [3, 7]  # a tenth
    assert chosen.second_moment == pytest.approx(float(state["exp_avg_sq"].mean()))
    before = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    assert reorder(layer, chosen, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), editor, 3.0) == 0
    assert layer.order.tolist() == list(range(20))[::-1]
    assert reorder(layer, chosen, torch.tensor([[1.0, 3.0], [2.0, 1.0]]), editor, 3.0) == 2
    assert (layer.order[3], layer.order[7]) == (12, 16)
    assert layer.order.sort().values.tolist() == list(range(20))
    others = [p for p in range(20) if p not in (3, 7)]
    for tensor, value in (
        (layer.values, 0.0),
        (state["exp_avg"], 0.0),
        (state["exp_avg_sq"], 3.0 * chosen.second_moment),
    ):
        torch.testing.assert_close(tensor[:, [3, 7]], torch.full((2, 2), value))
    assert all(torch.equal(state[key][:, others], old[:, others]) for key, old in before.items())


@pytest.mark.parametrize(("drop_fraction", "count"), [(0.0, 0), (0.1, 0), (0.3, 2), (0.6, 2), (1.0, 3)])
def test_a_single_position_is_never_chosen(drop_fraction: float, count: int) -> None:
    """It could only keep its input: an order that is to be learned would never change."""
    layer = DiagonalLinear(30, 30, sparsity=0.9, permute=True)
    editor = editor_for(torch.optim.AdamW(layer.parameters()))
    (chosen,) = movable_positions({"": layer}, drop_fraction, editor, Ranks()).values()
    assert len(chosen.positions) == count


def test_free_slots_stay_zero() -> None:
    layer = DiagonalLinear(20, 20, sparsity=0.9, explore=2.0, permute=True)
    layer.replace(layer.units()[:2], torch.tensor([], dtype=torch.int64))
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(5, 20)).square().sum().backward()
    optimizer.step()
    reorder(layer, Movable(torch.tensor([0, 1]), 0.5), torch.eye(2).flip(0), editor_for(optimizer), 1.0)
    assert not optimizer.state[layer.values]["exp_avg_sq"].view(4, 20)[:2].eq(0.5).any()


def test_the_second_moment_is_that_of_the_weights_that_are_there() -> None:
    """Of units that were dropped without a successor nothing is left that counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.GELU(), nn.Linear(60, 30))
    sparsify(model, [{"match": "*", "sparsity": 0.8, "permute": "learned"}], explore=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    editor = editor_for(optimizer)
    topology = Topology(model, method="rigl", every=2, total_steps=40, cold_start=5.0).bind(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(12, 40)).square().mean().backward()
        optimizer.step()
        topology.step()
    layer = model[0]
    assert isinstance(layer, DiagonalLinear)
    active = layer.units() >= 0
    assert not active.all()
    second = optimizer.state[layer.values]["exp_avg_sq"]
    (chosen,) = movable_positions({"0": layer}, 1.0, editor, Ranks()).values()
    assert chosen.second_moment == pytest.approx(float(second[active].double().mean()))


def _start(method: str = "rigl", **more: Any) -> tuple[nn.Sequential, Topology, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.GELU(), nn.Linear(60, 30))
    sparsify(model, [{"match": "*", "sparsity": 0.8, "permute": "learned"}])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    topology = Topology(model, method=method, every=2, total_steps=20, drop_fraction=1.0, **more)
    return model, topology.bind(optimizer), optimizer


def _train(parts: tuple[nn.Sequential, Topology, torch.optim.Optimizer], steps: range, accumulation: int = 1) -> list:
    model, topology, optimizer = parts
    updates = []
    for step in steps:
        x = torch.randn(12, 40, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        for part in x.chunk(accumulation):
            (model(part).square().mean() / accumulation).backward()
        optimizer.step()
        updates.append(topology.step())
    return [update for update in updates if update is not None]


def _orders(model: nn.Sequential) -> list[list[int]]:
    return [layer.order.tolist() for layer in model if isinstance(layer, DiagonalLinear)]


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_orders_change_and_stay_permutations(method: str) -> None:
    parts = _start(method)
    digest = parts[1].digest()
    parts[0][0].order.copy_(parts[0][0].order.flip(0))
    assert parts[1].digest() != digest
    parts[0][0].order.copy_(parts[0][0].order.flip(0))
    assert parts[1].digest() == digest
    updates = _train(parts, range(15))
    for index, inputs in enumerate((40, 60)):
        moved = [update.layers[index].moved for update in updates]
        assert 0 < max(moved) <= inputs // 10
    for order in _orders(parts[0]):
        assert sorted(order) == list(range(len(order)))


def test_growth_scores_are_of_the_inputs_as_the_weight_sees_them() -> None:
    model, topology, _ = parts = _start("rigl", accumulation=2)
    layer = model[0]
    layer.order.copy_(torch.randperm(40))
    _train(parts, range(1), accumulation=2)
    seen: dict[str, Tensor] = {}
    take = topology._signal.take

    def noted() -> Measured:
        measured = take()
        seen.update(measured.scores)
        return measured

    topology._signal.take = noted  # type: ignore[method-assign]
    # The gradient of the effective weight, in the order of the positions, by a dense twin.
    weight = layer.to_dense().detach().requires_grad_()
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(1))
    hidden = nn.functional.gelu(nn.functional.linear(x, weight, layer.bias))
    nn.functional.linear(hidden, model[2].to_dense(), model[2].bias).square().mean().backward()
    gradient = weight.grad[:, layer.order.long()].abs()
    order = _orders(model)[0]
    _train(parts, range(1, 2), accumulation=2)
    assert _orders(model)[0] != order
    rows, columns = torch.arange(60)[:, None], torch.arange(40)
    expected = torch.stack([gradient[(rows - columns) % 60 == unit].mean() for unit in range(60)])
    torch.testing.assert_close(seen["0"].float(), expected)


def test_a_local_signal_hands_out_inputs_too() -> None:
    parts = _start("rigl", grow_signal="local")
    assert sum(update.layers[0].moved for update in _train(parts, range(10))) > 0


def test_resuming_gives_the_same_to_the_bit() -> None:
    whole = _start()
    _train(whole, range(5))
    saved = copy.deepcopy([part.state_dict() for part in whole])
    updates = _train(whole, range(5, 12))
    again = _start()
    for index in (0, 2, 1):
        again[index].load_state_dict(saved[index])
    repeated = _train(again, range(5, 12))
    assert [u.digest for u in repeated] == [u.digest for u in updates]
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), again[0].parameters(), strict=True))
    assert _orders(whole[0]) == _orders(again[0])


def test_a_static_topology_never_reorders() -> None:
    with pytest.raises(ValueError, match="layer 0 has a permutation, which method='static' never changes"):
        _start("static")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"permute": "random"}, "permute 'random' is unknown; choose one of none, learned"),
        ({"permute": "learned", "pattern": "unstructured"}, "permute belongs to diagonal, not to unstructured"),
    ],
)
def test_rules_that_cannot_be(rule: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(nn.Sequential(nn.Linear(8, 8)), [{"match": "0", "sparsity": 0.5, **rule}])
