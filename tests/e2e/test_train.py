"""Jobs from YAML to a trained model, through the launcher and on several numbers of ranks."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dst_ops
from dst_train import densify, load_exported, train
from dst_train.cli import main
from dst_train.data import write_shards
from dst_train.engine import load_model
from tests.e2e.conftest import count_right

ROOT = Path(__file__).parents[2]


def _events(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def _scalars(run: Path, tag: str) -> list[float]:
    return [e.value for e in _events(run).Scalars(tag)]


def test_the_launcher_trains_a_job(
    write_job: Any, launch_job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(train__steps=40, evaluate__every_epochs=2, checkpoint__every_steps=15, checkpoint__keep=2)
    result = launch_job(job)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs/small"
    lines = result.stdout.splitlines()
    assert lines[-2:] == [f"run directory: {run}", f"tensorboard --logdir {run / 'tensorboard'}"]
    # One line a step and no other rank's: the libraries are quiet.
    assert sum(line.startswith("step ") and "samples/s" in line for line in lines) == 40
    assert "left" in lines[0]
    assert not result.stderr.strip()

    names = {p.name for p in run.iterdir()}
    assert {
        "job.yaml",
        "ds_config.json",
        "env.json",
        "tensorboard",
        "checkpoints",
        "topology.jsonl",
        "log.txt",
    } <= names
    assert json.loads((run / "ds_config.json").read_text())["train_batch_size"] == 16
    kept = sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())
    assert kept == ["step-00000030", "step-00000040"]

    accuracy = _scalars(run, "eval/accuracy")
    assert len(accuracy) == 4  # 96 / 16 = 6 steps an epoch: after 12, 24, 36 and at the end
    assert accuracy[-1] * 21 == pytest.approx(round(accuracy[-1] * 21), abs=1e-4)  # every sample once, padding never
    assert accuracy[-1] > 0.9
    tags = _events(run).Tags()
    scalars = {"train/loss", "train/accuracy", "train/lr", "train/samples_per_second", "train/step_seconds"}
    layer = {
        f"topology/{what}/layers.0" for what in ("churn", "dropped", "grown", "sparsity_target", "sparsity_actual")
    }
    assert scalars | layer | {"topology/churn", "topology/update_seconds"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"units/layers.0", "units/layers.1"}
    assert _scalars(run, "topology/sparsity_actual/layers.0")[0] == pytest.approx(1 - 78 / 784)
    assert count_right(load_model(run), job) == count_right(densify(load_model(run)), job) == round(accuracy[-1] * 21)

    assert main(["report", str(run)]) == 0
    assert f"40 of 40  {_scalars(run, 'eval/loss')[-1]:.4f}  " in capsys.readouterr().out
    exported = tmp_path / "small.safetensors"
    assert main(["export", str(run), str(exported)]) == 0
    assert capsys.readouterr().out.startswith(f"{exported}: sparse weights of small at step 40, ")
    assert count_right(load_exported(exported), job) == round(accuracy[-1] * 21)
    assert main(["export", str(run), str(exported)]) == 2
    assert capsys.readouterr().err == f"{exported} exists; choose another name, or remove it first\n"
    assert main(["export", str(tmp_path), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"no checkpoint under {tmp_path / 'checkpoints'} can be used\n"


def _updates(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "topology.jsonl").read_text().splitlines()]


def test_the_same_training_on_1_and_2_ranks(write_job: Any, run_job: Any, tmp_path: Path) -> None:
    """The global batch, the losses and the topology do not depend on the number of ranks; accumulation makes up for it."""
    for ranks in (1, 2):
        result = run_job(write_job(name=f"on{ranks}"), ranks=ranks)
        assert result.returncode == 0, result.stderr
    one, two = tmp_path / "runs/on1", tmp_path / "runs/on2"
    updates = [_updates(run) for run in (one, two)]
    margins = [[line.pop(name) for line in lines for name in ("drop_margin", "grow_margin")] for lines in updates]
    assert updates[0] == updates[1] != []
    # A margin is the difference of two scores over one of them, and scores are sums in fp32 of other parts of the batch.
    assert margins[0] == pytest.approx(margins[1], abs=1e-5)
    # fp32 sums in another order, 20 steps.
    assert _scalars(two, "train/loss") == pytest.approx(_scalars(one, "train/loss"), rel=1e-4)
    assert _scalars(two, "eval/accuracy") == _scalars(one, "eval/accuracy")


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_that_is_not_finite_ends_the_job(write_job: Any, run_job: Any, stage: int) -> None:
    job = write_job(deepspeed__zero_optimization={"stage": stage}, optimizer={"name": "sgd", "lr": 1e30}, schedule={})
    result = run_job(job)
    assert result.returncode not in (0, 2)
    assert "NonFiniteError: step" in result.stderr


def test_bad_samples_end_the_job_beyond_the_limit(write_job: Any, run_job: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shards = write_shards(folder, "train", np.zeros((48, 28, 28), np.uint8), np.arange(48) % 4, 24)
    raw = bytearray(shards[0].read_bytes())
    start = raw.index(b"\x89PNG")
    raw[start : start + 4] = b"\x00\x00\x00\x00"
    shards[0].write_bytes(raw)
    train = {"shards": f"{folder}/train-{{000000..000001}}.tar", "samples": 48, "transform": "digits"}
    changes = {"data__train": train, "train__steps": 3, "schedule": {}}
    strict = run_job(write_job(name="strict", **changes), ranks=1)
    assert strict.returncode not in (0, 2)
    assert "train-000000.tar" in strict.stderr
    tolerant = run_job(write_job(name="tolerant", data__max_bad_samples=1, **changes), ranks=1)
    assert tolerant.returncode == 0, tolerant.stderr
    assert "topology rigl: no updates, as every=3 is not below until * total_steps=2" in tolerant.stdout
    assert _scalars(tmp_path / "runs/tolerant", "train/bad_samples")[-1] == 1.0
    twice = run_job(write_job(name="twice", data__max_bad_samples=1, **{**changes, "train__steps": 9}), ranks=1)
    assert "2 samples could not be decoded, data.max_bad_samples allows 1" in twice.stderr


def test_a_bad_job_ends_with_exit_code_2_on_every_rank(write_job: Any, launch_job: Any, tmp_path: Path) -> None:
    result = launch_job(
        write_job(), "--set", "train.micro_batch_size=3", "--set", "sparsity.rules=[{match: x, sparsity: 0.9}]"
    )
    assert result.returncode == 2
    assert result.stderr.count("train.micro_batch_size 3 does not divide the 8 samples") == 1
    assert not (tmp_path / "runs").exists()


def test_a_quicker_rank_does_not_end_the_job_before_another_has_said_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited = []
    monkeypatch.setattr(time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    assert train.refuse(ValueError("no such file"), 0, speaks=True) == 2
    assert (waited, capsys.readouterr().err) == ([], "no such file\n")
    assert train.refuse(ValueError("no such file"), 3, speaks=False) == 2
    assert waited == [(train.PATIENCE, "")]
    assert capsys.readouterr().err == f"rank 3 on {socket.gethostname()}: no such file\n"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_STEP_NUM_TASKS is 2 and RANK is not set: each process would train alone",
        ),
        # The first rank of another node, where a file or a variable may be missing.
        (
            {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "rank 2 on ",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "4"},
            "RANK is set and LOCAL_RANK, MASTER_ADDR, MASTER_PORT not; start ranks with",
        ),
    ],
)
def test_what_is_wrong_with_one_node_is_said_there(write_job: Any, environment: dict[str, str], message: str) -> None:
    command = [sys.executable, str(ROOT / "launch/train.py"), "--job", str(write_job(train__batch_size=15))]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count(message), result.stderr.count("\n")) == (2, 1, 1)


HANGS = f"""
import os, runpy, time
from dst_train.engine import trainer

