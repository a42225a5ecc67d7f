"""The model of a run, for use after training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from pydantic import ValidationError
from torch import nn

from dst_train import models
from dst_train.engine import reshard
from dst_train.engine.build import build_topology, sparsify_model
from dst_train.engine.manifest import CheckpointError, search
from dst_train.job import BatchPlan, Job


@dataclass(frozen=True)
class LoadedRun:
    """What the newest checkpoint of a run that verifies holds."""

    model: nn.Module
    job: Job
    step: int


def load_model(run_directory: str | Path) -> nn.Module:
    """The model as the newest checkpoint of a run that verifies has it: on the CPU, in fp32, in evaluation mode.

    Its sparse layers are sparse; `dst_train.densify` makes plain linear layers of them. Needs no process group. The values are those
    that the forward pass used, of `bf16_params` rounded to bf16; at ZeRO stage 3 the masters.

    Raises:
        CheckpointError: there is no checkpoint, none verifies, or its job is not one of this version.
    """
    return load_run(run_directory).model


def load_run(run_directory: str | Path) -> LoadedRun:
    """`load_model`, with the job and the step."""
    root = Path(run_directory) / "checkpoints"
    found, bad = search(root)
    if found is None:
        raise CheckpointError(f"no checkpoint under {root} can be used{': ' if bad else ''}{'; '.join(bad)}")
    try:
        job = Job.model_validate(found.job)
    except ValidationError as error:
        raise CheckpointError(f"{root / found.tag} has a job of another version of dst-train: {error}") from error
    plan = BatchPlan.of(job, found.world_size)
    model = models.build(models.untrained(job.model), seed=job.seed)
    sparsify_model(job, plan, model)
    if found.stage == 3:
        state = get_fp32_state_dict_from_zero_checkpoint(str(root), found.tag)
    else:
        state = reshard.rank_0(root / found.tag)["module"]
    model.load_state_dict(state)
    build_topology(job, plan, model).set_temperature(found.step + 1)
    return LoadedRun(model.eval(), job, found.step)
