"""What `dst-train report` prints: where runs are and what they reached, from what they wrote for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dst_train.job import BatchPlan, JobError, load

# Of each layer, what TensorBoard has under topology/: as the last update left it.
OF_LAYERS = {
    "sparsity_actual": ".4f",
    "sparsity_target": ".4f",
    "churn": ".2%",
    "mean_age": ".0f",
    "explored": ".2%",
    "uncovered": ".0f",
}


def report(runs: Sequence[Path]) -> str:
    """A line for each run; of a single one, its sparse layers as well. What is wrong with some of the folders comes last.

    Raises:
        JobError: none of the folders is a run that has something for TensorBoard, and a job of this version.
    """
    found, lines, problems = {}, [], []
    for run in runs:
        try:
            found[run] = Scalars(run)
            lines.append(_line(run, found[run]))
        except JobError as error:
            problems.append(str(error))
    if not lines:
        raise JobError("\n".join(problems))
    head = ["run", "step", "eval/loss", "eval/accuracy", "best accuracy", "sparsity", "samples/s", "checkpoint"]
    parts = [_table([head, *lines])]
    one = next(iter(found.values()))
    layers = one.names("topology/sparsity_actual/") if len(runs) == 1 else []
    if layers:
        step, churn = one.series("topology/churn")[-1]
        parts.append(f"after the topology update of step {step}, which changed {churn:.2%} of the active units:")
        parts.append(_table([["layer", *OF_LAYERS], *(_layer(layer, one) for layer in layers)]))
    return "\n\n".join([*parts, *(["\n".join(problems)] if problems else [])])


class Scalars:
    """The scalars that a run has written so far; what an interrupted attempt wrote beyond its checkpoint is not among them."""

    def __init__(self, run: Path) -> None:
        folder = run / "tensorboard"
        if not (run / "job.yaml").is_file():
            raise JobError(f"{run}: no run, as it has no job.yaml; name a run directory, such as runs/vit_digits")
        if not folder.is_dir():
            raise JobError(f"{folder}: is not there, as nothing was logged yet or monitor.tensorboard is false")
        self._events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "histograms": 1})
        self._events.Reload()
        self._tags = self._events.Tags()["scalars"]

    def names(self, prefix: str) -> list[str]:
        return [tag.removeprefix(prefix) for tag in self._tags if tag.startswith(prefix)]

    def series(self, tag: str) -> list[tuple[int, float]]:
        """Steps and values; empty when there are none of this tag."""
        return [(event.step, event.value) for event in self._events.Scalars(tag)] if tag in self._tags else []

    def last(self, tag: str) -> float | None:
        return next((value for _, value in reversed(self.series(tag))), None)


def _line(run: Path, scalars: Scalars) -> list[str]:
    total = BatchPlan.of(load(run / "job.yaml"), 1).total_steps
    step = max((step for step, _ in scalars.series("train/accuracy")), default=0)
    best = max(scalars.series("eval/accuracy"), key=lambda entry: entry[1], default=None)
    latest = run / "checkpoints" / "latest"
    return [
        str(run),
        f"{step} of {total}",
        _text(scalars.last("eval/loss"), ".4f"),
        _text(scalars.last("eval/accuracy"), ".2%"),
        "-" if best is None else f"{best[1]:.2%} (step {best[0]})",
        _text(scalars.last("topology/sparsity"), ".4f"),
        _text(scalars.last("train/samples_per_second"), ".1f"),
        latest.read_text(encoding="utf-8") if latest.is_file() else "-",
    ]


def _layer(layer: str, scalars: Scalars) -> list[str]:
    return [layer, *(_text(scalars.last(f"topology/{key}/{layer}"), form) for key, form in OF_LAYERS.items())]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)
