"""Losses and counts of sequences and of images, against sums written out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dst_train.data import Batch, DataError, EvalBatch
from dst_train.engine.evaluate import evaluate
from dst_train.engine.predict import predict
from dst_train.engine.trainer import Trainer
from dst_train.job import BatchPlan, Job

TOKENS = torch.tensor([[0, 1, 2], [2, 2, 1], [1, 0, 0], [0, 0, 0]])
TARGETS = torch.tensor([[1, 2, 0], [2, 1, 1], [0, 0, 2], [1, 1, 1]])


class Engine(nn.Module):
    """A stand-in for DeepSpeed's, of a model of bigrams: the logits after token t are row t of `table`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Embedding(3, 3)
        self.device = torch.device("cpu")
        self.optimizer = SimpleNamespace(param_groups=[])
        self.seen: list[torch.dtype] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen.append(inputs.dtype)
        return self.module(inputs) if inputs.dtype == torch.int64 else inputs

    def backward(self, loss: torch.Tensor) -> None:
        (loss / 2).backward()  # two micro-batches a step

    def step(self) -> None:
        pass

    def was_step_applied(self) -> bool:
        return True

    def zero_optimization_stage(self) -> int:
        return 1

    def get_global_grad_norm(self) -> None:
        return None


@pytest.fixture
def engine() -> Engine:
    torch.manual_seed(0)
    return Engine()


@pytest.fixture
def alone() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _by_hand(table: torch.Tensor, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[list[float], list[bool]]:
    """Cross-entropy, and whether the largest logit is right, of each token in turn."""
    rows = [table[token].tolist() for token in tokens.flatten()]
    pairs = list(zip(rows, targets.flatten().tolist(), strict=True))
    losses = [math.log(sum(math.exp(value) for value in row)) - row[target] for row, target in pairs]
    return losses, [row.index(max(row)) == target for row, target in pairs]


@pytest.mark.usefixtures("alone")
def test_a_training_step_is_the_mean_over_all_tokens(engine: Engine) -> None:
    content = {
        "name": "test",
        "model": {"builder": "mlp", "in_features": 4, "hidden_features": [3], "num_classes": 2},
        "data": {"train": {"shards": "x.tar", "samples": 4, "transform": "next_byte", "length": 3}},
        "train": {"epochs": 1, "batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 0.1},
    }
    job = Job.model_validate(content)
    topology = SimpleNamespace(step=lambda applied: None)
    session: Any = SimpleNamespace(engine=engine, topology=topology, report=None, input_dtype=torch.bfloat16)
    monitor: Any = None
    trainer = Trainer(
        job, BatchPlan.of(job, 1), session, monitor, monitor, save=lambda step: None, stop_requested=lambda: False
    )
    batches = [Batch(TOKENS[:2], TARGETS[:2], 0), Batch(TOKENS[2:], TARGETS[2:], 0)]
    metrics, stopped = trainer._optimizer_step(iter(batches))
    losses, right = _by_hand(engine.module.weight.detach(), TOKENS, TARGETS)
    assert not stopped
    # fp32 losses of size 1
    assert metrics["train/loss"] == pytest.approx(sum(losses) / 12, abs=1e-6)
    assert metrics["train/accuracy"] == pytest.approx(sum(right) / 12)
    gradient = torch.zeros(3, 3)
    for token, target in zip(TOKENS.flatten(), TARGETS.flatten(), strict=True):
        gradient[token] += (engine.module.weight[token].detach().softmax(0) - nn.functional.one_hot(target, 3)) / 12
    torch.testing.assert_close(engine.module.weight.grad, gradient)
    assert engine.seen == [torch.int64, torch.int64]


@pytest.mark.usefixtures("alone")
def test_evaluation_counts_the_tokens_of_valid_sequences(engine: Engine) -> None:
    valid = torch.tensor([True, False, True, True])
    batches = [EvalBatch(TOKENS[half], TARGETS[half], valid[half]) for half in (slice(2), slice(2, 4))]
    found = evaluate(engine, batches, torch.bfloat16, lambda: False)  # type: ignore[arg-type]
    losses, right = _by_hand(engine.module.weight.detach(), TOKENS[valid], TARGETS[valid])
    assert len(losses) == 9
    assert found == {"loss": pytest.approx(sum(losses) / 9, abs=1e-6), "accuracy": pytest.approx(sum(right) / 9)}
    assert engine.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_have_one_row_each(engine: Engine, dtype: torch.dtype) -> None:
    images, labels = torch.tensor([[0.5, 1.0, 2.0], [3.0, 1.5, 0.0]]), torch.tensor([2, 0])
    logits, targets = predict(engine, images, labels, dtype)  # type: ignore[arg-type]
    assert engine.seen == [dtype]
    assert logits.dtype == torch.float32
    assert torch.equal(logits, images)  # all exact in bf16
    assert torch.equal(targets, labels)


def test_a_label_that_is_no_class_is_named() -> None:
    engine: Any = Engine()
    with pytest.raises(DataError, match=r"a sample has label 3, and the model has 3 classes \(0 to 2\)"):
        predict(engine, torch.zeros(2, 3), torch.tensor([0, 3]), torch.float32)
