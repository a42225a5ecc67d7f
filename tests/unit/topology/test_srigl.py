"""SRigL against its rule worked by hand, and what an ablated neuron is to the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import MaskedLinear, sparsify
from dst_train.topology import Topology
from dst_train.topology.srigl import choose

# 4 neurons of 5 inputs, fan-in 2; 0 where a weight is absent.
VALUE = torch.tensor(
    [[9.0, 8.0, 0.0, 0.0, 0.0], [7.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 6.0, 5.0]],
    dtype=torch.float64,
)
GRADIENT = torch.tensor(
    [[0.0, 0.0, 5.0, 1.0, 2.0], [0.0, 0.1, 4.0, 3.0, 2.0], [1.0, 9.0, 0.5, 0.0, 1.0], [8.0, 7.0, 1.0, 0.0, 0.0]],
    dtype=torch.float64,
)


def _chosen(fraction: float, gamma_sal: float, value: Tensor = VALUE, gradient: Tensor = GRADIENT) -> list[list[int]]:
    after = choose(value, gradient, value > 0, fan_in=2, fraction=fraction, gamma_sal=gamma_sal)
    return [torch.nonzero(row).flatten().tolist() for row in after]


def test_without_ablation_the_layer_prunes_and_each_neuron_grows() -> None:
    # K = int(0.3 * 8) = 2: the values 1 and 2 go, of neurons 1 and 2; these grow gradients 4 and 9.
    assert _chosen(0.3, 0.0) == [[0, 1], [0, 2], [1, 3], [3, 4]]


def test_a_neuron_with_too_few_salient_weights_is_ablated() -> None:
    # K = 2. Salient: the six largest values, 2 in neuron 0, 1 in 1, 1 in 2, 2 in 3, and the gradients 9 (neuron 2) and 8 (3).
    # So the counts are 2, 1, 2, 3, and with int(1.0 * 2) = 2 needed neuron 1 goes: k' = 8 // 3 = 2. Its weights 7 and 1 are
    # the K that go; neuron 2 keeps its 2.
    assert _chosen(0.3, 1.0) == [[0, 1], [], [2, 3], [3, 4]]
    # int(0.5 * 2) = 1 is enough for all.
    assert _chosen(0.3, 0.5) == _chosen(0.3, 0.0)


def test_the_fan_in_of_the_ablated_is_shared_out() -> None:
    # K = int(0.5 * 8) = 4: the values 9, 8, 7, 6 stay, and the gradients 9, 8, 7, 5 are wanted: counts 3, 1, 1, 3. Neurons 1
    # and 2 go with their 4 weights, which are K; k' = 4, grown by gradient: 5, 2 in neuron 0; 8, 7 in neuron 3.
    assert _chosen(0.5, 1.0) == [[0, 1, 2, 4], [], [], [0, 1, 3, 4]]


def test_so_many_neurons_stay_as_can_hold_the_weights() -> None:
    # All values in neuron 0 that can be: alone it holds 5 of 8 weights. Without the bound only neuron 0 would stay.
    value = torch.zeros(4, 5, dtype=torch.float64)
    value[0], value[1, :3] = 9.0, 1.0
    gradient = torch.zeros(4, 5, dtype=torch.float64)
    gradient[2, 0], gradient[3, 0] = 2.0, 1.0
    after = choose(value, gradient, value > 0, fan_in=2, fraction=0.25, gamma_sal=1.0)
    # K = 2: counts 5, 1, 1, 1, and 2 are needed, but two neurons are: with 1 all stay. What neuron 0 has beyond 2 goes.
    assert after.sum(1).tolist() == [2, 2, 2, 2]


def test_an_ablated_neuron_comes_back_by_its_gradients() -> None:
    value, gradient = VALUE.clone(), torch.zeros(4, 5, dtype=torch.float64)
    value[1] = 0.0
    value[0, 2] = value[3, 0] = 4.0
    gradient[1, :2] = 1.0
    # K = int(0.3 * 8) = 2: both gradients of neuron 1 are salient; neuron 2 has none left: 3 neurons of 8 // 3 weights.
    assert _chosen(0.3, 1.0, value, gradient) == [[0, 1], [0, 1], [], [3, 4]]


def _start(gamma_sal: float = 1.0) -> tuple[MaskedLinear, Topology, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24))
    sparsify(model, [{"match": "0", "sparsity": 0.75, "pattern": "constant_fan_in"}])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    topology = Topology(model, method="srigl", every=1, total_steps=40, gamma_sal=gamma_sal).bind(optimizer)
    return model[0], topology, optimizer


def _step(layer: MaskedLinear, topology: Topology, optimizer: torch.optim.Optimizer, seed: int) -> Any:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    # Half of the outputs count for little: they are what is ablated.
    (layer(x) * torch.linspace(0.0, 1.0, 24)).sub(1.0).square().mean().backward()
    optimizer.step()
    return topology.step()


def test_groups_hold_the_new_fan_in_or_nothing_and_survivors_stay() -> None:
    layer, topology, optimizer = _start()
    seen: dict[str, Tensor] = {}
    optimizer.register_step_post_hook(lambda *_: seen.update(w=layer.weight.detach().clone(), mask=layer.mask.clone()))
    ablated = set()
    for number in range(20):
        (change,) = _step(layer, topology, optimizer, number).layers
        fan_in = layer.mask.sum(1)
        alive = int((fan_in > 0).sum())
        assert set(fan_in.tolist()) <= {0, layer.num_final // alive}
        assert layer.num_final - alive < layer.num_active <= layer.num_final
        assert change.uncovered == 24 - alive
        assert torch.equal(torch.tensor(change.active), torch.nonzero(layer.mask.flatten()).flatten())
        ablated.add(24 - alive)
        stayed = seen["mask"] & layer.mask
        assert torch.equal(layer.weight[stayed], seen["w"][stayed])
        for tensor in (layer.weight, optimizer.state[layer.weight]["exp_avg"]):
            assert not tensor[~layer.mask].any()
            assert not tensor[layer.mask & ~seen["mask"]].any()
    assert max(ablated) > 0


@pytest.mark.parametrize("gamma_sal", [0.0, 1.0])
def test_resuming_goes_on_exactly(gamma_sal: float) -> None:
    layer, topology, optimizer = _start(gamma_sal)
    for number in range(5):
        _step(layer, topology, optimizer, number)
    twin, other, other_optimizer = _start(gamma_sal)
    twin.load_state_dict(layer.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(topology.state_dict())
    for number in range(5, 10):
        ours, theirs = (_step(*one, number) for one in ((layer, topology, optimizer), (twin, other, other_optimizer)))
        assert (ours.digest, ours.layers) == (theirs.digest, theirs.layers)
    assert torch.equal(layer.weight, twin.weight)
    assert (layer.mask.sum(1) > 0).all() == (gamma_sal == 0.0)
