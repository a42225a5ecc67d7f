"""DiagonalLinear against the dense layer that it stands for."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import nn

from dst_train.sparse import DiagonalLinear

SHAPES = [(24, 24), (24, 60), (60, 24), (7, 5)]


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_equals_the_dense_layer_of_its_weight(in_features: int, out_features: int) -> None:
    torch.manual_seed(0)
    layer = DiagonalLinear(in_features, out_features, sparsity=0.7, dtype=torch.float64)
    x = torch.randn(3, 4, in_features, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.to_dense(), layer.bias)
    # Sums of at most 60 products in fp64.
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=60 * 2**-50)


def test_weight_has_the_entries_of_the_definition() -> None:
    """W[(l + o) mod M, l] for M >= N, W[l, (l + o) mod N] for M < N, written out with loops."""
    for in_features, out_features in SHAPES:
        layer = DiagonalLinear(in_features, out_features, sparsity=0.6)
        dense = torch.zeros(out_features, in_features)
        for slot, offset in enumerate(layer.offsets.tolist()):
            for l in range(min(in_features, out_features)):  # noqa: E741
                if out_features >= in_features:
                    dense[(l + offset) % out_features, l] = layer.values[slot, l]
                else:
                    dense[l, (l + offset) % in_features] = layer.values[slot, l]
        assert torch.equal(layer.to_dense(), dense)


@pytest.mark.parametrize(
    ("sparsity", "band", "active"), [(0.9, 1, 10), (0.0, 1, 96), (0.999, 1, 1), (0.9, 16, 1), (0.5, 16, 3)]
)
def test_number_of_active_units(sparsity: float, band: int, active: int) -> None:
    layer = DiagonalLinear(96, 32, sparsity=sparsity, band=band)
    assert layer.num_active == active
    assert layer.values.shape == (active * band, 32)
    assert layer.offsets.unique().numel() == active
    assert layer.density == active * band / 96


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_features": 0, "out_features": 4, "sparsity": 0.5}, "in_features=0"),
        ({"in_features": 4, "out_features": 4, "sparsity": 1.0}, r"sparsity=1.0: must be in \[0, 1\)"),
        ({"in_features": 4, "out_features": 6, "sparsity": 0.5, "band": 4}, r"band=4: must divide max.*=6"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiagonalLinear(**kwargs)


@pytest.mark.parametrize("out_features", [512, 2048, 128])
def test_output_variance_equals_the_dense_layers(out_features: int) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(512, out_features, bias=False)
    sparse = DiagonalLinear(512, out_features, sparsity=0.9, bias=False)
    sparse.load_dense_init(dense.weight, None)
    x = torch.randn(512, 512)
    # The variance is estimated from 512 * out_features outputs and from about 51 weights a row: 10 % is over 3 sigma.
    assert math.isclose(sparse(x).var().item(), dense(x).var().item(), rel_tol=0.1)


def test_no_tensor_has_the_size_of_the_dense_weight() -> None:
    """Counts every tensor that lives after a step: parameters, gradients, optimiser state, buffers, state dict."""
    size = 512
    before = {id(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
    layer = DiagonalLinear(size, size, sparsity=0.95)
    optimizer = torch.optim.AdamW(layer.parameters())
    x = torch.randn(8, size, requires_grad=True)
    layer(x).square().mean().backward()
    optimizer.step()
    gc.collect()
    alive = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and id(t) not in before]
    assert max(t.numel() for t in alive) < size * size
    owned = [*layer.parameters(), *(p.grad for p in layer.parameters()), *layer.buffers()]
    owned += [s for state in optimizer.state.values() for s in state.values()]
    kept = sum(t.numel() * t.element_size() for t in owned)
    # values, gradient and two moments of 5 % of the weight; bias four times; offsets; two step counters.
    active = round(0.05 * size)
    assert kept == 4 * (4 * active * size + 4 * size + active + 2)
    assert sum(t.numel() * t.element_size() for t in layer.state_dict().values()) == 4 * (active * size + size + active)
