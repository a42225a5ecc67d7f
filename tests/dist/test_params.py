"""Topology updates under ZeRO 0 to 3: masters, the copies that the forward reads, and Adam moments."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import sparse_layers, sparsify
from dst_train.topology import Topology
from tests.dist.ranks import run_ranks

STEPS, BATCH, WORLD = 6, 12, 2
# (stage, precision); bf16 parameters at stage 0 are refused by the job.
CONFIGS = [(s, p) for s in range(4) for p in ("fp32", "bf16", "bf16_params") if (s, p) != (0, "bf16_params")]
SECTIONS = {
    "fp32": {},
    "bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}},
    "bf16_params": {"bf16": {"enabled": True}},
}


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    # 15 x 7 values do not divide by two ranks: ZeRO 3 pads them.
    model = nn.Sequential(nn.Linear(7, 75), nn.GELU(), nn.Linear(75, 16), nn.GELU(), nn.Linear(16, 4))
    sparsify(model, [{"match": "[02]", "sparsity": 0.8}])
    return model


def _topology(model: nn.Module) -> Topology:
    return Topology(model, method="rigl", every=2, total_steps=12)


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(BATCH, 7, generator=generator) for _ in range(STEPS)]


def _alone() -> dict[str, dict[str, Tensor]]:
    """The single-process result in plain PyTorch."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    topology = _topology(model).bind(optimizer)
    for x in _batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        topology.step()
    return {
        name: {
            "master": layer.values.detach().flatten(),
            "exp_avg": optimizer.state[layer.values]["exp_avg"].flatten(),
            "exp_avg_sq": optimizer.state[layer.values]["exp_avg_sq"].flatten(),
            "offsets": layer.offsets.clone(),
        }
        for name, layer in sparse_layers(model).items()
    }


def _pieces(engine: Any, editor: Any) -> dict[str, dict[str, Any]]:
    """What this rank holds of each sparse layer: (start, flat tensor), and the copy that the forward reads, whole."""
    import deepspeed

    result = {}
    for name, layer in sparse_layers(engine.module).items():
        piece = editor.piece(layer.values)
        owned = {} if piece is None else {"master": piece.master, **piece.state}
        held = {k: (piece.start, v.detach().clone()) for k, v in owned.items()}
        if engine.zero_optimization_stage() == 3:
            with deepspeed.zero.GatheredParameters([layer.values]):
                forward = layer.values.detach().clone()
        else:
            forward = layer.values.detach().clone()
        result[name] = {"pieces": held, "forward": forward.flatten(), "offsets": layer.offsets.clone()}
    return result


def _run(configs: list[tuple[int, str]]) -> dict[tuple[int, str], dict[str, Any]]:
    import deepspeed
    import torch.distributed as dist

    import dst_train.engine.params  # noqa: F401
    from dst_train.engine.session import start_distributed

    rank, world_size = start_distributed()
    results = {}
    for stage, precision in configs:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
        config = {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // world_size,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "steps_per_print": 2**31,
            **SECTIONS[precision],
        }
        model = _model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        topology = _topology(engine.module).bind(engine)
        before: dict[str, Any] = {}
        for x in _batches():
            x = x.chunk(world_size)[rank]
            y = engine(x.to(torch.bfloat16) if precision == "bf16_params" else x)
            engine.backward(y.float().square().mean())
            engine.step()
            before = _pieces(engine, topology._editor)
            update = topology.step()
        assert update is not None
        results[stage, precision] = {"before": before, "after": _pieces(engine, topology._editor)}
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
def _results() -> list[dict[tuple[int, str], dict[str, Any]]]:
    return run_ranks(WORLD, _run, CONFIGS)


@functools.cache
def _expected() -> dict[str, dict[str, Tensor]]:
    return _alone()


@pytest.mark.parametrize(("stage", "precision"), [c for c in CONFIGS if c[1] == "fp32"])
def test_equals_the_single_process_result(stage: int, precision: str) -> None:
    for name, expected in _expected().items():
        ranks = [r[stage, precision]["after"][name] for r in _results()]
        for held in ranks:
            assert torch.equal(held["offsets"], expected["offsets"])
        for key, rtol in (("master", 1e-4), ("exp_avg", 1e-4), ("exp_avg_sq", 1e-4)):
            whole = _whole(ranks, key, expected["master"].numel())
            assert torch.equal(whole == 0, expected[key] == 0)  # the regrown rows, to the bit
            # Reduction order changes the last bits of a gradient; Adam divides by sqrt(v), 6 steps of lr 1e-2.
            torch.testing.assert_close(whole, expected[key], rtol=rtol, atol=2e-6 if key == "master" else 1e-7)


@pytest.mark.parametrize(("stage", "precision"), CONFIGS)
def test_an_update_resets_regrown_rows_and_leaves_the_others(stage: int, precision: str) -> None:
    for name in _expected():
        before = [r[stage, precision]["before"][name] for r in _results()]
        after = [r[stage, precision]["after"][name] for r in _results()]
        slots = before[0]["offsets"].numel()
        numel = before[0]["forward"].numel()
        changed = after[0]["offsets"] != before[0]["offsets"]
        assert 0 < changed.sum() < slots
        rows = changed.repeat_interleave(numel // slots)
        for key in ("master", "exp_avg", "exp_avg_sq"):
            old, new = _whole(before, key, numel), _whole(after, key, numel)
            assert torch.equal(new[~rows], old[~rows])
            if key == "exp_avg_sq":
                survivors = old[~rows].double().mean()
                torch.testing.assert_close(new[rows].double(), survivors.expand(int(rows.sum())), rtol=2**-23, atol=0)
            else:
                assert not new[rows].any()
        master = _whole(after, "master", numel)
        for held in after:
            assert torch.equal(held["offsets"], after[0]["offsets"])
            assert torch.equal(held["forward"], master.to(held["forward"].dtype))
            assert held["forward"].dtype == (torch.bfloat16 if precision == "bf16_params" else torch.float32)


def _refused() -> str:
    import deepspeed

    from dst_train.engine.session import start_distributed

    start_distributed()
    model = _model()
    config = {"train_batch_size": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    with pytest.raises(ValueError, match="ZeRO stage 0 with bf16 or fp16 parameters is not supported") as caught:
        _topology(engine.module).bind(engine)
    return str(caught.value)


def test_bf16_parameters_at_stage_0_are_refused() -> None:
    assert "autocast" in run_ranks(1, _refused)[0]
