"""A micro-batch through the model, with one row for each thing that is predicted: an image or each token of a sequence."""

from __future__ import annotations

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor


def predict(engine: DeepSpeedEngine, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, float32 [n, classes], and targets, int64 [n], on the engine's device.

    inputs: of any device; cast to `dtype` unless they are integers. targets: int64 [batch] for a model that returns
    logits [batch, classes], or [batch, length] for [batch, length, classes]; n = batch or batch x length.
    """
    inputs = inputs.to(engine.device, dtype if inputs.is_floating_point() else None)
    logits = engine(inputs)
    return logits.float().flatten(0, -2), targets.to(engine.device).flatten()
