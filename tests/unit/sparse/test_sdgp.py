"""SDGP against gradients worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst_train.sparse import SdgpLinear, sparse_layers, sparsify
from dst_train.sparse.sdgp import pruned


def test_pruned_by_hand() -> None:
    # One sample, two tokens, four outputs, 2 of 4 stay. Sums over the tokens: output 0 has 4 of 4, output 1 has 3 of 5, output
    # 2 has 2 of 3, output 3 nothing of 1.
    dy = torch.tensor([[[4.0, -3.0, 1.0, 0.5], [0.0, 2.0, -2.0, 0.5]]])
    expected = torch.tensor([[[4.0, -3.0 * 5 / 5, 0.0, 0.0], [0.0, 2.0 * 5 / 5, -2.0 * 3 / 2, 0.0]]])
    torch.testing.assert_close(pruned(dy, 2, 4), expected)


def test_without_tokens_nothing_is_rescaled_and_lower_outputs_win() -> None:
    dy = torch.tensor([[1.0, -1.0, 1.0, 0.5], [0.0, 1.0, -2.0, 3.0]])
    assert pruned(dy, 2, 4).tolist() == [[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, -2.0, 3.0]]


def test_only_the_gradient_of_the_input_is_pruned() -> None:
    torch.manual_seed(0)
    layer = SdgpLinear(6, 8, sparsity=0.5, size=4, dtype=torch.float64)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 5, 8, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-12, atol=1e-12)
    y.backward(dy)
    torch.testing.assert_close(layer.weight.grad, torch.einsum("bto,bti->oi", dy, x.detach()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, pruned(dy, 2, 4) @ layer.weight.detach(), rtol=1e-12, atol=1e-12)
    # The sums that rescale are taken in float32.
    sums = pruned(dy, 2, 4).abs().sum(1)
    torch.testing.assert_close(sums[sums > 0], dy.abs().sum(1)[sums > 0], rtol=1e-5, atol=1e-5)


def test_autocast() -> None:
    layer = SdgpLinear(8, 8, sparsity=0.5, size=4)
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_a_rule_makes_it_dense() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    weight = model[0].weight.detach().clone()
    rule = {"match": "0", "sparsity": 0.5, "pattern": "sdgp", "size": 4}
    with pytest.raises(ValueError, match=r"layer 0 \(rule '0'\): pattern sdgp prunes gradients.*budget 'erk'.*uniform"):
        sparsify(model, [rule], budget="erk")
    report = sparsify(model, [rule])
    assert isinstance(model[0], SdgpLinear)
    assert torch.equal(model[0].weight, weight)
    assert (model[0].kept, report.density) == (2, 1.0)
    assert not sparse_layers(model)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.0, "size": 4}, r"sparsity=1.0: must be in \[0, 1\)"),
        ({"sparsity": 0.5, "size": 3}, "size=3: must divide out_features=8"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SdgpLinear(16, 8, **kwargs)
