"""SR-STE against its update worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst_train.sparse import SrSteLinear, sparse_layers, sparsify
from dst_train.topology import Topology


def _layer(**kwargs) -> SrSteLinear:
    layer = SrSteLinear(4, 2, sparsity=0.5, size=4, bias=False, **kwargs)
    layer.load_dense_init(torch.tensor([[0.1, -3.0, 2.0, 0.5], [1.0, 1.0, -1.0, 1.0]]), None)
    return layer


def test_the_mask_keeps_the_largest_of_each_group() -> None:
    layer = _layer()
    # Of equal ones the lower columns.
    assert layer.to_dense().tolist() == [[0.0, -3.0, 2.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), x @ layer.to_dense().t())
    with torch.no_grad():
        layer.weight[0, 0] = 4.0
    assert layer.mask[0].tolist() == [True, True, False, False]
    assert (layer.num_final, layer.num_units) == (4, 8)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_is_straight_through_and_draws_the_masked_to_zero(accumulation: int) -> None:
    layer = _layer(decay=0.5, accumulation=accumulation)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for _ in range(accumulation):
        (layer(x) / accumulation).sum().backward()
    # dL/dW~ = x for both rows, plus 0.5 * w where the mask is 0.
    expected = torch.tensor([[1.0 + 0.05, 2.0, 3.0, 4.0 + 0.25], [1.0, 2.0, 3.0 - 0.5, 4.0 + 0.5]])
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_rule_makes_it_and_no_topology_sees_it() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    weight = model[0].weight.detach().clone()
    report = sparsify(model, [{"match": "0", "sparsity": 0.5, "pattern": "sr_ste", "size": 4}], accumulation=4)
    assert isinstance(model[0], SrSteLinear)
    assert torch.equal(model[0].weight, weight)
    assert model[0].decay == 2e-4 / 4
    assert (report.density, report.parameters) == (0.5, report.dense_parameters)
    assert not sparse_layers(model)
    with pytest.raises(ValueError, match=r"no sparse layers.*method='static'.*sr_ste, butterfly and sdgp"):
        Topology(model, method="rigl", total_steps=10)
    Topology(model, method="static", total_steps=10)


def test_it_goes_with_dynadiag_in_other_layers() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    rules = [{"match": "0", "sparsity": 0.5, "pattern": "sr_ste", "size": 4}, {"match": "1", "sparsity": 0.5}]
    sparsify(model, rules, gate="straight_through", explore=2.0)
    assert list(Topology(model, method="dynadiag", total_steps=1000).layers) == ["1"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.0, "size": 4}, r"sparsity=1.0: must be in \[0, 1\)"),
        ({"sparsity": 0.5, "size": 3}, "size=3: must divide in_features=16"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SrSteLinear(16, 8, **kwargs)
