"""The layers and methods of the baselines under ZeRO, with several micro-batches: as in one process of plain PyTorch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import sparse_layers, sparsify
from dst_train.topology import Topology
from tests.distributed.ranks import run_ranks

STEPS, BATCH, WORLD, ACCUMULATION = 6, 16, 2, 2
STAGES = (1, 3)
METHODS = {"srigl": "constant_fan_in", "chase": "unstructured"}
Result = dict[str, Tensor]


def _model(method: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8)
    )
    rules = [
        {"match": "0", "sparsity": 0.5, "pattern": METHODS[method]},
        {"match": "2", "sparsity": 0.5, "pattern": "sr_ste", "size": 4},
        {"match": "4", "sparsity": 0.5, "pattern": "butterfly", "size": 2},
        {"match": "6", "sparsity": 0.5, "pattern": "sdgp", "size": 4},
    ]
    sparsify(model, rules, accumulation=ACCUMULATION)
    with torch.no_grad():
        # So large that a wrong share of the decay shows.
        model[2].decay *= 500
    return model


def _topology(model: nn.Module, method: str) -> Topology:
    return Topology(
        model, method=method, every=2, total_steps=20, gamma_sal=1.0, drop_fraction=0.5, accumulation=ACCUMULATION
    )


def _batches() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [list(torch.randn(BATCH, 8, generator=generator).chunk(ACCUMULATION)) for _ in range(STEPS)]


def _loss(y: Tensor) -> Tensor:
    return (y - 1.0).square().mean()


def _result(model: nn.Module) -> Result:
    units = {f"{name} units": layer.units() for name, layer in sparse_layers(model).items()}
    return {**units, **{name: p.detach().clone() for name, p in model.named_parameters()}}


def _alone(method: str) -> Result:
    model = _model(method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    topology = _topology(model, method).bind(optimizer)
    for parts in _batches():
        optimizer.zero_grad()
        for x in parts:
            (_loss(model(x)) / ACCUMULATION).backward()
        optimizer.step()
        topology.step()
    return _result(model)


def _run() -> dict[tuple[int, str], Result]:
    import deepspeed

    import dst_train.engine.params  # noqa: F401
    from dst_train.engine.session import init_distributed

    rank, world_size = init_distributed()
    results: dict[tuple[int, str], Result] = {}
    for stage in STAGES:
        for method in METHODS:
            config: dict[str, Any] = {
                "train_batch_size": BATCH,
                "train_micro_batch_size_per_gpu": BATCH // world_size // ACCUMULATION,
                "gradient_accumulation_steps": ACCUMULATION,
                "zero_optimization": {
                    "stage": stage,
                    **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
                },
                "steps_per_print": 2**31,
            }
            model = _model(method)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            topology = _topology(engine.module, method).bind(engine)
            for parts in _batches():
                for x in parts:
                    engine.backward(_loss(engine(x.chunk(world_size)[rank])))
                    engine.step()
                topology.step()
            parameters = list(engine.module.parameters()) if stage == 3 else []
            with deepspeed.zero.GatheredParameters(parameters):
                results[stage, method] = _result(engine.module)
    return results


@functools.cache
def _results() -> list[dict[tuple[int, str], Result]]:
    return run_ranks(WORLD, _run)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_single_process_result(method: str, stage: int) -> None:
    expected = _alone(method)
    assert not torch.equal(expected["0 units"], _model(method)[0].units())
    for result in (r[stage, method] for r in _results()):
        assert torch.equal(result["0 units"], expected["0 units"])
        for name, parameter in expected.items():
            # The order of sums in a gradient, which Adam divides by sqrt(v), over 6 steps of lr 1e-2.
            torch.testing.assert_close(result[name], parameter, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
