"""Optimiser and learning rate of a job."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dst_train.job import BatchPlan, Job
from dst_train.sparse import sparse_layers

# Key of a parameter group: its learning rate as a multiple of the job's.
LR_SCALE = "lr_scale"


def build_optimizer(job: Job, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD in up to three groups: matrices decay; vectors (biases, norms, scales) do not, nor what the model's own
    `no_weight_decay()` names (timm: position embeddings, class tokens), nor the learned importance of units, which has a
    learning rate of its own."""
    importance = [layer.alpha for layer in sparse_layers(model).values() if layer.alpha is not None]
    known = {id(parameter) for parameter in importance}
    others = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in known}
    names: Callable[[], Iterable[str]] = getattr(model, "no_weight_decay", tuple)
    excluded = set(names())
    decayed = [p for name, p in others.items() if p.dim() >= 2 and name not in excluded]
    plain = [p for name, p in others.items() if p.dim() < 2 or name in excluded]
    spec = job.optimizer
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": importance, "weight_decay": 0.0, LR_SCALE: job.topology.alpha_lr},
    ]
    groups = [group for group in groups if group["params"]]
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)


def learning_rate(job: Job, plan: BatchPlan, step: int) -> float:
    """The rate of optimiser step `step` (from 1): linear warm-up from lr / warmup_steps, then cosine to min_lr or constant.

    A pure function of the step, so that it needs no state in a checkpoint.
    """
    peak, floor, warmup = job.optimizer.lr, job.schedule.min_lr, plan.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if job.schedule.name == "constant":
        return peak
    progress = (step - warmup - 1) / max(1, plan.total_steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    for group in groups:
        group["lr"] = rate * group.get(LR_SCALE, 1.0)
