"""What `dst-train report` makes of what runs wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from dst_train.cli import main
from dst_train.job import dump, load

JOB = Path(__file__).parents[2] / "jobs/mlp_digits.yaml"


def _run(folder: Path, *entries: tuple[int, str, float], start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(dump(load(JOB, ["train.epochs=2", "schedule.warmup_epochs=0"])))
    with SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1) as writer:
        for step, tag, value in entries:
            writer.add_scalar(tag, value, step)
    return folder


def test_a_run_and_its_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(
        tmp_path / "a",
        (40, "train/accuracy", 0.5), (40, "train/samples_per_second", 123.44), (40, "eval/loss", 0.5), (40, "eval/accuracy", 0.8),
        (50, "topology/churn", 0.125), (50, "topology/sparsity", 0.9), (50, "topology/sparsity_actual/fc", 0.9004),
        (50, "topology/sparsity_target/fc", 0.9), (50, "topology/churn/fc", 0.125), (50, "topology/mean_age/fc", 31.6),
        (50, "topology/explored/fc", 0.25),
        (60, "train/accuracy", 0.6), (60, "eval/accuracy", 0.99),
    )  # fmt: skip
    (run / "checkpoints").mkdir()
    (run / "checkpoints/latest").write_text("step-00000060")
    # It was killed and continued from step 59: what it wrote of step 60 counts no more.
    _run(run, (80, "train/accuracy", 0.7), (80, "eval/loss", 0.25), (80, "eval/accuracy", 0.75), start=59)
    assert main(["report", str(run)]) == 0
    pad = " " * len(str(run))
    assert capsys.readouterr().out.splitlines() == [
        f"run{pad[3:]}  step      eval/loss  eval/accuracy  best accuracy     sparsity  samples/s  checkpoint",
        f"{run}  80 of 80  0.2500     75.00%         80.00% (step 40)  0.9000    123.4      step-00000060",
        "",
        "after the topology update of step 50, which changed 12.50% of the active units:",
        "",
        "layer  sparsity_actual  sparsity_target  churn   mean_age  explored  uncovered",
        "fc     0.9004           0.9000           12.50%  32        25.00%    -",
    ]


def test_several_runs_are_lines_of_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = _run(tmp_path / "dense", (40, "train/accuracy", 0.5))
    sparse = _run(tmp_path / "sparse", (50, "topology/churn", 0.1), (50, "topology/sparsity_actual/fc", 0.9))
    assert main(["report", str(dense), str(tmp_path), str(sparse)]) == 0
    _, one, two, _, problem = capsys.readouterr().out.splitlines()
    assert problem.startswith(f"{tmp_path}: no run")
    assert one.split() == [str(dense), "40", "of", "80", *"------"]
    assert two.split() == [str(sparse), "0", "of", "80", *"------"]


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}: no run, as it has no job.yaml; name a run directory")
    (tmp_path / "job.yaml").touch()
    assert main(["report", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"{tmp_path}/tensorboard: is not there, as nothing was logged yet or monitor.tensorboard is false\n"
    )
