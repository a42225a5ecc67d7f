"""Evaluation that every rank walks in step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.engine import DeepSpeedEngine

from dst_train.data import EvalBatch
from dst_train.engine.predict import predict


@torch.no_grad()
def evaluate(
    engine: DeepSpeedEngine, batches: Iterable[EvalBatch], dtype: torch.dtype, stop_requested: Callable[[], bool]
) -> dict[str, float] | None:
    """Mean cross-entropy (nats) and top-1 accuracy (0 to 1) over the valid samples of all ranks, or over all tokens of
    the valid sequences. None if any rank was asked to stop before the last batch but one. Collective.

    Every rank must get the same number of batches, as ZeRO 3 gathers parameters in each forward pass; padding is
    marked in `valid` and does not count. dtype: of the inputs that the model expects, unless they are integers.
    """
    was_training = engine.module.training
    engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
    stop = torch.zeros((), device=engine.device)
    for batch in batches:
        if stop:  # as of the batch before, so that the device has work while the host waits for it
            engine.train(was_training)
            return None
        stop = torch.full((), float(stop_requested()), device=engine.device)
        dist.all_reduce(stop)
        logits, targets = predict(engine, batch.inputs, batch.targets, dtype)
        each = len(targets) // len(batch.valid)
        valid = batch.valid.to(engine.device, non_blocking=True).repeat_interleave(each)
        losses = F.cross_entropy(logits, targets, reduction="none")
        totals[0] += torch.where(valid, losses, 0.0).sum()  # a mask as an index would wait for the device
        totals[1] += ((logits.argmax(1) == targets) & valid).sum()
        totals[2] += each * int(batch.valid.sum())
    engine.train(was_training)
    dist.all_reduce(totals)
    loss, correct, count = totals.tolist()
    return {"loss": loss / count, "accuracy": correct / count}
