"""The model of a run, for use after training."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

from dst_train import models
from dst_train.engine.build import sparsify_by
from dst_train.engine.checkpoint import CheckpointError, search
from dst_train.job import BatchPlan, Job
from dst_train.sparse import LowRank, sparse_layers
from dst_train.topology import policy


def load_model(run_directory: str | Path) -> nn.Module:
    """The model as the newest checkpoint of a run that verifies has it: on the CPU, in fp32, in evaluation mode.

    Its sparse layers are sparse; `dst_train.densify` makes plain linear layers of them. Needs no process group.

    Raises:
        CheckpointError: there is no checkpoint, or none verifies.
    """
    root = Path(run_directory) / "checkpoints"
    found, bad = search(root)
    if found is None:
        raise CheckpointError(f"no checkpoint under {root} can be used{': ' if bad else ''}{'; '.join(bad)}")
    job = Job.model_validate(found.job)
    plan = BatchPlan.of(job, found.world_size)
    model = models.build(job.model, seed=job.seed)
    sparsify_by(job, plan, model)
    if job.deepspeed.zero_optimization.stage == 3:
        state = get_fp32_state_dict_from_zero_checkpoint(str(root), found.tag)
    else:
        state = torch.load(root / found.tag / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)[
            "module"
        ]
    model.load_state_dict(state)
    _as_at(found.step, job, plan, model)
    return model.eval()


def _as_at(step: int, job: Job, plan: BatchPlan, model: nn.Module) -> None:
    """What depends on the step and is no part of the state, as after that step."""
    if job.sparsity is not None and job.sparsity.low_rank is not None:
        for module in model.modules():
            if isinstance(module, LowRank):
                module.active = step - 1 >= job.sparsity.low_rank.start * plan.total_steps
    start, end = job.topology.temperature.start, job.topology.temperature.end
    last_step = int(job.topology.update.until * plan.total_steps)
    for layer in sparse_layers(model).values():
        layer.temperature = policy.temperature(start, end, step + 1, last_step)
