"""What a study says: results.csv, table.md and plot.png, from the results that are there."""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dst_train.files import atomic_file
from dst_train.study.grid import Grid, Point
from dst_train.study.results import Result
from dst_train.study.schema import LEADING_COLUMNS, METRICS, TRAILING_COLUMNS

FILES = ("results.csv", "table.md", "plot.png")
# As many as needed to tell lines apart that have one of the ten colours.
MARKERS = "osD^v"
SCALES = {"accuracy": 100.0, "loss": 1.0}
DIGITS = {"accuracy": 2, "loss": 4}
UNITS = {"accuracy": "Accuracy in %", "loss": "Loss"}


@dataclass(frozen=True)
class Cell:
    """mean, std: of `count` runs out of `planned`; std is the sample standard deviation, None of a single run."""

    mean: float
    std: float | None
    count: int
    planned: int


def write(grid: Grid, results: Mapping[str, Result]) -> None:
    """Rewrites the three files in the folder of the study, each whole or not at all."""
    for name, content in (
        ("results.csv", _csv(grid, results).encode()),
        ("table.md", table(grid, results).encode()),
        ("plot.png", _plot(grid, results)),
    ):
        with atomic_file(grid.folder / name) as file:  # `--table` may look on while a study runs
            file.write(content)


def cell(grid: Grid, results: Mapping[str, Result], point: Point, metric: str) -> Cell | None:
    """The metric at a point of the grid, accuracy in percent; None when no run of it is finished."""
    runs = grid.at(point)
    values = [SCALES[metric] * results[run.name].evaluation[metric] for run in runs if run.name in results]
    if not values:
        return None
    with np.errstate(invalid="ignore"):  # the loss of a run may be infinite
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return Cell(float(np.mean(values)), std, len(values), len(runs))


def table(grid: Grid, results: Mapping[str, Result]) -> str:
    """Markdown, a table for each metric. The best mean of a column is bold once all runs of the column are finished."""
    metrics = sorted(METRICS, key=lambda metric: metric != grid.study.metric)
    parts = [_header(grid, results), *(_table(grid, results, metric) for metric in metrics)]
    if grid.study.against is not None:
        parts += [_differences(grid, results, metric) for metric in metrics]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _table(grid: Grid, results: Mapping[str, Result], metric: str) -> list[str]:
    study = grid.study
    labels = [axis for axis in study.axes if axis != study.columns]
    columns = list(study.axes[study.columns])
    head = [*labels, *(f"{study.columns} {column}" for column in columns)]
    lines = [f"{UNITS[metric]}:", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    best = {column: _best(grid, results, column, metric) for column in columns}
    for row in grid.study.rows():
        found = [(column, cell(grid, results, _point(grid, row, column), metric)) for column in columns]
        lines.append(f"| {' | '.join([*row, *(_text(c, best[column], metric) for column, c in found)])} |")
    return lines


def _differences(grid: Grid, results: Mapping[str, Result], metric: str) -> list[str]:
    """Of each row from the row `against`, seed by seed: what seeds have in common, such as the order of samples, drops out.

    In the column `all`, of the mean of each seed over the columns: columns of one seed are not independent.
    """
    study, columns = grid.study, list(grid.study.axes[grid.study.columns])
    labels = [axis for axis in study.axes if axis != study.columns]
    head = [*labels, *(f"{study.columns} {column}" for column in columns), "all"]
    title = f"{UNITS[metric]}, difference from {study.against}, mean ± standard error (number of seeds):"
    lines = [title, "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    base = next(row for row in study.rows() if "-".join(row) == study.against)
    for row in study.rows():
        if row == base:
            continue
        found = [_paired(grid, results, _point(grid, row, c), _point(grid, base, c), metric) for c in columns]
        whole = [seed for seed in study.seeds if all(seed in values for values in found)]
        means = [sum(values[seed] for values in found) / len(columns) for seed in whole]
        cells = [_difference(values, metric) for values in [*(list(values.values()) for values in found), means]]
        lines.append(f"| {' | '.join([*row, *cells])} |")
    return lines


def _paired(grid: Grid, results: Mapping[str, Result], one: Point, other: Point, metric: str) -> dict[int, float]:
    """Differences of the metric, by seed, for those of which both runs are finished."""
    pairs = [(results.get(a.name), results.get(b.name)) for a, b in zip(grid.at(one), grid.at(other), strict=True)]
    return {
        seed: SCALES[metric] * (a.evaluation[metric] - b.evaluation[metric])
        for seed, (a, b) in zip(grid.study.seeds, pairs, strict=True)
        if a and b
    }


def _difference(values: list[float], metric: str) -> str:
    if not values:
        return "missing"
    digits = DIGITS[metric]
    with np.errstate(invalid="ignore"):  # losses may be infinite
        error = f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):+.{digits}f}{error} ({len(values)})"


