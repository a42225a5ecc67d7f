"""Table, csv and plot against numbers that were computed by hand."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from dst_train.study import report
from dst_train.study.grid import Grid, build
from dst_train.study.results import Result
from tests.unit.study.conftest import result


def _results(grid: Grid, accuracies: dict[str, list[float]], **changes: object) -> dict[str, Result]:
    """By `point`, the accuracies of its first seeds."""
    found = {}
    for point, values in accuracies.items():
        for run, value in zip(grid.at(tuple(point.split())), values, strict=False):
            found[run.name] = result(run, value, **changes)
    return found


def test_mean_and_sample_standard_deviation(grid: Grid) -> None:
    found = _results(grid, {"80 rigl": [0.90, 0.92, 0.97], "90 rigl": [0.9, 0.8], "80 dense": [0.5]})
    three = report.cell(grid, found, ("80", "rigl"), "accuracy")
    assert three is not None
    assert (three.mean, three.count, three.planned) == (pytest.approx(93.0), 3, 3)
    assert three.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))  # of deviations -3, -1, 4
    two = report.cell(grid, found, ("90", "rigl"), "accuracy")
    assert two is not None
    assert (two.mean, two.std, two.count, two.planned) == (pytest.approx(85.0), pytest.approx(math.sqrt(50)), 2, 3)
    assert report.cell(grid, found, ("90", "dense"), "accuracy") == report.Cell(50.0, None, 1, 3)
    assert report.cell(grid, {}, ("90", "dense"), "accuracy") is None


def test_the_table(grid: Grid) -> None:
    found = _results(
        grid, {"80 dense": [0.9, 0.9, 0.9], "80 rigl": [0.90, 0.92, 0.97], "90 rigl": [0.8]}, machine="b", threads=2
    )
    found["90-rigl-seed0"] = result(grid.at(("90", "rigl"))[0], 0.8, git=None)
    assert report.table(grid, found).splitlines()[:12] == [
        "# small",
        "",
        "Mean ± sample standard deviation (number of runs); seeds 0, 1, 2.",
        "7 of 9 runs, 0:01:10 of run time in total.",
        "Code 0123456789ab, unknown; a machine, b, threads of a rank: 1, 2; torch 2.0.",
        "",
        "Accuracy in %:",
        "",
        "| method | sparsity 80 | sparsity 90 |",
        "|---|---|---|",
        "| dense | 90.00 ± 0.00 (3) | 90.00 ± 0.00 (3) |",
        "| rigl | **93.00 ± 3.61** (3) | 80.00 (1 of 3) |",
    ]
    assert report.table(grid, found).splitlines()[12:15] == ["", "Loss:", ""]


def test_nothing_is_best_while_a_run_is_missing_and_gaps_are_told(grid: Grid) -> None:
    lines = report.table(grid, _results(grid, {"80 rigl": [0.9, 0.9, 0.9]})).splitlines()
    assert lines[10:12] == ["| dense | missing | missing |", "| rigl | 90.00 ± 0.00 (3) | missing |"]
    assert "0 of 9 runs" in report.table(grid, {})


def test_the_least_loss_is_the_best(write: Callable[..., Path]) -> None:
    grid = build(write(("metric: accuracy", "metric: loss")))
    found = _results(grid, {"80 dense": [0.5] * 3, "80 rigl": [0.75] * 3, "90 rigl": [0.25] * 3})
    assert report.table(grid, found).splitlines()[10:12] == [
        "| dense | 0.5000 ± 0.0000 (3) | **0.5000 ± 0.0000** (3) |",
        "| rigl | **0.2500 ± 0.0000** (3) | 0.7500 ± 0.0000 (3) |",
    ]


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_no_best_and_hides_none(write: Callable[..., Path], loss: float) -> None:
    grid = build(write(("metric: accuracy", "metric: loss")))
    found = _results(grid, {"80 dense": [0.5] * 3, "80 rigl": [0.75] * 3, "90 rigl": [0.75] * 3})
    lost = {"loss": loss, "accuracy": 0.0}
    found["90-rigl-seed0"] = result(grid.at(("90", "rigl"))[0], evaluation=lost)
    assert report.table(grid, found).splitlines()[10:12] == [
        "| dense | 0.5000 ± 0.0000 (3) | **0.5000 ± 0.0000** (3) |",
        f"| rigl | **0.2500 ± 0.0000** (3) | {loss} ± nan (3) |",
    ]
    found = {run.name: result(run, evaluation=lost) for run in grid.runs}
    assert "**" not in report.table(grid, found).split("Accuracy")[0]


def test_the_files(grid: Grid) -> None:
    grid.folder.mkdir(parents=True)
    found = _results(grid, {"80 dense": [0.5], "80 rigl": [0.9, 0.8]})
    report.write(grid, found)
    assert sorted(path.name for path in grid.folder.iterdir()) == sorted(report.FILES)
    rows = list(csv.DictReader((grid.folder / "results.csv").read_text().splitlines()))
    assert [(row["run"], row["sparsity"], row["method"], row["seed"]) for row in rows] == [
        ("80-dense-seed0", "80|90", "dense", "0"),
        ("80-rigl-seed0", "80", "rigl", "0"),
        ("80-rigl-seed1", "80", "rigl", "1"),
    ]
    assert rows[1] == {
        "run": "80-rigl-seed0", "sparsity": "80", "method": "rigl", "accuracy": "0.9", "loss": str(1.0 - 0.9), "seed": "0",
        "ranks": "1", "steps": "5", "seconds": "10.0", "threads": "1", "revision": "0123456789ab", "machine": "a machine",
        "torch": "2.0", "job_digest": found["80-rigl-seed0"].job_digest,
    }  # fmt: skip
    assert (grid.folder / "table.md").read_text() == report.table(grid, found)
    assert (grid.folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_differences_are_taken_seed_by_seed(write: Callable[..., Path]) -> None:
    grid = build(write(("columns:", "against: dense\ncolumns:")))
    found = _results(grid, {"80 dense": [0.90, 0.80, 0.70], "80 rigl": [0.91, 0.82, 0.73], "90 rigl": [0.89, 0.80]})
    lines = report.table(grid, found).splitlines()
    start = lines.index("Accuracy in %, difference from dense, mean ± standard error (number of seeds):")
    assert lines[start + 2 : start + 6] == [
        "| method | sparsity 80 | sparsity 90 | all |",
        "|---|---|---|---|",
        # of 1, 2, 3, of -1, 0, and of (1 - 1) / 2, (2 + 0) / 2: the third seed has one column only
        "| rigl | +2.00 ± 0.58 (3) | -0.50 ± 0.50 (2) | +0.50 ± 0.50 (2) |",
        "",
    ]
    assert "| rigl | missing | missing | missing |" in report.table(grid, {})
    found = _results(grid, {"80 dense": [0.90, 0.80], "80 rigl": [0.91, 0.82]})
    assert "| rigl | +1.50 ± 0.50 (2) | missing | missing |" in report.table(grid, found)
