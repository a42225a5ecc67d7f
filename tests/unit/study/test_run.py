"""Running a study: order, resuming, failures, interruption; with workers that train nothing."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from dst_train.cli import main
from dst_train.job import JobError
from dst_train.study import command, report, run_study, workers
from dst_train.study.grid import Grid, Run, build
from tests.unit.study.conftest import Fake, result

Write = Callable[..., Path]
Make = Callable[[Grid], Fake]
ONE_SEED = ("[0, 1, 2]", "[0]")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_prepare", lambda pending: None)  # there is no data
    monkeypatch.setattr(report, "_plot", lambda grid, results: b"")  # see test_report.py


def _execute(runs: Sequence[Run], fake: Fake, parallel: int = 1) -> dict[str, str | None]:
    read, write = os.pipe()
    with closing(workers.execute(runs, parallel, [], lock=write, command=fake.command)) as over:
        ended = {run.name: error for run, error in over}
    os.close(write)
    os.close(read)
    return ended


def test_only_what_is_missing_is_run(write: Write, fake: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(ONE_SEED)
    grid = build(path)
    workers_ = fake(grid)
    assert run_study(path, command=workers_.command, out=tmp_path / "out") == 0
    assert workers_.started() == ["80-dense-seed0", "80-rigl-seed0", "90-rigl-seed0"]
    assert len({process for process, *_ in workers_.log()}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1/3] 80-dense-seed0  accuracy 0.00%  loss 1.0000  10 s  ")
    assert lines[2].endswith(" 0:00:00 left")
    assert f"outputs: {grid.folder}" in lines
    table = (grid.folder / "table.md").read_text()
    assert "3 of 3 runs" in table
    assert (tmp_path / "out/table.md").read_text() == table
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(report.FILES)

    shutil.rmtree(grid.runs[1].directory)
    assert run_study(path, command=workers_.command, only_table=True) == 0
    assert "2 of 3 runs" in (grid.folder / "table.md").read_text()
    assert len(workers_.log()) == 3
    assert run_study(path, command=workers_.command) == 0
    assert workers_.started()[3:] == ["80-rigl-seed0"]
    assert "[3/3] 80-rigl-seed0" in capsys.readouterr().out


def test_the_outputs_may_go_where_they_are(write: Write, fake: Make) -> None:
    path = write(ONE_SEED)
    grid = build(path)
    assert run_study(path, command=fake(grid).command, out=grid.folder / "../small") == 0
    assert "3 of 3 runs" in (grid.folder / "table.md").read_text()


def test_a_failed_run_does_not_stop_the_others(write: Write, fake: Make, capsys: pytest.CaptureFixture) -> None:
    path = write(ONE_SEED)
    grid = build(path)
    workers_ = fake(grid)
    workers_.make("80-dense-seed0", "crash")
    assert run_study(path, command=workers_.command) == 1
    said = capsys.readouterr()
    output = grid.runs[0].directory / "output-0.txt"
    assert said.err == f"failed: 80-dense-seed0: ValueError: too bad (exit code 1; see {output})\n"
    assert "[1/3] 80-dense-seed0  FAILED" in said.out
    assert "2 of 3 runs" in said.out
    assert len({process for process, *_ in workers_.log()}) == 2  # a failed worker takes no other run


def test_a_changed_job_is_refused_before_anything_runs(write: Write, fake: Make) -> None:
    path = write(ONE_SEED)
    workers_ = fake(build(path))
    assert run_study(path, command=workers_.command) == 0
    with pytest.raises(
        JobError, match=r"80-rigl-seed0: is the result of another job .*topology.method: 'rigl' -> 'set'"
    ):
        run_study(write(ONE_SEED, ("method=rigl", "method=set")), command=workers_.command)
    assert len(workers_.log()) == 3


def test_a_changed_job_does_not_go_on_from_a_checkpoint(write: Write, fake: Make) -> None:
    grid = build(write(ONE_SEED))
    folder = grid.runs[1].directory / "checkpoints/step-00000003"
    folder.mkdir(parents=True)
    job = grid.runs[1].job.model_dump(mode="json")
    (folder / "manifest.json").write_text(json.dumps({"job": job, "world_size": 1}))
    workers_ = fake(grid)
    with pytest.raises(
        JobError, match=r"80-rigl-seed0/checkpoints/step-00000003: is a checkpoint of another job .*'rigl' -> 'set'"
    ):
        run_study(write(ONE_SEED, ("method=rigl", "method=set")), command=workers_.command)
    assert workers_.log() == []
    assert run_study(write(ONE_SEED), command=workers_.command) == 0


@pytest.mark.parametrize("what", ["the study", "--out"])
def test_folders_that_cannot_be_made_are_named_before_anything_runs(
    write: Write, fake: Make, tmp_path: Path, what: str
) -> None:
    path = write(ONE_SEED)
    workers_ = fake(build(path))
    (tmp_path / ("studies" if what == "the study" else "out")).write_text("a file")
    out = tmp_path / "out" if what == "--out" else None
    with pytest.raises(JobError, match=f"{tmp_path}/\\w+.*: cannot be made: "):
        run_study(path, command=workers_.command, out=out)
    assert workers_.log() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupted_study_stops_its_workers(
    write: Write, fake: Make, number: int, capsys: pytest.CaptureFixture
) -> None:
    path = write(ONE_SEED)
    workers_ = fake(build(path))
    workers_.make("80-rigl-seed0", f"signal {int(number)}")
    before = signal.getsignal(number)
    assert run_study(path, command=workers_.command) == command.INTERRUPTED
    assert (workers_.folder / "stopped").exists()
    said = capsys.readouterr()
    assert said.err == "stopped; the same command continues\n"
    assert "1 of 3 runs" in said.out
    assert signal.getsignal(number) is before


def test_a_study_is_interrupted_before_anything_runs(
    write: Write, fake: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = write(ONE_SEED)
    workers_ = fake(build(path))

    def interrupted(pending: Sequence[Run]) -> None:
        raise KeyboardInterrupt  # by hand, as a shell may have this process ignore the signal

    monkeypatch.setattr(command, "_prepare", interrupted)
    assert run_study(path, command=workers_.command) == command.INTERRUPTED
    assert capsys.readouterr().err == "stopped; the same command continues\n"
    assert workers_.log() == []


def test_one_study_at_a_time_and_none_beside_a_worker_of_a_killed_one(write: Write, fake: Make) -> None:
    path = write(ONE_SEED)
    grid = build(path)
    grid.folder.mkdir(parents=True)
    with (grid.folder / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        group = workers.Group(1, 1, held.fileno(), fake(grid).command)
    try:
        with pytest.raises(
            JobError, match="this study is running already, or a run of one that was killed has yet to end"
        ):
            run_study(path)
    finally:
        workers.stop_groups([group], 10.0)


def test_the_plot_needs_matplotlib(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"pip install matplotlib"):
        run_study(write())


@pytest.mark.parametrize(
    ("override", "where"),
    [("ranks=3", "jobs/base.yaml:7"), ("train.micro_batch_size=3", "study.yaml:11 train.micro_batch_size=3:")],
)
def test_what_a_plan_refuses_is_refused_at_its_point(
    override: str, where: str, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.undo()
    study = write(("sparsity=null", override))
    assert main(["study", str(study)]) == 2
    assert capsys.readouterr().err.startswith(f"80-dense: {study.parent}/{where} train.")


def test_runs_at_a_time(grid: Grid, fake: Make) -> None:
    workers_ = fake(grid)
    assert _execute(grid.runs, workers_, parallel=3) == dict.fromkeys((run.name for run in grid.runs), None)
    assert len({process for process, *_ in workers_.log()}) <= 3
    threads = max(1, (os.cpu_count() or 1) // 3)
    assert {threads_ for *_, threads_ in workers_.log()} == {str(threads)}


def test_a_killed_worker_is_told_and_replaced(grid: Grid, fake: Make) -> None:
    workers_ = fake(grid)
    first, second, third = grid.runs[:3]
    workers_.make(first.name, "kill")
    first.directory.mkdir(parents=True)
    (first.directory / "output-0.txt").write_text("an error of the attempt before")
    workers_.make(second.name, result(second).model_dump_json() + "\n")  # dies after its run, before the next one
    ended = _execute(grid.runs[:4], workers_)
    assert ended[first.name] == f"no output (killed by SIGKILL; see {first.directory / 'output-0.txt'})"
    assert ended[second.name] is None
    assert ended[third.name] in (None, f"no output (exit code 0; see {third.directory / 'output-0.txt'})")
    assert ended[grid.runs[3].name] is None


def test_several_ranks_end_together(write: Write, fake: Make) -> None:
    grid = build(write(("dense: [sparsity=null]", "two: [ranks=2]"), ONE_SEED))
    workers_ = fake(grid)
    good, bad = grid.at(("80", "two"))[0], grid.at(("90", "two"))[0]
    workers_.make(bad.name, "crash")
    assert _execute(grid.runs, workers_) == {
        "80-rigl-seed0": None,
        "90-rigl-seed0": None,
        good.name: None,
        bad.name: f"ValueError: too bad (exit code 1; see {bad.directory / 'output-1.txt'})",
    }
    assert {(name, rank) for _, name, rank, _ in workers_.log() if "two" in name} == {
        (name, rank) for name in (good.name, bad.name) for rank in "01"
    }


def test_a_rank_that_hangs_at_its_exit_is_killed(grid: Grid, fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "EXIT_SECONDS", 0.1)
    workers_ = fake(grid)
    hung = workers_.folder / "hung.py"
    hung.write_text("import os, time\nos.close(1)\ntime.sleep(60)\n")
    workers_.command = (*workers_.command[:-1], str(hung))
    (run, *_) = grid.runs
    output = run.directory / "output-0.txt"
    assert _execute([run], workers_) == {run.name: f"no output (hung at its exit; see {output})"}


def test_a_worker_that_does_not_stop_is_killed(grid: Grid, fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    workers_ = fake(grid)
    deaf = workers_.folder / "deaf.py"
    deaf.write_text("import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('on', flush=True)\ntime.sleep(60)\n")
    read, write = os.pipe()
    group = workers.Group(1, 1, write, (*workers_.command[:-1], str(deaf)))
    group.start(grid.runs[0])
    assert group.processes[0].stdout.readline() == "on\n"
    workers.stop_groups([group], 0.1)
    assert group.processes[0].returncode == -signal.SIGKILL
    os.close(read)
    os.close(write)


def test_runs_at_one_time_have_gpus_of_their_own(write: Write, fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = build(write(("dense: [sparsity=null]", "two: [ranks=2]"), ONE_SEED))
    workers_ = fake(grid)
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["4", "5", "6"])
    assert set(_execute(grid.runs, workers_, parallel=4).values()) == {None}
    seen = dict(line.split() for line in (workers_.folder / "gpus").read_text().splitlines())
    assert {seen["80-rigl-seed0"], seen["90-rigl-seed0"]} == {"4", "5"}
    # Two ranks need two that are free: one run after the other, in the place of the workers that nobody needs any more.
    assert len(seen["80-two-seed0"].split(",")) == len(seen["90-two-seed0"].split(",")) == 2
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["4"])
    with pytest.raises(JobError, match=r"two-seed0 is to run on 2 ranks, and this machine has 1 GPUs"):
        _execute(grid.runs, workers_)


def test_zero_3_leaves_its_process(write: Write, fake: Make) -> None:
    stage = ("rigl: [topology.method=rigl]", "rigl: [deepspeed.zero_optimization.stage=3]")
    workers_ = fake(grid := build(write(stage, ONE_SEED)))
    assert set(_execute(grid.runs, workers_).values()) == {None}
    assert len({process for process, *_ in workers_.log()}) == 2  # 80-dense and 80-rigl, then 90-rigl
