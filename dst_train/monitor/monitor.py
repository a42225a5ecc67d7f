"""TensorBoard, the progress line and the log of a run; rank 0 only."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dst_train.monitor.run_directory import LISTED_UNITS, RunDirectory
from dst_train.sparse import SparsityReport
from dst_train.topology import TopologyUpdate

PICTURE_ROWS = 256
# The largest share of a run's time that pictures and histograms may take: all ranks wait for rank 0.
DRAWING_SHARE = 0.01


class Monitor:
    """Every method may be called on all ranks and does nothing on ranks other than 0.

    Args:
        total_steps, start_step: of the whole job, and the step resumed from: what an interrupted run wrote after
            start_step is hidden in TensorBoard and removed from topology.jsonl, so that each step appears once.
        write: where lines for people go.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        rank: int,
        tensorboard: bool,
        total_steps: int,
        start_step: int,
        write: Callable[[str], None] | None = None,
    ) -> None:
        self._quiet = rank != 0
        self._writer: SummaryWriter | None = None
        if self._quiet:
            return
        self._run = run
        self._total_steps = total_steps
        self._write = write or _write_stdout
        run.truncate_topology(start_step)
        self._history = run.active_units(PICTURE_ROWS)
        self._started, self._drawing = time.perf_counter(), 0.0
        self._undrawn: TopologyUpdate | None = None
        self._log = run.log.open("a", encoding="utf-8")
        if tensorboard:
            self._writer = SummaryWriter(str(run.tensorboard), purge_step=start_step + 1)

    def step(self, step: int, *, scalars: dict[str, float]) -> None:
        """Scalars of an optimiser step, and the progress line from train/loss, accuracy, samples_per_second, step_seconds.

        train/loss may be left out when it is not a number, as in a skipped step.
        """
        if self._quiet:
            return
        self._scalars(step, scalars)
        loss = scalars.get("train/loss", math.nan)
        left = (self._total_steps - step) * scalars["train/step_seconds"]
        self._say(
            f"step {step}/{self._total_steps}  loss {loss:.4f}  accuracy {scalars['train/accuracy']:.2%}  "
            f"{scalars['train/samples_per_second']:.1f} samples/s  {_duration(left)} left"
        )

    def evaluation(self, step: int, *, scalars: dict[str, float]) -> None:
        """Scalars of an evaluation after `step`, and a line of them."""
        if not self._quiet:
            self._scalars(step, scalars)
            self._say(f"step {step}/{self._total_steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in scalars.items()))

    def topology(self, update: TopologyUpdate, report: SparsityReport) -> None:
        """Scalars of a topology update, and its lines in topology.jsonl; pictures of it as far as DRAWING_SHARE allows, and of the last one."""
        if self._quiet:
            return
        self._run.append_topology(update)
        targets = {layer.name: layer.target_sparsity for layer in report.layers}
        entries = {layer.name: layer.in_features * layer.out_features for layer in report.layers}
        present = sum(entries[layer.name] * len(layer.active) / layer.num_units for layer in update.layers)
        scalars = {
            "topology/churn": update.churn,
            "topology/drop_fraction": update.drop_fraction,
            "topology/update_seconds": update.seconds,
            "topology/sparsity": 1.0 - present / sum(entries[layer.name] for layer in update.layers),
        }
        for layer in update.layers:
            scalars[f"topology/churn/{layer.name}"] = layer.churn
            scalars[f"topology/dropped/{layer.name}"] = len(layer.dropped)
            scalars[f"topology/grown/{layer.name}"] = len(layer.grown)
            scalars[f"topology/sparsity_target/{layer.name}"] = targets[layer.name]
            scalars[f"topology/sparsity_actual/{layer.name}"] = 1.0 - len(layer.active) / layer.num_units
            scalars[f"topology/mean_age/{layer.name}"] = layer.mean_age
            scalars[f"topology/explored/{layer.name}"] = layer.explored
            for name in ("uncovered", "drop_margin", "grow_margin", "effective_units", "temperature", "moved"):
                value = getattr(layer, name)
                if value is not None:
                    scalars[f"topology/{name}/{layer.name}"] = value
            if layer.num_units <= LISTED_UNITS:
                rows = self._history.setdefault(layer.name, [])
                rows.append(layer.active)
                del rows[:-PICTURE_ROWS]
        self._undrawn = update
        if self._drawing <= DRAWING_SHARE * (time.perf_counter() - self._started):
            self._draw(update)
        self._scalars(update.step, scalars)

    def _draw(self, update: TopologyUpdate) -> None:
        """The active units over the updates, where a line of them is short enough to see, and the gates."""
        self._undrawn = None
        if self._writer is None:
            return
        begun = time.perf_counter()
        for layer in update.layers:
            if layer.gates is not None:
                self._writer.add_histogram(f"gates/{layer.name}", torch.tensor(layer.gates), update.step)
            if layer.num_units <= LISTED_UNITS:
                image = picture(self._history[layer.name], layer.num_units)
                self._writer.add_image(f"units/{layer.name}", image, update.step, dataformats="HW")
        self._drawing += time.perf_counter() - begun

    def message(self, text: str) -> None:
        """A line on the terminal and in log.txt."""
        if not self._quiet:
            self._say(text)

    def close(self) -> None:
        if not self._quiet:
            if self._undrawn is not None:
                self._draw(self._undrawn)
            self._log.close()
            if self._writer is not None:
                self._writer.close()

    def _scalars(self, step: int, scalars: dict[str, float]) -> None:
        if self._writer is not None:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, step)
            # A killed run must not lose what precedes its last checkpoint: the writer alone waits up to two minutes.
            self._writer.flush()

    def _say(self, text: str) -> None:
        self._write(text)
        self._log.write(text + "\n")
        self._log.flush()


def picture(rows: Iterable[tuple[int, ...]], num_units: int) -> Tensor:
    """float [updates, num_units]: 1 where a unit is active after an update, the newest at the bottom."""
    history = list(rows)
    image = torch.zeros(len(history), num_units)
    for i, active in enumerate(history):
        image[i, list(active)] = 1.0
    return image


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _write_stdout(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
