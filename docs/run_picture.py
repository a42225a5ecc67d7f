"""Draws docs/run.png from a run directory: `python docs/run_picture.py runs/vit_digits blocks.2.mlp.fc1`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dst_train.monitor import RunDirectory
from dst_train.monitor.monitor import PICTURE_ROWS, picture
from dst_train.sparse import sparse_layers, sparsify


def main(run: Path, layer: str) -> None:
    from dst_train import models
    from dst_train.job import load

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    job = load(run / "job.yaml")
    model = models.build(job.model, seed=job.seed)
    sparsify(model, job.sparsity.rules, budget=job.sparsity.budget, seed=job.seed)  # type: ignore[union-attr]
    units = sparse_layers(model)[layer].num_units
    history = RunDirectory(run).active_units(PICTURE_ROWS)[layer]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1, 1.3), layout="constrained")
    for tag, label in (("train/loss", "training loss"), ("eval/loss", "evaluation loss")):
        points = events.Scalars(tag)
        left.plot(
            [p.step for p in points], [p.value for p in points], label=label, marker="." if "eval" in tag else None
        )
    accuracy = left.twinx()
    points = events.Scalars("eval/accuracy")
    accuracy.plot([p.step for p in points], [100 * p.value for p in points], "g.-", label="evaluation accuracy")
    accuracy.set_ylabel("%")
    left.set(xlabel="step", ylabel="cross-entropy", title=job.name)
    lines = [*left.get_lines(), *accuracy.get_lines()]
    left.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
    right.imshow(picture(history, units), aspect="auto", cmap="Greys", interpolation="nearest")
    right.set(xlabel="candidate diagonal", ylabel="topology update", title=f"active diagonals of {layer}")
    figure.savefig(Path(__file__).parent / "run.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
