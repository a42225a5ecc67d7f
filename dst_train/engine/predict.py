"""A micro-batch through the model, with one row for each thing that is predicted: an image or each token of a sequence."""

from __future__ import annotations

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from dst_train.data import DataError


def predict(engine: DeepSpeedEngine, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, float32 [n, classes], and targets, int64 [n], on the engine's device.

    inputs: of any device; cast to `dtype` unless they are integers. targets: int64 [batch] for a model that returns
    logits [batch, classes], or [batch, length] for [batch, length, classes]; n = batch or batch x length.

    Raises:
        DataError: a target that is no class of the model. On a GPU the loss would end the process without a word of why.
    """
    # From pinned memory, which the loader has for a GPU: the host goes on, and what it copies from stays until that is done.
    inputs = inputs.to(engine.device, dtype if inputs.is_floating_point() else None, non_blocking=True)
    expected = targets.to(engine.device, non_blocking=True)
    logits = engine(inputs)
    largest, classes = int(targets.max()), logits.shape[-1]
    if largest >= classes:
        raise DataError(
            f"a sample has label {largest}, and the model has {classes} classes (0 to {classes - 1}); "
            "check the labels in the shards, or the model's number of classes"
        )
    return logits.float().flatten(0, -2), expected.flatten()
