"""The training loop. Step order: forward and backward per micro-batch (growth signal inside), clip, optimiser, topology."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dst_train import data
from dst_train.data import Batch, EvalBatch
from dst_train.engine.evaluate import evaluate
from dst_train.engine.optim import learning_rate, set_learning_rate
from dst_train.engine.predict import predict
from dst_train.engine.session import Session
from dst_train.engine.watchdog import Watchdog
from dst_train.job import BatchPlan, Job
from dst_train.monitor import Monitor
from dst_train.sparse import LowRank


class NonFiniteError(RuntimeError):
    """Loss or gradients are not finite and the job's policy does not allow (more) skipped steps."""


class Trainer:
    """Runs the steps of a job on this rank.

    Args:
        watchdog: told what begins; resting when `fit` returns.
        save: called with the step after which a checkpoint is due. Collective.
        stop_requested: whether this rank was asked to stop (a signal); the ranks agree at the step boundary.
    """

    def __init__(
        self,
        job: Job,
        plan: BatchPlan,
        session: Session,
        monitor: Monitor,
        watchdog: Watchdog,
        *,
        save: Callable[[int], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self._job = job
        self._plan = plan
        self._session = session
        self._engine = session.engine
        self._monitor = monitor
        self._watchdog = watchdog
        self._save = save
        self._stop_requested = stop_requested
        self._low_rank = [m for m in session.engine.module.modules() if isinstance(m, LowRank)]
        self.step = 0
        self.bad_samples = 0
        self._skipped_in_a_row = 0
        self.skipped = 0
        self.last_evaluation: dict[str, float] = {}
        self._evaluated_at = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "bad_samples": self.bad_samples,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "last_evaluation": self.last_evaluation,
            "evaluated_at": self._evaluated_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.bad_samples = state["step"], state["bad_samples"]
        self.skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.last_evaluation, self._evaluated_at = state["last_evaluation"], state["evaluated_at"]

    def forget_evaluation(self) -> None:
        """It was on other data than the job now names."""
        self.last_evaluation, self._evaluated_at = {}, 0

    @property
    def finished(self) -> bool:
        """All steps are done, and so is the evaluation that belongs to the last one."""
        return self.step == self._plan.total_steps and not self._evaluation_is_due()

    def fit(self, stop_at: int) -> bool:
        """Train up to optimiser step `stop_at`; returns False when a stop was requested before.

        Every step that ends here for good, by `stop_at` or by request, leaves a checkpoint. A request is heeded within an
        evaluation, too, as whoever asks may not wait for its end: it is done anew when the run continues.
        """
        job, every_steps = self._job, self._job.checkpoint.every_steps
        stopped = not self._evaluate_if_due()
        batches = data.train_loader(job, self._plan, rank=dist.get_rank(), start_step=self.step)
        window_started, window_steps = time.perf_counter(), 0
        while self.step < stop_at and not stopped:
            self._watchdog.begin(f"step {self.step + 1}")
            metrics, stopped = self._optimizer_step(batches)
            window_steps += 1
            if self.step % job.monitor.every_steps == 0 or self.step == stop_at or stopped:
                seconds = (time.perf_counter() - window_started) / window_steps
                self._log(metrics, seconds)
                window_started, window_steps = time.perf_counter(), 0
            paused = time.perf_counter()
            stopped = stopped or not self._evaluate_if_due()
            if self.step % every_steps == 0 or self.step == stop_at or stopped:
                self._watchdog.begin(f"the checkpoint of step {self.step}")
                self._save(self.step)
            window_started += time.perf_counter() - paused
        self._watchdog.rest()
        return not stopped

    def _evaluation_is_due(self) -> bool:
        eval_steps = self._job.evaluate.every_epochs * self._plan.steps_per_epoch
        here = self.step % eval_steps == 0 or self.step == self._plan.total_steps
        return here and self._evaluated_at != self.step and self._job.data.eval is not None

    def _evaluate_if_due(self) -> bool:
        """Loss and accuracy on data.eval; False when a stop was requested meanwhile. Collective."""
        if self._evaluation_is_due():
            self._watchdog.rest()  # remote shards may be copied first
            batches = self._watched(data.eval_loader(self._job, self._plan, rank=dist.get_rank()))
            found = evaluate(self._engine, batches, self._session.input_dtype, self._stop_requested)
            self._watchdog.rest()
            if found is None:
                return False
            self.last_evaluation, self._evaluated_at = found, self.step
            self._monitor.evaluation(self.step, scalars={f"eval/{k}": v for k, v in found.items()})
        return True

    def _watched(self, batches: Iterator[EvalBatch]) -> Iterator[EvalBatch]:
        self._watchdog.begin(f"the first batch of the evaluation after step {self.step}")
        for number, batch in enumerate(batches, start=1):
            yield batch
            self._watchdog.begin(f"what follows batch {number} of the evaluation after step {self.step}")

    def _optimizer_step(self, batches: Iterator[Batch]) -> tuple[dict[str, float], bool]:
        """One optimiser step over all micro-batches; returns the metrics over all ranks and whether any rank must stop."""
        engine = self._engine
        rate = learning_rate(self._job, self._plan, self.step + 1)
        set_learning_rate(engine.optimizer.param_groups, rate)
        self._switch_low_rank()
        totals = torch.zeros(4, dtype=torch.float64, device=engine.device)  # loss, correct, targets, replaced samples
        for micro in range(self._plan.accumulation):
            batch = next(batches)
            logits, targets = predict(engine, batch.inputs, batch.targets, self._session.input_dtype)
            loss = F.cross_entropy(logits, targets, label_smoothing=self._job.train.label_smoothing)
            totals[0] += loss.detach() * len(targets)
            totals[1] += (logits.detach().argmax(1) == targets).sum()
            totals[2] += len(targets)
            totals[3] += batch.replaced
            engine.backward(loss)
            if micro == self._plan.accumulation - 1:
                metrics, stop = self._reduce(totals, rate)
                if engine.zero_optimization_stage() == 0:
                    self._refuse_non_finite(metrics["train/loss"])
            engine.step()
        self.step += 1
        applied = engine.was_step_applied()
        self._count_skipped(applied, metrics["train/loss"])
        metrics["train/grad_norm"] = _as_float(engine.get_global_grad_norm())
        update = self._session.topology.step(applied)
        if update is not None:
            self._monitor.topology(update, self._session.report)
        return metrics, stop

    def _switch_low_rank(self) -> None:
        """Before `sparsity.low_rank.start` the path is not computed; a pure function of the step, as the learning rate."""
        sparsity = self._job.sparsity
        if sparsity is None or sparsity.low_rank is None:
            return
        for module in self._low_rank:
            module.active = self.step >= sparsity.low_rank.start * self._plan.total_steps

    def _reduce(self, totals: torch.Tensor, rate: float) -> tuple[dict[str, float], bool]:
        """One small all-reduce a step carries metrics and flags; DeepSpeed's overflow check waits for the device anyway."""
        stop = torch.tensor([float(self._stop_requested())], dtype=torch.float64, device=totals.device)
        reduced = torch.cat([totals, stop])
        dist.all_reduce(reduced)
        loss, correct, count, replaced, stops = reduced.tolist()
        self.bad_samples += int(replaced)
        if self.bad_samples > self._job.data.max_bad_samples:
            raise data.DataError(
                f"{self.bad_samples} samples could not be decoded, data.max_bad_samples allows {self._job.data.max_bad_samples}"
            )
        metrics = {"train/loss": loss / count, "train/accuracy": correct / count, "train/lr": rate}
        if self.bad_samples:
            metrics["train/bad_samples"] = float(self.bad_samples)
        return metrics, stops > 0

    def _refuse_non_finite(self, loss: float) -> None:
        """Without ZeRO nothing stands between a bad gradient and the weights, which the next checkpoint would keep."""
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise NonFiniteError(f"step {self.step + 1}: the loss is {loss}, the norm of the gradients {norm}")

    def _count_skipped(self, applied: bool, loss: float) -> None:
        if applied and math.isfinite(loss):
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        allowed = self._job.train.max_skipped_steps
        what = f"step {self.step}: loss {loss}, {'applied' if applied else 'skipped because of a non-finite gradient'}"
        if applied or self._skipped_in_a_row > allowed:
            raise NonFiniteError(f"{what}; {self._skipped_in_a_row} in a row, train.max_skipped_steps allows {allowed}")
        self._monitor.message(f"{what} ({self._skipped_in_a_row} in a row of at most {allowed})")

    def _log(self, metrics: dict[str, float], seconds: float) -> None:
        speed = {"train/step_seconds": seconds, "train/samples_per_second": self._plan.batch_size / seconds}
        if self.skipped:
            speed["train/skipped_steps"] = float(self.skipped)
        finite = {k: v for k, v in {**metrics, **speed}.items() if not math.isnan(v)}
        self._monitor.step(self.step, scalars=finite)


def _as_float(value: Any) -> float:
    """The gradient norm before clipping; NaN where DeepSpeed does not compute one (stage 0)."""
    return math.nan if value is None else float(value)
