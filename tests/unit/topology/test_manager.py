"""Topology in one process: what an update does to offsets, values and optimiser state, and when."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import DiagonalLinear, sparsify
from dst_train.topology import Topology, editor_for
from dst_train.topology.settings import Settings


def _model(band: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 4))
    sparsify(model, [{"match": "[02]", "sparsity": 0.75, "band": band}])
    return model


def _train(
    model: nn.Module, topology: Topology, optimizer: torch.optim.Optimizer, steps: int, accumulation: int = 1
) -> list[Any]:
    torch.manual_seed(1)
    updates = []
    for _ in range(steps):
        optimizer.zero_grad()
        for x in torch.randn(12, 16).chunk(accumulation):
            (model(x).square().mean() / accumulation).backward()
        optimizer.step()
        updates.append(topology.step())
    return updates


def _start(
    method: str = "rigl", accumulation: int = 1, band: int = 1, **kwargs: Any
) -> tuple[nn.Sequential, Topology, torch.optim.Optimizer]:
    model = _model(band)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kwargs = {"every": 2, "total_steps": 40, **kwargs}
    topology = Topology(model, method=method, accumulation=accumulation, **kwargs).bind(optimizer)
    return model, topology, optimizer


@pytest.mark.parametrize("band", [1, 4])
@pytest.mark.parametrize("method", ["set", "rigl"])
def test_survivors_are_untouched_and_regrown_rows_are_reset(method: str, band: int) -> None:
    model, topology, optimizer = _start(method, band=band, cold_start=3.0)
    layers = [m for m in model if isinstance(m, DiagonalLinear)]
    _train(model, topology, optimizer, 1)
    seen: list[dict[str, Tensor]] = []

    def snapshot(*_: Any) -> None:
        seen[:] = [
            {
                "offsets": m.offsets.clone(),
                "values": m.values.detach().clone(),
                **{k: v.clone() for k, v in optimizer.state[m.values].items()},
            }
            for m in layers
        ]

    optimizer.register_step_post_hook(snapshot)
    (update,) = _train(model, topology, optimizer, 1)
    assert update.number == 1
    for change, layer, before in zip(update.layers, layers, seen, strict=True):
        after = optimizer.state[layer.values]
        changed = layer.offsets != before["offsets"]
        magnitude = before["values"].abs().view(layer.num_active, -1).double().sum(1)
        count = round(
            topology.settings.first_drop_fraction
            / 2
            * (1 + torch.cos(torch.tensor(torch.pi * 2 / 30)).item())
            * layer.num_active
        )
        assert len(change.grown) == len(change.dropped) == changed.sum() == count > 0
        # The dropped ones are those with the smallest mean |value|, and were active; the grown ones were not.
        assert set(change.dropped) == set(before["offsets"][magnitude.argsort()[:count]].tolist())
        assert not set(change.grown) & set(before["offsets"].tolist())
        assert (
            set(change.active)
            == set(layer.offsets.tolist())
            == (set(before["offsets"].tolist()) - set(change.dropped)) | set(change.grown)
        )
        rows = changed.repeat_interleave(band)
        for key, now in {
            "values": layer.values,
            "exp_avg": after["exp_avg"],
            "exp_avg_sq": after["exp_avg_sq"],
        }.items():
            assert torch.equal(now[~rows], before[key][~rows]), key
        assert not layer.values[rows].any()
        assert not after["exp_avg"][rows].any()
        survivors = before["exp_avg_sq"][~rows].double().mean()
        # One rounding to fp32 of a mean taken in fp64.
        torch.testing.assert_close(
            after["exp_avg_sq"][rows].double(),
            3.0 * survivors.expand(int(rows.sum()), layer.values.shape[1]),
            rtol=2**-23,
            atol=0,
        )


def _dense_gradients(model: nn.Sequential, x: Tensor) -> dict[int, Tensor]:
    """|dW| of each sparse layer by autograd through dense layers of the same weights."""
    dense = copy.deepcopy(model)
    for i, m in enumerate(model):
        if isinstance(m, DiagonalLinear):
            dense[i] = nn.Linear(m.in_features, m.out_features)
            dense[i].weight.data = m.to_dense().detach()
            dense[i].bias.data = m.bias.detach()
    dense(x).square().mean().backward()
    return {i: dense[i].weight.grad.abs() for i, m in enumerate(model) if isinstance(m, DiagonalLinear)}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_rigl_grows_where_the_dense_gradient_is_largest(accumulation: int) -> None:
    model, topology, optimizer = _start(every=1, accumulation=accumulation)
    torch.manual_seed(1)
    gradients = _dense_gradients(model, torch.randn(12, 16))
    offsets = {i: model[i].offsets.tolist() for i in gradients}
    (update,) = _train(model, topology, optimizer, 1, accumulation)
    for change, (i, gradient) in zip(update.layers, gradients.items(), strict=True):
        m, n = gradient.shape
        scores = torch.zeros(max(m, n))
        for row in range(m):
            for column in range(n):
                scores[(row - column) % m if m >= n else (column - row) % n] += gradient[row, column]
        scores[offsets[i]] = -1
        assert set(change.grown) == set(scores.argsort(descending=True)[: len(change.grown)].tolist())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1e6])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_mest_drops_the_smallest_value_and_gradient_together(accumulation: int, weight: float) -> None:
    model, topology, optimizer = _start("mest", every=1, accumulation=accumulation, gradient_weight=weight)
    torch.manual_seed(1)
    gradients = _dense_gradients(model, torch.randn(12, 16))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    optimizer.register_step_post_hook(
        lambda *_: seen.update({i: (model[i].offsets.clone(), model[i].values.detach().clone()) for i in gradients})
    )
    (update,) = _train(model, topology, optimizer, 1, accumulation)
    for change, (i, gradient) in zip(update.layers, gradients.items(), strict=True):
        offsets, values = seen[i]
        m, n = gradient.shape
        scores = {}
        for slot, unit in enumerate(offsets.tolist()):
            at = [((j + unit) % m, j) if m >= n else (j, (j + unit) % n) for j in range(min(m, n))]
            mean_gradient = torch.stack([gradient[a] for a in at]).mean()
            scores[unit] = float(values[slot].abs().mean() + weight * mean_gradient)
        assert set(change.dropped) == set(sorted(scores, key=scores.__getitem__)[: len(change.dropped)])
        assert change.drop_margin is not None
        assert change.grow_margin is None


def test_local_signal_adds_up_absolute_gradients() -> None:
    """With one micro-batch on one rank `local` and `exact` are the same thing; with several they need not be."""
    grown = {}
    for signal in ("exact", "local"):
        for accumulation in (1, 3):
            model, topology, optimizer = _start(every=1, accumulation=accumulation, grow_signal=signal)
            grown[signal, accumulation] = [
                u.grown for u in _train(model, topology, optimizer, 1, accumulation)[0].layers
            ]
    assert grown["exact", 1] == grown["local", 1] == grown["exact", 3]


def test_schedule() -> None:
    model, topology, optimizer = _start(every=4, total_steps=20, until=0.5)
    updates = _train(model, topology, optimizer, 20)
    assert [i + 1 for i, u in enumerate(updates) if u] == [4, 8]
    assert [u.number for u in updates if u] == [1, 2]
    assert updates[3].drop_fraction > updates[7].drop_fraction
    assert 0 < updates[3].churn <= 0.3


def test_static_never_changes() -> None:
    model, topology, optimizer = _start("static")
    digest = topology.digest()
    assert not any(_train(model, topology, optimizer, 8))
    assert topology.digest() == digest


def test_a_skipped_step_postpones_the_update() -> None:
    model, topology, optimizer = _start(every=2)

    def one(applied: bool) -> Any:
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        if applied:
            optimizer.step()
        return topology.step(applied)

    assert [one(True), one(False), one(False)] == [None] * 3
    update = one(True)
    assert update.step == 4
    assert update.number == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it where a graph goes on after a break
@pytest.mark.parametrize("method", ["rigl", "dynadiag"])
def test_a_compiled_model_gets_the_same_topology(method: str) -> None:
    gated = {"explore": 2.0, "gate": "straight_through"} if method == "dynadiag" else {}
    digests = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 4))
        sparsify(model, [{"match": "0", "sparsity": 0.75}], **gated)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        topology = Topology(model, method=method, every=3, total_steps=12).bind(optimizer)
        run = torch.compile(model, backend="eager") if compiled else model
        updates = _train(run, topology, optimizer, 12)
        assert [u is not None for u in updates] == [step in (3, 6) for step in range(1, 13)]
        digests.append(topology.digest())
    assert digests[0] == digests[1]


def test_state_dict_continues_exactly() -> None:
    model, topology, optimizer = _start("set", every=2)
    _train(model, topology, optimizer, 5)
    twin, other, other_optimizer = _start("set", every=2)
    twin.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(topology.state_dict())
    assert other.digest() == topology.digest()
    ours, theirs = _train(model, topology, optimizer, 6), _train(twin, other, other_optimizer, 6)
    assert [u and u.digest for u in ours] == [u and u.digest for u in theirs]
    assert [u and u.layers for u in ours] == [u and u.layers for u in theirs]  # ages and explored units, too
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_update_tells_of_itself() -> None:
    model, topology, optimizer = _start("rigl", every=2, drop_fraction=0.5)
    first, second = (u for u in _train(model, topology, optimizer, 4) if u is not None)
    for early, late in zip(first.layers, second.layers, strict=True):
        kept = len(early.active) - len(early.grown)
        assert early.mean_age == 2 * kept / len(
            early.active
        )  # those that were there from the start; the others are new
        assert early.explored == (len(early.active) + len(early.grown)) / early.num_units
        assert early.explored <= late.explored <= 1
        assert late.mean_age <= 4
        for change in (early, late):
            assert 0 <= change.drop_margin <= 1
            assert 0 <= change.grow_margin <= 1
            assert change.uncovered == 0  # 12 of 48 diagonals of length 16
    (random,) = (u for u in _train(*_start("set", every=2), 2) if u is not None)
    assert all(change.grow_margin is None for change in random.layers)


def test_regrown_units_start_cold() -> None:
    model, topology, optimizer = _start("set", every=2)
    before = model[0].offsets.clone()
    _train(model, topology, optimizer, 2)
    rows = model[0].offsets != before
    assert rows.any()
    assert not optimizer.state[model[0].values]["exp_avg_sq"][rows].any()


def test_sgd_momentum_is_reset() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    topology = Topology(model, method="set", every=2, total_steps=40).bind(optimizer)
    before = model[0].offsets.clone()
    _train(model, topology, optimizer, 2)
    rows = model[0].offsets != before
    assert rows.any()
    assert not optimizer.state[model[0].values]["momentum_buffer"][rows].any()


def test_evaluation_between_steps_does_not_count() -> None:
    model, topology, optimizer = _start(every=1)
    with torch.no_grad():
        model(torch.randn(4, 16))
    assert all(_train(model, topology, optimizer, 2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"method": "magic"},
            "method='magic': choose one of static, set, rigl, mest, cht, chts, srigl, chase, dynadiag",
        ),
        ({"grow_signal": "loud"}, "grow_signal='loud'"),
        ({"cold_start": -1.0}, "cold_start=-1.0: must be finite and at least 0"),
        ({"every": 0}, "every=0: must be at least 1"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"until": 1.5}, r"until=1.5: must be in \(0, 1\]"),
        ({"drop_fraction": 0.0}, "drop_fraction=0.0"),
        ({"gradient_weight": -1.0}, "gradient_weight=-1.0: must be finite and at least 0"),
        ({"gamma_sal": 1.5}, r"gamma_sal=1.5: must be in \[0, 1\]"),
        ({"channel_sparsity": 1.0}, r"channel_sparsity=1.0: must be in \[0, 1\)"),
        (
            {"method": "srigl"},
            "layer 0 has pattern='diagonal' and method='srigl' is for constant_fan_in; change the layer's",
        ),
        ({"gradient_weight": float("nan")}, "gradient_weight=nan: must be finite and at least 0"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology(_model(), **{"total_steps": 10, **kwargs})


@pytest.mark.parametrize(("method", "default"), [("rigl", 0.3), ("set", 0.3), ("dynadiag", 0.1)])
def test_what_an_update_drops_by_default(method: str, default: float) -> None:
    assert Settings(total_steps=10, method=method).first_drop_fraction == default
    assert Settings(total_steps=10, method=method, drop_fraction=0.2).first_drop_fraction == 0.2


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no sparse layers; call sparsify"):
        Topology(nn.Linear(4, 4), total_steps=10)


def test_binding_errors() -> None:
    model = _model()
    topology = Topology(model, total_steps=10)
    for call in (topology.step, topology.close, topology.state_dict, lambda: topology.load_state_dict({})):
        with pytest.raises(RuntimeError, match="before bind"):
            call()
    with pytest.raises(TypeError, match="cannot bind a topology to int"):
        topology.bind(3)
    with pytest.raises(ValueError, match=r"0 \(weight\) is not among the optimiser's parameters"):
        topology.bind(torch.optim.SGD(model[4].parameters(), lr=0.1))
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"2 \(weight\) is frozen.*keep it dense"):
        topology.bind(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(("optimizer", "state"), [(torch.optim.Rprop, "prev"), (torch.optim.Adafactor, "row_var")])
def test_unknown_optimiser_state_is_refused(optimizer: Any, state: str) -> None:
    model = _model()
    optimizer = optimizer(model.parameters(), lr=0.1)
    topology = Topology(model, method="set", every=1, total_steps=10).bind(optimizer)
    with pytest.raises(ValueError, match=rf"optimiser state '{state}' is not known.*use AdamW or SGD"):
        _train(model, topology, optimizer, 1)


def test_a_layer_without_gradient_is_named() -> None:
    model, topology, optimizer = _start(every=1)
    model[2].requires_grad_(False)
    model(torch.randn(4, 16))
    optimizer.step()
    with pytest.raises(RuntimeError, match="layer 0 received a gradient in 0 of 1 micro-batches"):
        topology.step()


def test_a_shared_layer_is_named() -> None:
    model, topology, _ = _start(every=1)
    with pytest.raises(
        RuntimeError, match=r"layer 2 received more than 1 gradients in a step: it was called more .*accumulation=N"
    ):
        (model(torch.randn(4, 16)) + model(torch.randn(4, 16))).square().mean().backward()
    assert topology.steps == 0


def test_scores_that_are_not_finite_are_named() -> None:
    model, topology, optimizer = _start(every=1)
    model(torch.full((4, 16), float("nan"))).square().mean().backward()
    topology._note_step()
    with pytest.raises(RuntimeError, match=r"layer 0: .*not finite at step 1"):
        topology.step()
    assert optimizer.state == {}


def test_editor_for_a_torch_optimizer() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
    editor = editor_for(torch.optim.AdamW([parameter]))
    assert editor.sums(parameter, lambda e: e // 2, 2).tolist() == [[-1.0, 7.0], [3.0, 7.0], [0.0, 0.0]]
    editor.write(parameter, torch.tensor([2, 3]), 0.0, 0.5)
    assert parameter.tolist() == [[1.0, -2.0], [0.0, 0.0]]
    editor.write(parameter, torch.tensor([3, 0]), torch.tensor([5.0, 6.0], dtype=torch.float64), 0.5)
    assert parameter.tolist() == [[6.0, -2.0], [0.0, 5.0]]


class _Residual(nn.Module):
    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self._in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).float() * 1.0
        y = self.second(h).float()
        if self._in_place:
            h += y
            return h
        return h + y


def test_an_input_that_is_changed_in_place_is_named() -> None:
    """Under autocast the product is of a copy, so that autograd has nothing against it; the signal is of what the layer read."""
    for in_place in (False, True):
        model = _Residual(in_place=in_place)
        sparsify(model, [{"match": "second", "sparsity": 0.5}])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        topology = Topology(model, every=1, total_steps=10).bind(optimizer)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(4, 16)).square().mean()
        if in_place:
            with pytest.raises(
                RuntimeError, match="the input of layer second was changed in place after the layer had"
            ):
                loss.backward()
        else:
            loss.backward()
            optimizer.step()
            assert topology.step() is not None


@pytest.mark.parametrize("pattern", ["diagonal", "unstructured"])
def test_the_signal_is_in_fp32_also_where_autocast_is_on(pattern: str) -> None:
    scores = []
    for autocast in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16))
        sparsify(model, [{"match": "0", "sparsity": 0.5, "pattern": pattern}])
        topology = Topology(model, every=1, total_steps=10).bind(torch.optim.SGD(model.parameters()))
        loss = model(torch.randn(64, 16)).square().mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss.backward()
        scores.append(topology._signal.take().scores["0"])
    assert torch.equal(*scores)


def test_the_signal_of_several_micro_batches_is_fp32_whatever_the_default() -> None:
    model, topology, optimizer = _start(accumulation=2, every=1)
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.randn(12, 16, dtype=torch.float32)
        for part in x.chunk(2):
            model(part).square().mean().backward()
        optimizer.step()
        assert topology.step() is not None
    finally:
        torch.set_default_dtype(torch.float32)


def test_copies_and_closed_topologies_do_not_watch() -> None:
    model, topology, _ = _start(every=1)
    assert model[0].watch is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0].watch is None
        twin(torch.randn(4, 16)).square().mean().backward()
    assert topology._signal.active
    topology.close()
    for _ in range(2):
        model(torch.randn(4, 16)).square().mean().backward()


def test_a_trained_layer_is_trained_on() -> None:
    """With what it has: the surplus that it began with is gone, or has been given back."""
    for settled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16))
        sparsify(model, [{"match": "*", "sparsity": 0.75}], explore=2.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        topology = Topology(model, every=2, total_steps=20).bind(optimizer)
        _train(model, topology, optimizer, 20)
        if settled:
            for layer in (model[0], model[2]):
                layer.finalize()
        assert not Topology(model, method="static", total_steps=10).update_steps
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        topology = Topology(model, every=2, total_steps=20).bind(optimizer)
        updates = [update for update in _train(model, topology, optimizer, 20) if update is not None]
        assert all(len(change.dropped) == len(change.grown) for update in updates for change in update.layers)
        assert sum(len(change.grown) for update in updates for change in update.layers) > 0
        assert [layer.num_active for layer in (model[0], model[2])] == [12, 12]


class _Decorated(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, _Decorated])
def test_the_order_of_steps_is_checked(kind: Any) -> None:
    """An update before the optimiser's step would have it apply gradients of what was dropped to what has grown in its place."""
    model = _model()
    optimizer = kind(model.parameters(), lr=0.1)
    topology = Topology(model, method="set", every=2, total_steps=40).bind(optimizer).bind(optimizer)
    model(torch.randn(4, 16)).square().mean().backward()
    with pytest.raises(
        RuntimeError, match=r"Topology\.step\(\) without a step of the optimiser since the last one: call it"
    ):
        topology.step()
    assert topology.steps == 0
    optimizer.step()
    topology.step()
    topology.step(False)
    with pytest.raises(RuntimeError, match="without a step of the optimiser"):
        topology.step()
    for _ in range(2):  # the first of which was taken back, for example
        optimizer.step()
    assert topology.step() is not None
    twins = copy.deepcopy((model, optimizer, topology))
    for _, own_optimizer, own in (twins, (model, optimizer, topology)):
        own_optimizer.step()
        own.step()
    topology.close()
    assert not optimizer._optimizer_step_post_hooks


