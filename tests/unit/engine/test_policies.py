"""Learning rate, optimiser groups, job differences and the policy for skipped steps."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from dst_train.engine.optim import build_optimizer, learning_rate
from dst_train.engine.resume import JobChangedError, check_job
from dst_train.engine.trainer import NonFiniteError, Trainer
from dst_train.job import BatchPlan, Job
from dst_train.sparse import LowRank

TRAIN = {"epochs": 10, "batch_size": 10, "micro_batch_size": 5}


def _job(**changes: Any) -> Job:
    content: dict[str, Any] = {
        "name": "test",
        "model": {"builder": "mlp", "in_features": 4, "hidden_features": [3], "num_classes": 2},
        "data": {"train": {"shards": "x.tar", "samples": 100, "transform": "digits"}},
        "train": TRAIN,
        "optimizer": {"lr": 0.1, "weight_decay": 0.5},
        "schedule": {"warmup_epochs": 1.0, "min_lr": 0.01},
    }
    return Job.model_validate({**content, **changes})


def test_learning_rate_is_warm_up_then_cosine() -> None:
    job = _job()
    plan = BatchPlan.of(job, 1)
    rates = [learning_rate(job, plan, step) for step in range(1, plan.total_steps + 1)]
    assert rates[:10] == pytest.approx([0.01 * i for i in range(1, 11)])
    assert rates[10] == pytest.approx(0.1)
    # Step 56 is halfway through the 90 steps that follow the warm-up.
    assert rates[55] == pytest.approx(0.055)
    assert rates[-1] == pytest.approx(0.01 + 0.045 * (1 + math.cos(math.pi * 89 / 90)))
    constant = _job(schedule={"name": "constant", "warmup_epochs": 1.0})
    assert {learning_rate(constant, plan, step) for step in range(11, 101)} == {0.1}


def test_vectors_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, plain = build_optimizer(_job(), model).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert [p.dim() for p in decayed["params"]] == [2]
    assert [p.dim() for p in plain["params"]] == [1, 1, 1]
    sgd = build_optimizer(_job(optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.7}), model)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["momentum"] == 0.7


def test_what_the_model_excludes_is_not_decayed() -> None:
    model = timm.create_model("test_vit", num_classes=2)
    decayed, plain = build_optimizer(_job(), model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {"pos_embed", "cls_token"} <= {names[id(p)] for p in plain["params"]}
    assert {names[id(p)].rsplit(".")[-1] for p in decayed["params"]} == {"weight"}


def test_job_differences() -> None:
    old = _job().model_dump(mode="json")
    assert check_job(old, old) == []
    assert check_job(old, _job(monitor={"every_steps": 7}).model_dump(mode="json")) == ["monitor.every_steps: 50 -> 7"]
    with pytest.raises(JobChangedError, match=r"seed: 0 -> 1; topology\.method: 'rigl' -> 'set'\. Change it back"):
        check_job(old, _job(seed=1, topology={"method": "set"}, monitor={"every_steps": 7}).model_dump(mode="json"))


def test_the_zero_stage_may_change_but_not_from_or_to_0() -> None:
    jobs = [_job(deepspeed={"zero_optimization": {"stage": s}}).model_dump(mode="json") for s in range(4)]
    key = "deepspeed.zero_optimization.stage"
    for old, new in itertools.permutations(range(4), 2):
        if 0 not in (old, new):
            assert check_job(jobs[old], jobs[new]) == [f"{key}: {old} -> {new}"]
        else:
            with pytest.raises(JobChangedError, match=f"{key}: {old} -> {new}"):
                check_job(jobs[old], jobs[new])


def _trainer(max_skipped_steps: int) -> tuple[Trainer, list[str]]:
    said: list[str] = []
    job = _job(
        train={"epochs": 1, "batch_size": 10, "micro_batch_size": 5, "max_skipped_steps": max_skipped_steps},
        schedule={},
    )
    session: Any = SimpleNamespace(engine=SimpleNamespace(module=nn.Identity()))
    monitor: Any = SimpleNamespace(message=said.append)
    trainer = Trainer(
        job,
        BatchPlan.of(job, 1),
        session,
        monitor,
        SimpleNamespace(),
        save=lambda step: None,
        stop_requested=lambda: False,
    )
    return trainer, said


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_without_zero_nothing_that_is_not_finite_reaches_the_weights(loss: float, gradient: float) -> None:
    trainer, _ = _trainer(0)
    module = nn.Linear(2, 2)
    trainer._engine.module = module
    trainer._refuse_non_finite(1.0)
    module.weight.grad = torch.ones(2, 2)
    trainer._refuse_non_finite(1.0)
    module.weight.grad[0, 1] = gradient
    with pytest.raises(NonFiniteError, match=f"step 1: the loss is {loss}, the norm of the gradients"):
        trainer._refuse_non_finite(loss)


def test_skipped_steps_are_counted_and_limited_in_a_row() -> None:
    trainer, said = _trainer(2)
    for applied in (False, False, True, False, False):
        trainer._count_skipped(applied, 1.0)
    assert trainer.skipped == 4
    assert said[-1] == "step 0: loss 1.0, skipped because of a non-finite gradient (2 in a row of at most 2)"
    with pytest.raises(NonFiniteError, match=r"3 in a row, train\.max_skipped_steps allows 2"):
        trainer._count_skipped(False, math.nan)


def test_the_low_rank_path_takes_part_from_its_share_of_the_steps_on() -> None:
    rules = [{"match": "*", "sparsity": 0.5}]
    job = _job(sparsity={"rules": rules, "low_rank": {"rank": 1, "start": 0.55}}, train={**TRAIN, "epochs": 2})
    model = nn.Sequential(LowRank(4, 4, 1))
    session: Any = SimpleNamespace(engine=SimpleNamespace(module=model))
    none: Any = None
    trainer = Trainer(
        job, BatchPlan.of(job, 1), session, none, none, save=lambda step: None, stop_requested=lambda: False
    )
    seen = []
    for trainer.step in range(20):
        trainer._switch_low_rank()
        seen.append(model[0].active)
    assert seen == [False] * 11 + [True] * 9


def test_a_bad_loss_that_was_applied_is_never_tolerated() -> None:
    trainer, _ = _trainer(5)
    with pytest.raises(NonFiniteError, match="loss nan, applied"):
        trainer._count_skipped(True, math.nan)
