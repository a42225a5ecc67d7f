"""dynadiag in one process: what an update makes of alpha, how the surplus of units goes, and the soft gate of the paper."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import DiagonalLinear, sparse_layers, sparsify
from dst_train.topology import Topology, TopologyUpdate, methods


def _start(gate: str = "straight_through", explore: float = 2.0, **kwargs: Any) -> tuple[nn.Sequential, Topology, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 4))
    sparsify(model, [{"match": "[02]", "sparsity": 0.75}], explore=explore, gate=gate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    kwargs = {"every": 2, "total_steps": 40, **kwargs}
    return model, Topology(model, method="dynadiag", **kwargs).bind(optimizer), optimizer


def _train(
    model: nn.Module, topology: Topology, optimizer: Any, steps: int, applied: bool = True
) -> list[TopologyUpdate | None]:
    torch.manual_seed(topology.steps)
    updates = []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(12, 16)
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
        updates.append(topology.step(applied))
    return updates


def _state(layer: DiagonalLinear, optimizer: Any) -> dict[str, Tensor]:
    state = {"alpha": layer.alpha, "values": layer.values, "units": layer.units()}
    for name, parameter in (("alpha", layer.alpha), ("values", layer.values)):
        state |= {f"{name}.{k}": v for k, v in optimizer.state[parameter].items()}
    return {key: tensor.detach().clone() for key, tensor in state.items()}


def test_an_update_by_hand() -> None:
    """Explore 1: as many grow as are dropped. The steps of the rule are written out with Python's own sorting."""
    model, topology, optimizer = _start(explore=1.0, drop_fraction=0.5)
    layers = sparse_layers(model)
    _train(model, topology, optimizer, 3)  # the first update is at 2: what it made is the state to judge from
    signal: dict[str, Tensor] = {}
    before: dict[str, dict[str, Tensor]] = {}

    def snapshot(*_: Any) -> None:
        signal.update({name: score.double() for name, score in topology._signal._scores.items()})
        before.update({name: _state(layer, optimizer) for name, layer in layers.items()})

    optimizer.register_step_post_hook(snapshot)
    (update,) = (u for u in _train(model, topology, optimizer, 1) if u is not None)
    for change in update.layers:
        layer, old = layers[change.name], before[change.name]
        active = old["units"].tolist()
        absent = [u for u in range(48) if u not in active]
        count = round(0.25 * (1 + math.cos(math.pi * 4 / 30)) * 12)
        size = dict(zip(active, old["values"].abs().mean(1).tolist(), strict=True))
        alpha = old["alpha"].double()
        pool = sorted(active, key=size.__getitem__)[: 2 * count]
        dropped = sorted(pool, key=lambda u: float(alpha[u]))[:count]
        assert change.dropped == tuple(sorted(dropped))
        z = signal[change.name][absent]
        z = (z - z.mean()) / z.std(correction=0)
        wish = dict(zip(absent, (0.7 * alpha[absent] + 0.3 * z).tolist(), strict=True))
        grown = sorted(absent, key=lambda u: -wish[u])[:count]
        assert change.grown == tuple(sorted(grown))
        kept = [u for u in active if u not in dropped]
        new = _state(layer, optimizer)
        expected = alpha.clone()
        expected[absent] = torch.tensor([wish[u] for u in absent], dtype=torch.float64)
        expected[grown] = alpha[kept].mean()
        torch.testing.assert_close(new["alpha"].double(), expected, rtol=2**-22, atol=1e-12)
        assert torch.equal(new["alpha"][kept], old["alpha"][kept])
        others = [u for u in range(48) if u not in kept]
        for key in ("alpha.exp_avg", "alpha.exp_avg_sq"):
            assert torch.equal(new[key][kept], old[key][kept])
        assert not new["alpha.exp_avg"][others].any()
        mean = old["alpha.exp_avg_sq"][kept].double().mean().float()
        assert torch.equal(new["alpha.exp_avg_sq"][others], mean.expand(len(others)))
        assert change.gates is not None
        assert sum(change.gates) == pytest.approx(12, rel=1e-5)
        assert change.effective_units == pytest.approx(12**2 / sum(g * g for g in change.gates), rel=1e-5)
        assert change.temperature is None


