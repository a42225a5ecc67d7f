"""DiagonalLinear against the dense layer that it stands for."""

from __future__ import annotations

import copy
import gc
import io
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
    assert layer.final_density == active * band / 96


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_features": 0, "out_features": 4, "sparsity": 0.5}, "in_features=0"),
        ({"in_features": 4, "out_features": 4, "sparsity": 1.0}, r"sparsity=1.0: must be in \[0, 1\)"),
        ({"in_features": 4, "out_features": 6, "sparsity": 0.5, "band": 4}, r"band=4: must divide max.*=6"),
        ({"in_features": 4, "out_features": 6, "sparsity": 0.5, "explore": 0.5}, "explore=0.5: must be at least 1"),
        (
            {"in_features": 4, "out_features": 6, "sparsity": 0.5, "explore": math.nan},
            "explore=nan: must be at least 1",
        ),
        (
            {"in_features": 4, "out_features": 6, "sparsity": 0.5, "gate": "open"},
            "gate='open': choose one of straight_th",
        ),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiagonalLinear(**kwargs)


@pytest.mark.parametrize("explore", [1.0, 2.0])
@pytest.mark.parametrize("out_features", [512, 2048, 128])
def test_output_variance_equals_the_dense_layers(out_features: int, explore: float) -> None:
    """Once what explores is gone."""
    torch.manual_seed(0)
    dense = nn.Linear(512, out_features, bias=False)
    sparse = DiagonalLinear(512, out_features, sparsity=0.9, bias=False, explore=explore)
    sparse.load_dense_init(dense.weight, None)
    surplus = sparse.units()[torch.randperm(sparse.num_start)[sparse.num_final :]]
    sparse.replace(surplus, torch.tensor([], dtype=torch.int64))
    x = torch.randn(512, 512)
    # The variance is estimated from 512 * out_features outputs and from about 51 weights a row: 10 % is over 3 sigma.
    assert math.isclose(sparse(x).var().item(), dense(x).var().item(), rel_tol=0.1)


def test_the_soft_gate_starts_from_the_dense_layers_values() -> None:
    layer = DiagonalLinear(8, 8, sparsity=0.5, explore=math.inf, gate="soft")
    weight = torch.randn(8, 8)
    layer.load_dense_init(weight, None)
    assert torch.equal(layer.to_dense(), weight * 0.5)  # by the gates, 4 / 8


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


def test_explore_adds_slots_up_to_all() -> None:
    for explore, start in ((1.0, 4), (2.5, 10), (math.inf, 16)):
        layer = DiagonalLinear(16, 12, sparsity=0.75, explore=explore)
        assert (layer.num_final, layer.num_start, layer.num_active) == (4, start, start)
        assert layer.values.shape == (start, 12)
        assert layer.final_density == 0.25


def _moved() -> tuple[DiagonalLinear, torch.Tensor]:
    """A layer of 6 slots in bands of 2, 3 of which are free; and the slots that the change touched."""
    layer = DiagonalLinear(16, 12, sparsity=0.75, band=2, explore=3.0, generator=torch.Generator().manual_seed(0))
    held = layer.units()
    absent = next(u for u in range(8) if u not in held.tolist())
    touched = layer.replace(held[[1, 2, 4, 5]], torch.tensor([absent]))
    with torch.no_grad():
        layer.values.view(-1)[layer.elements(touched)] = 0
        layer.values.view(6, -1)[1] = torch.arange(24.0)  # what has grown, and then learned
    return layer, touched


def test_free_slots_are_no_part_of_the_weight() -> None:
    layer, touched = _moved()
    assert touched.tolist() == [1, 2, 4, 5]
    assert (layer.units() >= 0).tolist() == [True, True, False, True, False, False]
    assert layer.num_active == 3
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.to_dense(), layer.bias), rtol=1e-5, atol=1e-5)
    layer(x).square().sum().backward()
    used = layer.values.grad.view(6, -1).abs().sum(1) > 0
    assert used.tolist() == [True, True, False, True, False, False]


def test_a_state_dict_brings_free_slots_along() -> None:
    layer, _ = _moved()
    twin = DiagonalLinear(16, 12, sparsity=0.75, band=2, explore=3.0)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(twin(x), layer(x))


def test_copies_and_compiled_layers_compute_the_same() -> None:
    layer = DiagonalLinear(16, 12, sparsity=0.5, explore=1.5, gate="straight_through")
    layer.replace(layer.units()[:2], torch.tensor([], dtype=torch.int64))
    x, stored = torch.randn(3, 16), io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for twin in (copy.deepcopy(layer), torch.load(stored, weights_only=False), compiled):
        assert torch.equal(twin(x), layer(x))


def test_replace_frees_and_fills_the_same_slots_when_the_number_stays() -> None:
    layer = DiagonalLinear(12, 12, sparsity=0.5, explore=1.5)
    held = layer.units()
    layer.replace(held[[0, 8]], torch.tensor([], dtype=torch.int64))
    before = layer.units()
    absent = [u for u in range(12) if u not in before.tolist()][:1]
    assert layer.replace(before[[5]], torch.tensor(absent)).tolist() == [5]
    assert layer.units().tolist() == [*before[:5].tolist(), *absent, *before[6:].tolist()]


@pytest.mark.parametrize("gate", ["straight_through", "soft"])
@pytest.mark.parametrize("free", [False, True])
def test_gates_and_the_gradient_of_alpha(gate: str, free: bool) -> None:
    """Against the formula, in fp64: dL/dalpha_k = dg_k/dalpha . s, s_k the sum of dL/dW x V over diagonal k."""
    torch.manual_seed(0)
    layer = DiagonalLinear(12, 8, sparsity=0.5, gate=gate, explore=1.5, dtype=torch.float64)
    if free:
        layer.replace(layer.units()[[1, 3]], torch.tensor([], dtype=torch.int64))
    active = layer.units()[layer.units() >= 0]
    layer.temperature = 0.7 if gate == "soft" else 1.0
    with torch.no_grad():
        layer.alpha.normal_()
    x, dy = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    alpha = layer.alpha.detach().clone().requires_grad_()
    share = torch.softmax(alpha[active] / layer.temperature, 0)
    factors = (6 * share).clamp(max=1.0) if gate == "soft" else len(active) * share
    values = layer.values.detach()[layer.units() >= 0]
    dense = torch.zeros(8, 12, dtype=torch.float64)
    rows = torch.arange(8)
    for k, unit in enumerate(active.tolist()):
        dense[rows, (rows + unit) % 12] = values[k] * (factors[k].detach() if gate == "soft" else 1.0)
    expected = nn.functional.linear(x, dense, layer.bias)
    y = layer(x)
    # The gates are float32.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.backward(dy)
    dw = dy.t() @ x
    s = torch.stack([(dw[rows, (rows + unit) % 12] * values[k]).sum() for k, unit in enumerate(active.tolist())])
    (factors * s).sum().backward()
    torch.testing.assert_close(layer.alpha.grad, alpha.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        layer.gates(layer.alpha.detach(), active), factors.detach().float(), rtol=1e-6, atol=1e-6
    )


def test_the_straight_through_gate_multiplies_by_exactly_1() -> None:
    torch.manual_seed(0)
    layer = DiagonalLinear(24, 24, sparsity=0.5, gate="straight_through")
    plain = DiagonalLinear(24, 24, sparsity=0.5)
    with torch.no_grad():
        layer.alpha.normal_(std=3.0)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "alpha"})
    x = torch.randn(9, 24)
    assert torch.equal(layer(x), plain(x))