def test_inputs_may_come_from_inference_mode() -> None:
    model, topology, optimizer = _start(every=1)
    with torch.inference_mode():
        x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    assert topology.step() is not None


def test_the_last_step_is_a_share_of_all_whatever_floats_make_of_it() -> None:
    assert Settings(total_steps=100, until=0.29).last_step == 29
    assert Settings(total_steps=100, until=0.57).last_step == 57
    assert Settings(total_steps=3, until=0.5).last_step == 1


@pytest.mark.parametrize(
    ("method", "rule", "settings", "grown"),
    [
        ("rigl", {"band": 32}, {}, False),  # 1 of 2 units: 0.3 of one rounds to none
        ("rigl", {"band": 8}, {}, True),  # 4 of 8: one
        ("dynadiag", {"band": 16}, {}, False),  # 2 of 4, and 4 at first, of which 0.1 rounds to none
        ("dynadiag", {"band": 16}, {"drop_fraction": 0.3}, True),
        ("rigl", {"pattern": "n_m", "size": 4}, {}, True),  # 2 of 4 in each group
        ("rigl", {"pattern": "n_m", "size": 2}, {}, False),
    ],
)
def test_layers_in_which_nothing_will_grow_are_named(
    method: str, rule: dict[str, Any], settings: dict[str, Any], grown: bool
) -> None:
    gated = {"explore": 2.0, "gate": "straight_through"} if method == "dynadiag" else {}
    model = nn.Sequential(nn.Linear(64, 64))
    sparsify(model, [{"match": "0", "sparsity": 0.5, **rule}], **gated)
    topology = Topology(model, method=method, every=1, total_steps=20, **settings)
    named = f"nothing grows in 1 of 1 layers, whose units are too few for drop_fraction {topology.settings.first_drop_fraction:g} "
    assert (topology.warning is None) == grown
    assert (named in str(topology)) != grown
    optimizer = torch.optim.AdamW(model.parameters())
    topology.bind(optimizer)
    count = 0
    for _ in range(20):
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        update = topology.step()
        count += 0 if update is None else len(update.layers[0].grown)
    assert (count > 0) == grown