def test_alpha_knows_only_the_units_that_are_active() -> None:
    model, topology, optimizer = _start()
    _train(model, topology, optimizer, 1)
    for layer in sparse_layers(model).values():
        active = torch.zeros(48, dtype=torch.bool)
        active[layer.units()] = True
        assert layer.alpha[active].all()
        assert not layer.alpha[~active].any()
        assert layer.alpha.grad[active].sum().abs() < 1e-6  # a softmax does not care for a constant


def test_the_surplus_goes_by_cosine_and_freed_rows_stay_zero() -> None:
    model, topology, optimizer = _start()
    counts = []
    for step, update in enumerate(_train(model, topology, optimizer, 40), 1):
        if update is not None:
            expected = round(12 + 6 * (1 + math.cos(math.pi * min(1.0, step / 12))))
            assert [len(change.active) for change in update.layers] == [expected, expected]
            assert all(len(c.dropped) >= len(c.grown) for c in update.layers)
            counts.append(expected)
    assert counts[0] > counts[2] > counts[5] == counts[-1] == 12
    for layer in sparse_layers(model).values():
        assert layer.num_active == layer.num_final == 12
        free = layer.units() < 0
        assert free.sum() == 12
        for tensor in (layer.values, *(optimizer.state[layer.values][k] for k in ("exp_avg",))):
            assert not tensor[free].any()
        assert (layer.to_dense() != 0).sum() == 12 * 16


def test_the_last_update_leaves_no_surplus() -> None:
    model, topology, optimizer = _start(every=13)  # 13 and 26 of 30 steps
    last = [u for u in _train(model, topology, optimizer, 30) if u is not None][-1]
    assert last.step == 26
    model, topology, optimizer = _start(every=16, until=0.5)  # only step 16, after 40 % of 20
    (only,) = (u for u in _train(model, topology, optimizer, 20) if u is not None)
    model, topology, optimizer = _start(every=20, until=1.0)  # only step 20 of 40: not yet the last 60 %
    assert all(len(change.active) == 12 for u in (last, only) for change in u.layers)
    model, topology, optimizer = _start(every=6, total_steps=20, until=0.5)  # only step 6 of 10
    (only,) = (u for u in _train(model, topology, optimizer, 10) if u is not None)
    assert all(len(change.active) == 12 for change in only.layers)