def _header(grid: Grid, results: Mapping[str, Result]) -> list[str]:
    study, found = grid.study, list(results.values())
    spent = datetime.timedelta(seconds=round(sum(result.seconds for result in found)))
    lines = [
        f"# {study.name}",
        "",
        f"Mean ± sample standard deviation (number of runs); seeds {', '.join(map(str, study.seeds))}.",
        f"{len(found)} of {len(grid.runs)} runs, {spent} of run time in total.",
    ]
    if found:
        threads = _distinct(str(result.threads) for result in found)
        revisions = _distinct(result.revision for result in found)
        lines.append(
            f"Code {revisions}; {_distinct(result.machine for result in found)}, threads of a rank: {threads}; "
            f"torch {_distinct(result.torch for result in found)}."
        )
    return lines


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _point(grid: Grid, row: Point, column: str) -> Point:
    index = list(grid.study.axes).index(grid.study.columns)
    return (*row[:index], column, *row[index:])


def _best(grid: Grid, results: Mapping[str, Result], column: str, metric: str) -> float | None:
    cells = [cell(grid, results, _point(grid, row, column), metric) for row in grid.study.rows()]
    means = [c.mean for c in cells if c is not None and c.count == c.planned]
    finite = [mean for mean in means if math.isfinite(mean)]
    if len(means) < len(cells) or len(cells) < 2 or not finite:
        return None
    return max(finite) if metric == "accuracy" else min(finite)


def _text(found: Cell | None, best: float | None, metric: str) -> str:
    if found is None:
        return "missing"
    digits = DIGITS[metric]
    text = f"{found.mean:.{digits}f}"
    if found.std is not None:
        text += f" ± {found.std:.{digits}f}"
    if found.mean == best:
        text = f"**{text}**"
    return f"{text} ({found.count})" if found.count == found.planned else f"{text} ({found.count} of {found.planned})"


def _csv(grid: Grid, results: Mapping[str, Result]) -> str:
    """A row for each finished run; evaluation as it was measured, accuracy from 0 to 1."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*LEADING_COLUMNS, *grid.study.axes, *METRICS, *TRAILING_COLUMNS])
    for run in grid.runs:
        if run.name in results:
            result = results[run.name]
            # A run that several points share is a single row: these are not independent measurements.
            labels = ["|".join(dict.fromkeys(values)) for values in zip(*run.points, strict=True)]
            measured = [result.evaluation[metric] for metric in METRICS]
            made = (result.revision, result.machine, result.torch, result.job_digest)
            counts = (run.job.seed, run.ranks, result.steps, result.seconds, result.threads)
            writer.writerow([run.name, *labels, *measured, *counts, *made])
    return file.getvalue()


def _plot(grid: Grid, results: Mapping[str, Result]) -> bytes:
    """Mean and standard deviation over the columns, a line for each row, side by side so that no bar hides another."""
    from matplotlib.figure import Figure  # an optional dependency, and slow to import

    study = grid.study
    columns, rows = list(study.axes[study.columns]), grid.study.rows()
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        shift = 0.5 * ((i + 0.5) / len(rows) - 0.5)
        found = [(x, cell(grid, results, _point(grid, row, column), study.metric)) for x, column in enumerate(columns)]
        drawn = [(x + shift, c.mean, c.std or 0.0) for x, c in found if c is not None]
        if drawn:
            x, mean, std = zip(*drawn, strict=True)
            axes.errorbar(
                x,
                mean,
                yerr=std,
                marker=MARKERS[(i + i // 10) % len(MARKERS)],
                markersize=5,
                capsize=2,
                linewidth=1,
                label=", ".join(row),
            )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_xlabel(study.columns)
    axes.set_ylabel(UNITS[study.metric])
    axes.set_title(f"{study.name}, {len(results)} of {len(grid.runs)} runs, mean ± standard deviation", fontsize=10)
    axes.grid(alpha=0.3)
    if results and any(rows):
        figure.legend(loc="outside right upper", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
