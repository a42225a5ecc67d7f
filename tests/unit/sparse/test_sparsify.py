"""Rules, budgets and the report of sparsify()."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dst_train.sparse import (
    DiagonalLinear,
    MaskedLinear,
    RuleError,
    SparsityRule,
    densify,
    densities,
    sparse_layers,
    sparsify,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(32, 32), "fc1": nn.Linear(32, 128), "fc2": nn.Linear(128, 32, bias=False)})
            for _ in range(2)
        )
        self.head = nn.Linear(32, 10)


def test_last_rule_wins_and_null_keeps_a_layer_dense() -> None:
    net = Net()
    report = sparsify(
        net,
        [
            {"match": "blocks.*", "sparsity": 0.9},
            {"match": "*.fc*", "sparsity": 0.5, "band": 16},
            SparsityRule("blocks.1.fc2", None),
        ],
    )
    assert [r.name for r in report.layers] == [
        "blocks.0.proj",
        "blocks.0.fc1",
        "blocks.0.fc2",
        "blocks.1.proj",
        "blocks.1.fc1",
    ]
    assert type(net.head) is nn.Linear
    assert type(net.blocks[1]["fc2"]) is nn.Linear
    proj, fc1 = net.blocks[0]["proj"], net.blocks[0]["fc1"]
    assert (proj.band, proj.num_active, fc1.band, fc1.num_active) == (1, 3, 16, 4)
    assert net.blocks[0]["fc2"].bias is None
    assert report.parameters == sum(p.numel() for p in net.parameters())
    assert report.dense_parameters == sum(p.numel() for p in Net().parameters())
    assert "blocks.0.fc1" in str(report)
    assert "diagonal 16" in str(report)


@pytest.mark.parametrize(
    "rule",
    [
        {"pattern": "diagonal", "permute": "learned", "band": 2},
        {"pattern": "unstructured"},
        {"pattern": "sr_ste", "size": 4},
        {"pattern": "butterfly", "size": 1},
        {"pattern": "sdgp", "size": 4},
    ],
)
def test_densify_computes_the_same_with_plain_linear_layers(rule: dict) -> None:
    gated = {"gate": "soft", "rank": 2} if rule["pattern"] == "diagonal" else {}
    net = Net()
    net.head = nn.Linear(32, 16)
    sparsify(net, [{"match": "head", "sparsity": 0.5, **rule}], **gated)
    if isinstance(net.head, DiagonalLinear):
        nn.init.normal_(net.head.alpha)
        nn.init.normal_(net.head.low_rank.up)
        net.head.order.copy_(torch.randperm(net.head.in_features))
    x = torch.randn(3, 5, net.head.in_features)
    expected = net.head(x)
    assert densify(net) is net
    assert isinstance(net.head, nn.Linear)
    assert net.head.extra_repr() == f"in_features={x.shape[-1]}, out_features={expected.shape[-1]}, bias=True"
    torch.testing.assert_close(net.head(x), expected)


def test_a_model_that_is_one_layer() -> None:
    with pytest.raises(ValueError, match=r"the model is a linear layer itself .*wrap it"):
        sparsify(nn.Linear(8, 8), [{"match": "*", "sparsity": 0.5}])
    assert type(densify(DiagonalLinear(8, 8, sparsity=0.5))) is nn.Linear


def test_values_are_the_scaled_dense_initialisation() -> None:
    net = Net()
    weight, bias = net.head.weight.detach().clone(), net.head.bias.detach().clone()
    sparsify(net, [{"match": "head", "sparsity": 0.75}])
    mask = net.head.to_dense() != 0
    assert mask.sum() == 8 * 10
    torch.testing.assert_close(net.head.to_dense()[mask], weight[mask] * 2, rtol=1e-6, atol=0)
    assert torch.equal(net.head.bias, bias)


def test_offsets_depend_on_the_seed_only_and_the_global_generator_is_untouched() -> None:
    def offsets(seed: int, noise: int) -> list[torch.Tensor]:
        net = Net()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        sparsify(net, [{"match": "blocks.*", "sparsity": 0.9}], seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return [layer.offsets for layer in sparse_layers(net).values()]

    first, again, other = offsets(0, 1), offsets(0, 2), offsets(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[3])


def test_hugging_face_conv1d_is_replaced() -> None:
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    net = nn.Sequential(Conv1D(48, 16))
    report = sparsify(net, [{"match": "0", "sparsity": 0.5}])
    assert (report.layers[0].out_features, report.layers[0].in_features) == (48, 16)
    assert isinstance(net[0], DiagonalLinear)


def test_a_subclass_of_linear_is_left_alone() -> None:
    """nn.MultiheadAttention reads out_proj.weight; swapping it would break the call."""
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "fc": nn.Linear(32, 32)})
    report = sparsify(net, [{"match": "*", "sparsity": 0.9}])
    assert [r.name for r in report.layers] == ["fc"]


def _twice() -> nn.Module:
    net = nn.ModuleDict({"encode": nn.Linear(32, 32)})
    net["decode"] = net["encode"]
    return net


def _tied() -> nn.Module:
    net = nn.ModuleDict({"embed": nn.Embedding(64, 32), "head": nn.Linear(32, 64)})
    net["head"].weight = net["embed"].weight
    return net


def _frozen() -> nn.Module:
    net = Net()
    net.head.weight.requires_grad_(False)
    return net


def _normed() -> nn.Module:
    net = Net()
    net.head.register_forward_pre_hook(lambda module, inputs: None)
    return net


def _wrapped() -> nn.Module:
    net = Net()
    net.head.forward = lambda x: x
    return net


@pytest.mark.parametrize(
    ("model", "rule", "message"),
    [
        (Net, {"match": "blocks.*.fc3", "sparsity": 0.9}, r"'blocks\.\*\.fc3' matches no linear layer.*blocks\.0\.fc2"),
        (Net, {"match": "head", "sparsity": 0.9, "band": 7}, r"layer head \(rule 'head'\): band=7"),
        (Net, {"match": "head", "sparsity": 1.0}, r"sparsity 1.0 must be in \[0, 1\)"),
        (Net, {"match": "head", "sparsity": 0.9, "pattern": "hexagon"}, "pattern 'hexagon' is unknown"),
        (
            Net,
            {"match": "head", "sparsity": 0.9, "pattern": "block", "band": 2},
            "band belongs to diagonal, not to block",
        ),
        (
            Net,
            {"match": "head", "sparsity": 0.9, "size": 2},
            "size belongs to n_m, block, shuffled_block, tile_wise, sr_ste, butterfly, sdgp, not to diagonal",
        ),
        (Net, {"match": "head", "sparsity": 0.9, "pattern": "block", "size": 3}, r"layer head .*size=3: must divide"),
        (Net, {"match": "head", "sparsity": 0.9, "bands": 1}, "knows only match, sparsity, pattern, band, size"),
        (Net, {"match": "head"}, "needs match and sparsity"),
        (_tied, {"match": "head", "sparsity": 0.9}, "layer head shares its weight"),
        (_twice, {"match": "encode", "sparsity": 0.9}, "layer encode shares its weight"),
        (_frozen, {"match": "head", "sparsity": 0.9}, r"layer head is frozen .*sparsity: null"),
        (_wrapped, {"match": "head", "sparsity": 0.9}, "layer head has hooks"),
        (
            _normed,
            {"match": "head", "sparsity": 0.9},
            r"layer head has hooks, as torch.nn.utils.weight_norm .*sparsity: null",
        ),
    ],
)
def test_bad_rules_are_named(model: type, rule: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(model(), [rule])


def test_a_gate_is_for_diagonal_layers() -> None:
    with pytest.raises(
        ValueError,
        match=r"layer head .*gate='soft', as method dynadiag needs: only diagonal layers have gates, this one is n_m",
    ):
        sparsify(Net(), [{"match": "head", "sparsity": 0.5, "pattern": "n_m", "size": 2}], gate="soft")


def test_masked_layers_explore_and_report() -> None:
    net = Net()
    report = sparsify(net, [{"match": "head", "sparsity": 0.75, "pattern": "block", "size": 2}], explore=2.0)
    assert isinstance(net.head, MaskedLinear)
    assert (net.head.num_start, net.head.num_final) == (40, 20)
    assert report.layers[0].density == 0.25
    assert report.parameters == report.dense_parameters
    assert "block 2" in str(report)


def test_unknown_budget() -> None:
    with pytest.raises(ValueError, match="budget 'fair' is unknown; choose one of uniform, erk"):
        sparsify(Net(), [{"match": "head", "sparsity": 0.9}], budget="fair")


@pytest.mark.parametrize("budget", ["uniform", "erk", "compute_fraction"])
@pytest.mark.parametrize("density", [0.1, 0.4, 0.9])
def test_budgets_keep_the_total(budget: str, density: float) -> None:
    shapes = [(768, 768), (3072, 768), (768, 3072), (10, 768)]
    result = densities(budget, shapes, [density] * 4)
    assert all(0 < d <= 1 for d in result)
    kept = sum(d * m * n for d, (m, n) in zip(result, shapes, strict=True))
    assert kept == pytest.approx(density * sum(m * n for m, n in shapes), rel=1e-12)


def test_budgets_follow_their_formula() -> None:
    shapes = [(64, 64), (256, 64)]
    erk = densities("erk", shapes, [0.1, 0.1])
    assert erk[0] / erk[1] == pytest.approx((128 / 64**2) / (320 / (256 * 64)))
    compute = densities("compute_fraction", shapes, [0.1, 0.1])
    assert compute[1] / compute[0] == pytest.approx(4)
    assert densities("uniform", shapes, [0.1, 0.3]) == [0.1, 0.3]
    # A layer that would be more than dense is capped, and the others get what it cannot take.
    capped = densities("compute_fraction", [(10, 10), (100, 100)], [0.995, 0.995])
    assert capped[1] == 1.0
    assert capped[0] == pytest.approx(1 - 0.005 * 10100 / 100)


@pytest.mark.parametrize("pattern", ["diagonal", "unstructured", "constant_fan_in", "n_m", "block"])
def test_the_first_units_know_nothing_of_the_values(pattern: str) -> None:
    """Both may be drawn first after a seed of 0, and by the same generator a mask would be of the smallest values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512))
    size = 16 if pattern in ("n_m", "block") else 1
    sparsify(model, [{"match": "0", "sparsity": 0.875, "pattern": pattern, "size": size}], seed=0)
    weight = model[0].to_dense().detach()
    present = weight[weight != 0.0].double()
    count = present.numel()
    assert count == pytest.approx(weight.numel() / 8, rel=1e-3)
    # nn.Linear's are uniform within 1 / sqrt(256); the scale for the density is sqrt(8). Five standard errors of each.
    bound = (8 / 256) ** 0.5
    assert abs(present.mean()) < 5 * bound / (3 * count) ** 0.5
    assert present.square().mean() == pytest.approx(bound**2 / 3, rel=5 * (0.8 / count) ** 0.5)