def test_without_surplus_rigl_can_explore_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 4))
    sparsify(model, [{"match": "0", "sparsity": 0.75}], explore=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    topology = Topology(model, method="rigl", every=2, total_steps=40).bind(optimizer)
    updates = [u for u in _train(model, topology, optimizer, 40) if u is not None]
    assert len(updates[0].layers[0].active) > len(updates[-1].layers[0].active) == 12
    assert updates[0].layers[0].gates is None


def test_the_soft_gate_competes_until_the_end_and_then_only_the_best_stay() -> None:
    model, topology, optimizer = _start("soft", math.inf, temperature=(4.0, 0.5))
    updates: list[TopologyUpdate] = []
    alpha: dict[str, Tensor] = {}
    for step in range(1, 41):
        (layer, _) = sparse_layers(model).values()
        assert layer.temperature == pytest.approx(0.5 + 1.75 * (1 + math.cos(math.pi * min(1.0, step / 30))))
        active = layer.units()[layer.units() >= 0]
        assert layer.alpha is not None
        assert torch.equal(layer.gates(layer.alpha, active), torch.ones(12)) == (step > 28)
        (update,) = _train(model, topology, optimizer, 1)
        updates += [] if update is None else [update]
        if step == 28:
            alpha = {name: layer.alpha.detach().clone() for name, layer in sparse_layers(model).items()}
    *observed, last = updates
    assert last.step == 28
    for update in observed:
        assert all(not c.dropped and not c.grown and len(c.active) == 48 for c in update.layers)
        assert all(c.effective_units is not None and c.temperature is not None for c in update.layers)
    for change in last.layers:
        assert change.gates == (1.0,) * 12
        assert set(change.active) == set(alpha[change.name].argsort(descending=True)[:12].tolist())
    for layer in sparse_layers(model).values():
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(
            layer(x), nn.functional.linear(x, layer.to_dense(), layer.bias), rtol=1e-5, atol=1e-5
        )
        assert layer.alpha is not None
        assert layer.alpha.grad is not None  # None would leave the last one in ZeRO 3's buffers
        assert not layer.alpha.grad.any()
    fresh, _, _ = _start("soft", math.inf)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(fresh(x), model(x))


def test_a_delayed_update_is_not_taken_for_the_last() -> None:
    """Those of steps 10 and 20; the first comes at 19, as steps were skipped, and step 29 is beyond the end."""
    model, topology, optimizer = _start("soft", math.inf, every=10, total_steps=29, until=1.0)
    _train(model, topology, optimizer, 18, applied=False)
    (delayed, last) = (u for u in _train(model, topology, optimizer, 10) if u is not None)
    assert [(u.step, len(u.layers[0].active)) for u in (delayed, last)] == [(19, 48), (20, 12)]


def test_what_a_settled_layer_remembers_moves_with_it() -> None:
    model, topology, optimizer = _start()
    _train(model, topology, optimizer, 40)
    (layer, _) = sparse_layers(model).values()
    assert layer.num_active < layer.units().numel()
    assert {b.device.type for b in layer.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize(("gate", "explore", "steps"), [("straight_through", 2.0, 9), ("soft", math.inf, 29)])
def test_state_dict_continues_exactly(gate: str, explore: float, steps: int) -> None:
    model, topology, optimizer = _start(gate, explore)
    _train(model, topology, optimizer, steps)
    twin, other, other_optimizer = _start(gate, explore)
    twin.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(topology.state_dict())
    ours, theirs = _train(model, topology, optimizer, 8), _train(twin, other, other_optimizer, 8)
    assert [u and (u.digest, u.layers) for u in ours] == [u and (u.digest, u.layers) for u in theirs]
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_absent_alphas_follow_the_signal() -> None:
    active = torch.tensor([True, False, False, False])
    alpha = torch.tensor([5.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    gradient = torch.tensor([100.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    z = math.sqrt(1.5)  # (3 - 2) / sqrt(2 / 3)
    expected = torch.tensor([5.0, 0.7 - 0.3 * z, 0.0, -0.7 + 0.3 * z], dtype=torch.float64)
    torch.testing.assert_close(methods.blended(alpha, gradient, active), expected)
    assert torch.equal(methods.blended(alpha, gradient, torch.ones(4, dtype=torch.bool)), alpha)
    equal = methods.blended(alpha, torch.ones(4, dtype=torch.float64), active)  # no spread: no pull to either side
    torch.testing.assert_close(equal, torch.tensor([5.0, 0.7, 0.0, -0.7], dtype=torch.float64))


@pytest.mark.parametrize(
    ("sparse", "method", "message"),
    [
        (
            {},
            {"method": "dynadiag"},
            "layer 0 has gate=None and method='dynadiag' needs gates.*gate='straight_through'",
        ),
        ({"gate": "soft"}, {"method": "rigl"}, "layer 0 has gate='soft' and method='rigl' does not take gates"),
        (
            {"gate": "soft", "explore": 2.0},
            {"method": "dynadiag"},
            "layer 0 starts with 8 of 16 units and gate='soft': under the soft gate nothing grows.*explore=math.inf",
        ),
        ({"explore": 2.0}, {"method": "static"}, "layer 0 starts with 8 units and is to keep 4, but no update comes"),
        ({"explore": 2.0}, {"method": "set", "every": 8}, r"every=8, until \* total_steps=7"),
        ({}, {"method": "set", "temperature": (1.0, 0.0)}, r"temperature=\(1.0, 0.0\): both must be above 0"),
    ],
)
def test_what_does_not_fit_is_named(sparse: dict[str, Any], method: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    sparsify(model, [{"match": "*", "sparsity": 0.75}], **sparse)
    with pytest.raises(ValueError, match=message):
        Topology(model, total_steps=10, **{"every": 2, **method})


def test_where_nothing_is_kept_alpha_is_written_too() -> None:
    """What has grown gets the mean of what was there, and the gates that are told of are those that the layer has."""
    model, topology, optimizer = _start(explore=1.0, drop_fraction=1.0, every=1, total_steps=1000)
    _train(model, topology, optimizer, 1)
    before = model[0].alpha.detach().clone()
    active = model[0].units()
    (update,) = _train(model, topology, optimizer, 1)
    assert update is not None
    change = update.layers[0]
    assert sorted(change.dropped) == active.sort().values.tolist()
    assert not torch.equal(model[0].alpha, before)
    gates = model[0].gates(model[0].alpha.detach(), torch.tensor(change.active))
    torch.testing.assert_close(gates, torch.tensor(change.gates))
    assert gates.tolist() == pytest.approx(len(change.active) * [1.0], rel=1e-6)
