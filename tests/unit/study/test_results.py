"""result.json: written whole, and refused when it is of another job."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from dst_train.job import JobError, dump
from dst_train.study import results
from dst_train.study.grid import Grid, build
from tests.unit.study.conftest import result


def test_a_result_reads_back(grid: Grid) -> None:
    run = grid.runs[0]
    run.directory.mkdir(parents=True)
    written = result(run, git=None, evaluation={"loss": math.inf, "accuracy": 0.1})
    results.write(run.directory, written)
    assert results.read_all(grid.runs) == {run.name: written}
    assert [path.name for path in run.directory.iterdir()] == ["result.json"]


def test_the_revision_tells_uncommitted_changes(grid: Grid) -> None:
    run = grid.runs[0]
    assert result(run).revision == "0123456789ab"
    assert result(run, git={"revision": "0123456789abcdef", "dirty": True}).revision == "0123456789ab+changes"
    assert result(run, git=None).revision == "unknown"


def test_a_result_of_another_job_is_refused_with_what_differs(grid: Grid) -> None:
    for run, job, ranks in (
        (grid.runs[0], grid.runs[0].job.model_copy(update={"run_root": "moved"}), 1),
        (grid.runs[1], grid.runs[1].job.model_copy(update={"seed": 9, "name": "other"}), 2),
        (grid.runs[2], grid.runs[2].job, 1),
    ):
        run.directory.mkdir(parents=True)
        (run.directory / "job.yaml").write_text(dump(job))
        results.write(run.directory, result(grid.runs[0] if job.seed == 0 else run, ranks=ranks))
    results.write(grid.runs[1].directory, result(grid.runs[1], job_digest="0", ranks=2))
    (grid.runs[2].directory / "job.yaml").unlink()
    with pytest.raises(JobError) as caught:
        results.read_all(grid.runs)
    fix = "remove the folder to run it again, change the study back, or give it another name"
    assert str(caught.value).splitlines() == [
        f"{grid.runs[1].directory}: is the result of another job than the study's (ranks: 2 -> 1; seed: 9 -> 0); {fix}",
        f"{grid.runs[2].directory}: is the result of another job than the study's (job.yaml is gone); {fix}",
    ]


def test_a_file_that_is_no_result(grid: Grid) -> None:
    run = grid.runs[0]
    run.directory.mkdir(parents=True)
    (run.directory / "result.json").write_text("{")
    with pytest.raises(JobError, match=r"80-dense-seed0/result\.json: is no result of a run"):
        results.read_all(grid.runs)


def test_a_run_is_found_under_the_name_that_it_had_before_there_was_another_column(write: Callable[..., Path]) -> None:
    before = build(write(('    "80": [sparsity.rules.0.sparsity=0.8]\n', "")))
    run = before.runs[0]
    assert run.name == "90-dense-seed0"
    run.directory.mkdir(parents=True)
    results.write(run.directory, result(run))
    after = build(write())
    assert results.read_all(after.runs) == {"80-dense-seed0": result(run)}


def test_a_run_does_not_go_on_from_the_checkpoint_of_another_job(grid: Grid) -> None:
    for run, change, ranks in zip(grid.runs, ({}, {"seed": 9}, {}, {"run_root": "moved"}), (2, 1, 1, 1), strict=False):
        folder = run.directory / "checkpoints/step-00000003"
        folder.mkdir(parents=True)
        job = run.job.model_copy(update=change).model_dump(mode="json")
        (folder / "manifest.json").write_text(json.dumps({"job": job, "world_size": ranks}))
    for step, text in enumerate(("", "[]", "{}")):  # damaged
        damaged = grid.runs[2].directory / f"checkpoints/step-{step:08}/manifest.json"
        damaged.parent.mkdir()
        damaged.write_text(text)
    with pytest.raises(JobError) as caught:
        results.check_unfinished(grid.runs)
    first, second = grid.runs[:2]
    assert [line.partition("; remove the folder")[0] for line in str(caught.value).splitlines()] == [
        f"{first.directory}/checkpoints/step-00000003: is a checkpoint of another job than the study's (ranks: 2 -> 1)",
        f"{second.directory}/checkpoints/step-00000003: is a checkpoint of another job than the study's (seed: 9 -> 0)",
    ]
