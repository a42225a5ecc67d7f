"""Topology updates under ZeRO 0 to 3: masters, the copies that the forward reads, and Adam moments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import SparseLayer, sparse_layers, sparsify
from dst_train.topology import Topology
from tests.distributed.ranks import run_ranks

STEPS, BATCH, WORLD = 6, 12, 2
PRECISIONS = ("fp32", "bf16", "bf16_params")
# (stage, precision, method); bf16 parameters at stage 0 are refused by the job.
CONFIGS = [(s, p, "rigl") for s in range(4) for p in PRECISIONS if (s, p) != (0, "bf16_params")]
CONFIGS += [(s, "fp32", m) for s in range(4) for m in ("dynadiag", "unstructured", "permuted")] + [
    (3, "bf16_params", "dynadiag")
]
Config = tuple[int, str, str]
SECTIONS = {
    "fp32": {},
    "bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}},
    "bf16_params": {"bf16": {"enabled": True}},
}


def _model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    # 15 x 7 values do not divide by two ranks: ZeRO 3 pads them.
    model = nn.Sequential(nn.Linear(7, 75), nn.GELU(), nn.Linear(75, 16), nn.GELU(), nn.Linear(16, 4))
    pattern = "unstructured" if kind == "unstructured" else "diagonal"
    more = {"explore": 2.0, "gate": "straight_through"} if kind == "dynadiag" else {}
    permute = "learned" if kind == "permuted" else "none"
    sparsify(model, [{"match": "[02]", "sparsity": 0.8, "pattern": pattern, "permute": permute}], **more)
    return model


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    """In groups, as jobs have them: DeepSpeed steps them one after the other."""
    importance = {id(layer.alpha) for layer in sparse_layers(model).values()}
    alphas = [p for p in model.parameters() if id(p) in importance]
    others = [p for p in model.parameters() if id(p) not in importance]
    groups = [[p for p in others if p.dim() >= 2], [p for p in others if p.dim() < 2], alphas]
    return torch.optim.AdamW([{"params": group} for group in groups if group], lr=1e-2)


def _topology(model: nn.Module, kind: str) -> Topology:
    share = 1.0 if kind == "permuted" else 0.3  # of 75 inputs, some are to move
    method = "dynadiag" if kind == "dynadiag" else "rigl"
    return Topology(model, method=method, every=2, total_steps=12, drop_fraction=share, cold_start=1.0)


def _parameters(model: nn.Module) -> dict[str, tuple[SparseLayer, nn.Parameter]]:
    """The parameters that an update edits, by name."""
    found = {}
    for name, layer in sparse_layers(model).items():
        found[name] = (layer, layer.stored)
        if layer.alpha is not None:
            found[f"{name}.alpha"] = (layer, layer.alpha)
    return found


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(BATCH, 7, generator=generator) for _ in range(STEPS)]


def _alone(kind: str) -> dict[str, dict[str, Tensor]]:
    """The single-process result in plain PyTorch."""
    model = _model(kind)
    optimizer = _optimizer(model)
    topology = _topology(model, kind).bind(optimizer)
    for x in _batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        topology.step()
    return {
        name: {
            "master": parameter.detach().flatten(),
            "exp_avg": optimizer.state[parameter]["exp_avg"].flatten(),
            "exp_avg_sq": optimizer.state[parameter]["exp_avg_sq"].flatten(),
            "units": layer.units(),
            "order": getattr(layer, "order", None),
        }
        for name, (layer, parameter) in _parameters(model).items()
    }


def _pieces(engine: Any, editor: Any) -> dict[str, dict[str, Any]]:
    """What this rank holds of each edited parameter: (start, flat tensor), and the copy that the forward reads, whole."""
    import deepspeed

    result = {}
    for name, (layer, parameter) in _parameters(engine.module).items():
        piece = editor.piece(parameter)
        owned = {} if piece is None else {"master": piece.master, **piece.state}
        held = {k: (piece.start, v.detach().clone()) for k, v in owned.items()}
        if engine.zero_optimization_stage() == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                forward = parameter.detach().clone()
        else:
            forward = parameter.detach().clone()
        result[name] = {"pieces": held, "forward": forward.flatten(), "units": layer.units()}
        result[name]["order"] = getattr(layer, "order", None)
    return result


def _engine(
    stage: int, precision: str, kind: str, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = _optimizer
) -> tuple[Any, Topology]:
    """A new model's, on the ranks of this process group."""
    import deepspeed
    import torch.distributed as dist

    import dst_train.engine.params  # noqa: F401

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **SECTIONS[precision],
    }
    model = _model(kind)
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
    return engine, _topology(engine.module, kind).bind(engine)


def _step(engine: Any, precision: str, x: Tensor) -> None:
    """x: of all ranks."""
    import torch.distributed as dist

    x = x.chunk(dist.get_world_size())[dist.get_rank()]
    y = engine(x.to(torch.bfloat16) if precision == "bf16_params" else x)
    engine.backward(y.float().square().mean())
    engine.step()


