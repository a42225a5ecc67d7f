"""The low-rank path under ZeRO 0 to 3: a parameter that receives no gradient until its path starts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import LowRank, sparsify
from tests.distributed.ranks import run_ranks

STEPS, START, BATCH, WORLD = 6, 4, 12, 2
States = list[dict[str, Tensor]]


def _model(rank: int) -> nn.Sequential:
    torch.manual_seed(0)
    # 15 x 7 values and 75 x 3 of the path do not divide by two ranks: ZeRO 3 pads them.
    model = nn.Sequential(nn.Linear(7, 75), nn.GELU(), nn.Linear(75, 16), nn.GELU(), nn.Linear(16, 4))
    sparsify(model, [{"match": "[02]", "sparsity": 0.8}], rank=rank)
    return model


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(BATCH, 7, generator=generator) for _ in range(STEPS)]


def _switch(model: nn.Module, step: int) -> None:
    for module in model.modules():
        if isinstance(module, LowRank):
            module.active = step >= START


def _whole(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(
        list(engine.module.parameters()), enabled=engine.zero_optimization_stage() == 3
    ):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def _run(stages: list[int]) -> dict[tuple[int, int], States]:
    """The parameters after each step, by (stage, rank of the path)."""
    import deepspeed

    from dst_train.engine.session import init_distributed

    process, world_size = init_distributed()
    results = {}
    for stage in stages:
        for rank in (0, 3):
            zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
            config = {
                "train_batch_size": BATCH,
                "train_micro_batch_size_per_gpu": BATCH // world_size,
                # Clipping would see the gradient of the path, and before, zeros among the summands of the norm.
                "gradient_clipping": 0.0,
                "zero_optimization": zero,
                "steps_per_print": 2**31,
            }
            model = _model(rank)
            engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model), config=config)
            states = []
            for step, x in enumerate(_batches()):
                _switch(engine.module, step)
                engine.backward((engine(x.chunk(world_size)[process]) - 1).square().mean())
                engine.step()
                states.append(_whole(engine))
            results[stage, rank] = states
    return results


@functools.cache
def _results() -> list[dict[tuple[int, int], States]]:
    return run_ranks(WORLD, _run, [0, 1, 2, 3])


@functools.cache
def _alone() -> States:
    """In one process and plain PyTorch. Like DeepSpeed, the optimiser sees zeros where there is no gradient, so that its
    step counter runs from the beginning."""
    model = _model(3)
    optimizer = _optimizer(model)
    states = []
    for step, x in enumerate(_batches()):
        _switch(model, step)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return states


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_changes_until_the_path_starts(stage: int) -> None:
    for results in _results():
        for step, (without, late) in enumerate(zip(results[stage, 0], results[stage, 3], strict=True)):
            same = all(torch.equal(late[name], tensor) for name, tensor in without.items())
            assert same == (step < START + 1), step  # the first step of the path moves up alone, which was zero
            assert bool(late["0.low_rank.up"].any()) == (step >= START)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_path_learns_as_in_one_process(stage: int) -> None:
    for results in _results():
        for ours, expected in zip(results[stage, 3], _alone(), strict=True):
            for name, tensor in expected.items():
                # Reduction order changes the last bits of a gradient; Adam divides by sqrt(v), 6 steps of lr 1e-2.
                torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