def test_a_frozen_bias_stays_frozen() -> None:
    net = Net()
    net.head.bias.requires_grad_(False)
    sparsify(net, [{"match": "head", "sparsity": 0.5}])
    assert not net.head.bias.requires_grad
    assert net.head.values.requires_grad
    assert not densify(net).head.bias.requires_grad


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("pattern", ["diagonal", "unstructured", "sr_ste", "butterfly"])
def test_encoder_layers_of_torch_call_their_layers_in_evaluation_too(pattern: str, padding: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0), 2)
    size = {"sr_ste": 4, "butterfly": 4}.get(pattern, 1)
    sparsify(encoder, [{"match": "*.linear*", "sparsity": 0.5, "pattern": pattern, "size": size}])
    x, mask = torch.randn(3, 7, 64), torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 5:] = padding
    trained = encoder.train()(x, src_key_padding_mask=mask).detach()
    with torch.no_grad():
        found = encoder.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(found, trained)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"match": "*", "sparsity": 0.9}, r"rules=\{'match': .*expected a list of rules, such as \[\{'match'"),
        ("*", "expected a list of rules"),
        (["*"], "expected a list of rules"),
        ([("*", 0.9)], "expected a list of rules"),
        ([{"match": "*", "sparsity": "0.9"}], r"rule '\*': sparsity '0\.9' is not a number as it should be"),
        ([{"match": "*", "sparsity": 0.9, "band": 16.0}], r"rule '\*': band 16\.0 is not a number as it should be"),
    ],
)
def test_what_is_no_list_of_rules(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(Net(), rules)


def test_rules_may_come_one_by_one_and_numbers_from_numpy() -> None:
    rules = ({"match": "head", "sparsity": np.float32(0.5), "band": np.int64(4)} for _ in range(1))
    (layer,) = sparsify(Net(), rules).layers
    assert (layer.size, layer.num_final) == (4, 4)


def test_a_sparsity_that_a_layer_has_too_few_units_for_is_told() -> None:
    report = sparsify(Net(), [{"match": "*.proj", "sparsity": 0.9}, {"match": "*.fc1", "sparsity": 0.9, "band": 64}])
    assert report.sparsity_warning is not None
    assert report.sparsity_warning.endswith(
        "has more): blocks.0.fc1 (0.5 instead of 0.1), blocks.1.fc1 (0.5 instead of 0.1)"
    )
    assert report.sparsity_warning in str(report)
    assert sparsify(Net(), [{"match": "*.fc*", "sparsity": 0.9, "band": 16}]).sparsity_warning is None  # 1 of 8 units


@pytest.mark.parametrize(
    ("rules", "number"),
    [
        ([{"match": "*", "sparsity": 0.9}, {"match": "*.fc2", "sparsity": 2.0}], 1),
        (
            [{"match": "*", "sparsity": 0.9}, {"match": "*.fc3", "sparsity": 0.9}, {"match": "*.fc2", "sparsity": 0.9}],
            1,
        ),
        ([{"match": "*", "sparsity": 0.9}, {"match": "*", "sparsity": 0.9, "band": 7}], 1),
        ([{"match": "*", "sparsity": 0.9}, {"match": "head", "sparsity": None}], 0),
    ],
)
def test_an_error_tells_the_number_of_its_rule(rules: list[dict[str, Any]], number: int) -> None:
    model = Net()
    model.blocks[1].fc1.weight.requires_grad_(False)
    with pytest.raises(RuleError) as error:
        sparsify(model, rules)
    assert error.value.number == number