def _run(configs: list[Config]) -> dict[Config, dict[str, Any]]:
    import torch.distributed as dist

    from dst_train.engine.session import init_distributed

    init_distributed()
    results = {}
    for stage, precision, kind in configs:
        engine, topology = _engine(stage, precision, kind)
        before: dict[str, Any] = {}
        for x in _batches():
            _step(engine, precision, x)
            before = _pieces(engine, topology._editor)
            update = topology.step()
        assert update is not None
        results[stage, precision, kind] = {"before": before, "after": _pieces(engine, topology._editor)}
        dist.barrier()
    return results


def _whole(ranks: list[dict[str, Any]], key: str, numel: int) -> Tensor:
    """Puts the ranks' pieces of a tensor together; every element must be owned, and equally by all that own it."""
    whole = torch.full((numel,), torch.nan)
    for held in ranks:
        if key in held["pieces"]:
            start, tensor = held["pieces"][key]
            part = whole[start : start + tensor.numel()]
            assert torch.all(part.isnan() | (part == tensor))
            part.copy_(tensor)
    assert not whole.isnan().any()
    return whole


@functools.cache
def _results() -> list[dict[Config, dict[str, Any]]]:
    return run_ranks(WORLD, _run, CONFIGS)


@functools.cache
def _expected(kind: str) -> dict[str, dict[str, Tensor]]:
    return _alone(kind)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c[1] == "fp32"])
def test_equals_the_single_process_result(config: Config) -> None:
    for name, expected in _expected(config[2]).items():
        ranks = [r[config]["after"][name] for r in _results()]
        for held in ranks:
            assert torch.equal(held["units"], expected["units"])
            if config[2] == "permuted":
                assert torch.equal(held["order"], expected["order"])
                assert name == "0" or not torch.equal(held["order"], held["order"].sort().values)
        for key, rtol in (("master", 1e-4), ("exp_avg", 1e-4), ("exp_avg_sq", 1e-4)):
            whole = _whole(ranks, key, expected["master"].numel())
            assert torch.equal(whole == 0, expected[key] == 0)  # the regrown units, to the bit
            # Reduction order changes the last bits of a gradient; Adam divides by sqrt(v), 6 steps of lr 1e-2.
            torch.testing.assert_close(whole, expected[key], rtol=rtol, atol=2e-6 if key == "master" else 1e-7)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c[2] != "permuted"])
def test_an_update_resets_regrown_units_and_leaves_the_others(config: Config) -> None:
    for name, expected in _expected(config[2]).items():
        if name.endswith(".alpha"):
            continue
        before = [r[config]["before"][name] for r in _results()]
        after = [r[config]["after"][name] for r in _results()]
        slots, numel = expected["units"].numel(), before[0]["forward"].numel()
        changed = after[0]["units"] != before[0]["units"]
        assert 0 < changed.sum() < slots
        elements = changed.repeat_interleave(numel // slots)
        for key in ("master", "exp_avg", "exp_avg_sq"):
            old, new = _whole(before, key, numel), _whole(after, key, numel)
            assert torch.equal(new[~elements], old[~elements])
            if key == "exp_avg_sq":
                kept = (~changed & (before[0]["units"] >= 0)).repeat_interleave(numel // slots)
                survivors = old[kept].double().mean()
                rows = new[elements].double()
                grown = (after[0]["units"] >= 0).repeat_interleave(numel // slots)[elements]  # what left is 0
                torch.testing.assert_close(rows, survivors * grown, rtol=2**-23, atol=0)
            else:
                assert not new[elements].any()


@pytest.mark.parametrize("config", CONFIGS)
def test_the_forward_reads_what_the_masters_hold(config: Config) -> None:
    for name in _expected(config[2]):
        after = [r[config]["after"][name] for r in _results()]
        master = _whole(after, "master", after[0]["forward"].numel())
        for held in after:
            assert torch.equal(held["units"], after[0]["units"])
            assert torch.equal(held["forward"], master.to(held["forward"].dtype))
            assert held["forward"].dtype == (torch.bfloat16 if config[1] == "bf16_params" else torch.float32)


def _refused() -> str:
    import deepspeed

    from dst_train.engine.session import init_distributed

    init_distributed()
    model = _model("rigl")
    config = {"train_batch_size": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    with pytest.raises(ValueError, match="ZeRO stage 0 with bf16 or fp16 parameters is not supported") as caught:
        _topology(engine.module, "rigl").bind(engine)
    return str(caught.value)


def test_bf16_parameters_at_stage_0_are_refused() -> None:
    assert "autocast" in run_ranks(1, _refused)[0]


def _missing() -> list[str]:
    """What is said, by stage, of a sparse layer that the optimiser was not given."""
    import deepspeed

    from dst_train.engine.session import init_distributed

    init_distributed()
    said = []
    for stage in (0, 1, 2, 3):
        model = _model("rigl")
        without = [p for name, p in model.named_parameters() if name != "0.values"]
        config = {"train_batch_size": 4, "zero_optimization": {"stage": stage}}
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(without), config=config)
        with pytest.raises(ValueError, match="is not among the optimiser's parameters") as caught:
            _topology(engine.module, "rigl").bind(engine)
        said.append(str(caught.value))
    return said


def test_a_layer_that_the_optimiser_does_not_have_is_refused_at_each_stage() -> None:
    assert set(run_ranks(1, _missing)[0]) == {
        "0 (weight) is not among the optimiser's parameters; create the optimiser after sparsify()"
    }
