"""The file of a study and the runs that come of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dst_train.job import JobError, digest
from dst_train.study.grid import NEVER, Grid, build, fingerprint
from tests.unit.study.conftest import JOB

Write = Callable[..., Path]
STUDIES = Path(__file__).parents[3] / "jobs/studies"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("metric:", "metrics:", "study.yaml:5 metrics: unknown key; did you mean 'metric'? (allowed: name, run_root, job, set, seeds, metric, axes, columns, against, parallel)"),
        ("metric: accuracy", "metric: acuracy", "study.yaml:5 metric: 'acuracy' is unknown; did you mean 'accuracy'? (choose one of accuracy, loss)"),
        ("seeds: [0, 1, 2]\n", "", "study.yaml:1 seeds: this key is required"),
        ("[0, 1, 2]", "[0, 1, 1]", "study.yaml:1: seeds [0, 1, 1]: one stands twice"),
        ("[0, 1, 2]", "[0, 18446744073709551616]", "study.yaml:4 seeds.1: input should be less than 18446744073709551616"),
        ("run_root: ROOT", "run_root: ${DST_NONE}/a", "study.yaml:2 run_root: the environment variable DST_NONE is not set"),
        ("[0, 1, 2]", "[]", "study.yaml:4 seeds: list should have at least 1 item"),
        ("columns: sparsity", "columns: density", "study.yaml:1: columns is 'density', must be one of the axes sparsity, method"),
        ("columns: sparsity", "columns: sparsity\nagainst: set", "study.yaml:1: against is 'set', must be one of the rows dense, rigl"),
        ("  method:", "  seed:", "study.yaml:1: axes: seed is a column of results.csv already"),
        ("rigl: [topology", "ri-gl: [topology", "study.yaml:12 axes.method.ri-gl.[key]: string should match pattern"),
        ('"80":', "80:", "study.yaml:8 axes.sparsity: the key '80' is not text; put it in quotes"),
        ("name: small", "name: a/b", "study.yaml:1 name: string should match pattern"),
        ("name: small", "name: small\nname: b", "study.yaml:2 name: stands twice, first at study.yaml:1"),
        ("name: small", "extends: a.yaml\nname: small", "study.yaml:1 extends: unknown key"),
        ("jobs/base.yaml", "jobs/none.yaml", "study.yaml:3 job: jobs/none.yaml does not exist"),
        ("method=rigl", "method=rigel", "study.yaml:12 topology.method=rigel: topology.method: 'rigel' is unknown; did you mean 'rigl'?"),
        ("rules.0.sparsity=0.9", "rules.1.sparsity=0.9", "study.yaml:9 sparsity.rules.1.sparsity=0.9: sparsity.rules is a list of 1; '1' is not"),
        ("sparsity=null", "sparsity", "study.yaml:11 sparsity: expected KEY=VALUE"),
        ("sparsity=null", "seed=3", "study.yaml:11 seed=3: the study itself sets name, run_root, seed of each run"),
        ("sparsity=null", "ranks=0", "study.yaml:11 ranks=0: must be a number of ranks, at least 1"),
        ("sparsity=null", "data.eval=null", "study.yaml:5 metric: the job has no data.eval at 80-dense"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_with_its_place(write: Write, old: str, new: str, expected: str) -> None:
    path = write((old, new))
    with pytest.raises(JobError) as caught:
        build(path)
    lines = str(caught.value).replace(f"{path.parent}/", "").splitlines()
    assert any(line.startswith(expected) for line in lines), lines


@pytest.mark.parametrize("text", [JOB, "extends: base.yaml\nname: leaf\n"])
def test_a_job_is_told_from_a_study(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(JobError) as caught:
        build(path)
    assert str(caught.value) == f"{path}:1: this is a job: run it with deepspeed launch/train.py --job {path}"


def test_environment_variables_stand_in_run_root(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DST_TEST", "/data")
    grid = build(write(("ROOT", "${DST_TEST}/studies")))
    assert grid.folder == Path("/data/studies/small")
    assert grid.runs[0].job.run_root == "/data/studies/small"


def test_the_studies_of_this_repository() -> None:
    grids = {path.stem: build(path) for path in STUDIES.glob("*.yaml")}
    assert all(name == grid.study.name for name, grid in grids.items())
    methods = len(grids["digits_mlp"].study.axes["method"])
    assert len(grids["digits_mlp"].runs) == 5 * (4 * (methods - 2) + 2)  # dense is the same at each sparsity


def test_the_mistakes_of_the_job_are_told_as_those_of_the_job(write: Write) -> None:
    with pytest.raises(JobError, match=r"jobs/base.yaml:7 train.batchsize: unknown key; did you mean 'batch_size'?"):
        build(write(job=JOB.replace("batch_size: 4", "batchsize: 4")))


def test_equal_jobs_are_run_once_and_shown_at_each_of_their_points(grid: Grid) -> None:
    assert [(run.name, run.points) for run in grid.runs[:3]] == [
        ("80-dense-seed0", (("80", "dense"), ("90", "dense"))),
        ("80-rigl-seed0", (("80", "rigl"),)),
        ("90-rigl-seed0", (("90", "rigl"),)),
    ]
    assert len(grid.runs) == 9  # not 12
    assert [run.name for run in grid.at(("90", "dense"))] == ["80-dense-seed0", "80-dense-seed1", "80-dense-seed2"]
    assert [run.job.seed for run in grid.at(("90", "rigl"))] == [0, 1, 2]


def test_a_run_is_a_job_with_its_overrides_seed_and_folder(grid: Grid, tmp_path: Path) -> None:
    run = grid.at(("80", "rigl"))[1]
    assert run.job.sparsity is not None
    assert (run.job.sparsity.rules[0].sparsity, run.job.seed, run.ranks) == (0.8, 1, 1)
    assert run.directory == tmp_path / "studies/small/80-rigl-seed1"
    assert grid.at(("80", "dense"))[0].job.sparsity is None


def test_overrides_apply_in_the_order_of_the_axes(write: Write) -> None:
    last = ("rigl: [topology.method=rigl]", "rigl: [sparsity.rules.0.sparsity=0.7, sparsity.rules.0.sparsity=0.6]")
    grid = build(write(last))
    (run, *_) = grid.at(("80", "rigl"))
    assert run.job.sparsity is not None
    assert run.job.sparsity.rules[0].sparsity == 0.6
    assert run.points == (("80", "rigl"), ("90", "rigl"))


def test_overrides_of_every_run_come_first(write: Write) -> None:
    grid = build(write(("seeds:", "set: [optimizer.lr=0.25, topology.method=set]\nseeds:")))
    assert all(run.job.optimizer.lr == 0.25 for run in grid.runs)
    assert all(run.job.topology.method == "rigl" for run in grid.at(("80", "rigl")))
    with pytest.raises(JobError, match=r"study.yaml:4 seed=1: the study itself sets"):
        build(write(("seeds:", "set: [seed=1]\nseeds:")))


def test_ranks_are_part_of_what_a_run_is(write: Write) -> None:
    grid = build(write(("dense: [sparsity=null]", "two: [ranks=2]")))
    one, two = grid.at(("90", "rigl"))[0], grid.at(("90", "two"))[0]
    assert (one.ranks, two.ranks) == (1, 2)
    assert fingerprint(one.job) == fingerprint(two.job)


def test_nobody_watches_unless_the_job_says_so(write: Write, grid: Grid) -> None:
    job = grid.runs[0].job
    assert (job.monitor.tensorboard, job.checkpoint.every_steps) == (False, NEVER)
    watched = JOB + "monitor: {tensorboard: true}\ncheckpoint: {every_steps: 3}\n"
    job = build(write(job=watched)).runs[0].job
    assert (job.monitor.tensorboard, job.checkpoint.every_steps) == (True, 3)


def test_the_fingerprint_leaves_out_name_and_folder_only(grid: Grid) -> None:
    job = grid.runs[0].job
    moved = job.model_copy(update={"name": "other", "run_root": "elsewhere"})
    assert fingerprint(moved) == fingerprint(job)
    assert digest(moved) != digest(job)
    assert fingerprint(job.model_copy(update={"seed": 7})) != fingerprint(job)
