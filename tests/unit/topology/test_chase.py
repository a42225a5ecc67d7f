"""Chase against its rule worked by hand, and its schedule in a run."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from dst_train.sparse import MaskedLinear, sparsify
from dst_train.topology import Topology
from dst_train.topology.chase import choose, removed_rows

# 4 rows of 4 inputs with 6 weights; 0 where one is absent.
VALUE = torch.tensor(
    [[9.0, 1.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 8.0, 2.0], [0.0, 3.0, 0.0, 0.0]], dtype=torch.float64
)
GRADIENT = torch.tensor(
    [[0.0, 9.0, 5.0, 4.0], [0.0, 3.0, 2.0, 1.0], [6.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64
)


def _chosen(fraction: float, removed: int) -> list[list[int]]:
    after = choose(VALUE, GRADIENT, VALUE > 0, keep=6, fraction=fraction, removed=removed)
    return [torch.nonzero(row).flatten().tolist() for row in after]


def test_schedule_is_cubic() -> None:
    assert [removed_rows(0.5, 80, p) for p in (0.0, 0.5, 1.0)] == [0, 35, 40]


def test_the_rows_with_the_smallest_mean_of_active_values_are_emptied_and_shared_out() -> None:
    # Means over active weights: 5, 4, 5, 3. Row 3 goes, then of the others round(0.3 * 6) = 2 weights, 1 and 2. Three grow, of
    # what was absent: gradients 6, 5, 4.
    assert _chosen(0.3, 1) == [[0, 2, 3], [0], [0, 2], []]
    # Rows 3 and 1, and nothing moves in the others: 2 weights to share out.
    assert _chosen(0.0, 2) == [[0, 1, 2], [], [0, 2, 3], []]


def test_without_removal_it_is_rigl() -> None:
    # The values 1 and 2 go, two of the gradients of 9 come, the lower units.
    assert _chosen(0.3, 0) == [[0], [0], [2], [0, 1, 2]]


def test_so_many_rows_stay_as_can_hold_the_weights_and_what_went_comes_back() -> None:
    # 6 weights need two rows. Of 8 places 4 are absent; 4 - 2 should stay, and 2 + 4 is all.
    assert _chosen(0.3, 3) == [[0, 2, 3], [], [0, 1, 2], []]
    # With 7 weights to keep 3 must stay: 9, 8, and 2, of those that go the largest.
    after = choose(VALUE, GRADIENT, VALUE > 0, keep=7, fraction=0.3, removed=3)
    assert after.int().tolist() == [[1, 0, 1, 1], [0] * 4, [1] * 4, [0] * 4]


def _start() -> tuple[MaskedLinear, Topology, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24))
    sparsify(model, [{"match": "0", "sparsity": 0.75, "pattern": "unstructured"}])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    topology = Topology(model, method="chase", every=1, total_steps=14, until=1.0, channel_sparsity=0.5)
    return model[0], topology.bind(optimizer), optimizer


def _step(layer: MaskedLinear, topology: Topology, optimizer: torch.optim.Optimizer, seed: int) -> Any:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (layer(x) - 1.0).square().mean().backward()
    optimizer.step()
    return topology.step()


def test_rows_go_by_the_schedule_weights_stay_and_resuming_goes_on_exactly() -> None:
    layer, topology, optimizer = _start()
    twins = None
    for number in range(13):
        if number == 6:
            twins = _start()
            twins[0].load_state_dict(layer.state_dict())
            twins[2].load_state_dict(copy.deepcopy(optimizer.state_dict()))
            twins[1].load_state_dict(topology.state_dict())
        update = _step(layer, topology, optimizer, number)
        (change,) = update.layers
        assert layer.num_active == layer.num_final
        assert not layer.weight[~layer.mask].any()
        # Another row may lose its last weight by itself.
        assert change.uncovered >= removed_rows(0.5, 24, 1.0 if number == 12 else (number + 1) / 14)
        if twins is not None:
            theirs = _step(*twins, number)
            assert (update.digest, update.layers) == (theirs.digest, theirs.layers)
    assert change.uncovered == 12
    assert twins is not None
    assert torch.equal(layer.weight, twins[0].weight)