predict = trainer.predict
calls = []

def waits_for_its_data(*args):
    calls.append(args)
    if os.environ["RANK"] == "0" and len(calls) > 4:  # two of each step
        time.sleep(600)
    return predict(*args)

trainer.predict = waits_for_its_data
runpy.run_path({str(ROOT / "launch/train.py")!r}, run_name="__main__")
"""


def test_a_rank_that_hangs_ends_and_says_where(write_job: Any, run_job: Any, tmp_path: Path) -> None:
    assert dst_ops.load()  # not in the first step
    (tmp_path / "hangs.py").write_text(HANGS)
    result = run_job(write_job(monitor__hang_minutes=0.2), script=tmp_path / "hangs.py")
    assert result.returncode == 1
    assert re.search(r"^rank 0 on \S+: step 3 has not ended after 0\.2 minutes", result.stderr, re.MULTILINE)
    assert "waits_for_its_data" in result.stderr


def test_the_imagenet_job_trains_on_synthetic_shards(tmp_path: Path, run_job: Any) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (8, 256, 256, 3), np.uint8)
    write_shards(tmp_path, "train", images, np.arange(8), 4, image_format="jpeg")
    write_shards(tmp_path, "val", images[:3], np.arange(3), 3, image_format="jpeg")
    changes = {
        "data.train.shards": f"{tmp_path}/train-{{000000..000001}}.tar",
        "data.train.samples": 8,
        "data.eval.shards": f"{tmp_path}/val-000000.tar",
        "data.eval.samples": 3,
        "data.num_workers": 0,
        "train.epochs": "null",
        "train.steps": 3,
        "train.batch_size": 2,
        "train.micro_batch_size": 1,
        "schedule.warmup_epochs": 0,
        "topology.update.every": 2,
        "topology.update.until": 1.0,
        "monitor.every_steps": 1,
        "run_root": tmp_path / "runs",
    }
    overrides = [text for key, value in changes.items() for text in ("--set", f"{key}={value}")]
    result = run_job(ROOT / "jobs/vit_imagenet.yaml", *overrides, seconds=400.0)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs/vit_imagenet_dynadiag90"
    assert all(np.isfinite(_scalars(run, "train/loss")))
    updated = {json.loads(line)["layer"] for line in (run / "topology.jsonl").read_text().splitlines()}
    assert len(updated) == 36
