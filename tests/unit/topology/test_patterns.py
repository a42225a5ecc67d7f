"""Masked layers under the same topology: whole groups, the largest gradients, zeros where nothing is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import MaskedLinear, sparsify
from dst_train.topology import Topology

PATTERNS = [
    ("unstructured", 1),
    ("constant_fan_in", 1),
    ("n_m", 4),
    ("block", 4),
    ("shuffled_block", 4),
    ("shuffled_block", 1),
    ("tile_wise", 4),
]


def _start(pattern: str, size: int, method: str, **kwargs: Any) -> tuple[MaskedLinear, Topology, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24))
    sparsify(model, [{"match": "0", "sparsity": 0.5, "pattern": pattern, "size": size}])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    topology = Topology(model, method=method, every=1, total_steps=40, **kwargs).bind(optimizer)
    return model[0], topology, optimizer


def _step(layer: MaskedLinear, topology: Topology, optimizer: torch.optim.Optimizer) -> tuple[Any, Tensor]:
    """The update, and the dense gradient of its step."""
    x, target = torch.randn(6, 16), torch.randn(6, 24)
    optimizer.zero_grad()
    y = layer(x)
    (y - target).square().mean().backward()
    optimizer.step()
    return topology.step(), (2 / y.numel() * (y - target)).detach().t() @ x


@pytest.mark.parametrize("method", ["set", "rigl", "mest"])
@pytest.mark.parametrize(("pattern", "size"), PATTERNS)
def test_updates_keep_the_pattern_and_zeros(pattern: str, size: int, method: str) -> None:
    layer, topology, optimizer = _start(pattern, size, method)
    start = layer.mask.clone()
    for number in range(10):
        update, _ = _step(layer, topology, optimizer)
        in_groups = (layer.units() >= 0).view(layer.num_groups, -1).sum(1)
        assert torch.equal(in_groups, in_groups[:1].expand_as(in_groups))
        assert layer.num_active == layer.num_final
        assert len(update.layers[0].grown) == len(update.layers[0].dropped)
        assert update.layers[0].grown or number > 5  # 2 of 4: the fraction soon rounds to none
        state = optimizer.state[layer.weight]
        for tensor in (layer.weight, state["exp_avg"]):
            assert not tensor[~layer.mask].any()
    assert not torch.equal(start, layer.mask)


@pytest.mark.parametrize(("pattern", "size"), PATTERNS)
def test_rigl_drops_the_smallest_and_grows_the_largest_of_each_group(pattern: str, size: int) -> None:
    layer, topology, optimizer = _start(pattern, size, "rigl", drop_fraction=0.5)
    units = layer.slot_of(torch.arange(16 * 24))
    seen: dict[str, Tensor] = {}
    optimizer.register_step_post_hook(lambda *_: seen.update(weight=layer.weight.detach().clone(), held=layer.units()))
    update, gradient = _step(layer, topology, optimizer)

    def by_unit(matrix: Tensor) -> Tensor:
        return torch.zeros(layer.num_units, dtype=torch.float64).index_add_(0, units, matrix.abs().flatten().double())

    value, wish, active = by_unit(seen["weight"]), by_unit(gradient), seen["held"] >= 0
    size_of_group = layer.num_units // layer.num_groups
    dropped, grown = set(), set()
    for group in range(layer.num_groups):
        members = range(group * size_of_group, (group + 1) * size_of_group)
        present, absent = [u for u in members if active[u]], [u for u in members if not active[u]]
        count = min(round(update.drop_fraction * len(present)), len(absent))
        dropped |= set(sorted(present, key=lambda u: float(value[u]))[:count])
        grown |= set(sorted(absent, key=lambda u: -float(wish[u]))[:count])
    (change,) = update.layers
    assert set(change.dropped) == dropped
    assert set(change.grown) == grown
    assert change.uncovered == 24 - int(layer.mask.any(1).sum())


def test_survivors_are_untouched() -> None:
    layer, topology, optimizer = _start("unstructured", 1, "set", cold_start=1.0)
    seen: dict[str, Tensor] = {}

    def snapshot(*_: Any) -> None:
        state = optimizer.state[layer.weight]
        seen.update({"weight": layer.weight.detach().clone(), "mask": layer.mask.clone()})
        seen.update({key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")})

    optimizer.register_step_post_hook(snapshot)
    _step(layer, topology, optimizer)
    stayed = seen["mask"] & layer.mask
    state = optimizer.state[layer.weight]
    for key, now in (("weight", layer.weight), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
        assert torch.equal(now[stayed], seen[key][stayed]), key
    new = layer.mask & ~seen["mask"]
    mean = seen["exp_avg_sq"][stayed].double().mean()
    torch.testing.assert_close(state["exp_avg_sq"][new].double(), mean.expand(int(new.sum())), rtol=2**-23, atol=0)
