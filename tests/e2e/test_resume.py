"""A job stopped and continued equals the job that ran through, to the bit; damaged checkpoints are not trusted."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dst_train.data import write_sequences
from dst_train.engine import load_model
from dst_train.engine import manifest as manifests
from dst_train.monitor import RunDirectory
from tests.e2e.conftest import count_right

ROOT = Path(__file__).parents[2]
STEP_20, STEP_10 = "step-00000020", "step-00000010"


def _content(checkpoint: Path) -> dict[str, Any]:
    """Every tensor and number that DeepSpeed and we wrote, by file and path."""
    found: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}/{key}", inner)
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                walk(f"{path}/{i}", inner)
        elif isinstance(value, torch.Tensor | int | float | bool | str):
            found[path] = value

    for file in sorted(checkpoint.glob("*.pt")):
        walk(file.name, torch.load(file, map_location="cpu", weights_only=False))
    return found


def _assert_equal(left: Path, right: Path) -> None:
    one, other = _content(left), _content(right)
    # Paths and times differ between two runs; everything that training reads does not.
    assert one.keys() == other.keys()
    assert sum(isinstance(v, torch.Tensor) for v in one.values()) > 10
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key] or value != value, key
    facts = [json.loads((p / "manifest.json").read_text()) for p in (left, right)]
    assert facts[0]["topology_digest"] == facts[1]["topology_digest"]


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed__zero_optimization": {"stage": 1}},
        {
            "deepspeed__zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "topology__method": "dynadiag",
        },
        {
            "deepspeed__zero_optimization": {"stage": 2},
            "train__precision": "bf16",
            # From step 12 on: the path starts in the second half.
            "sparsity__low_rank": {"rank": 4, "start": 0.55},
        },
        {
            "deepspeed__zero_optimization": {"stage": 0},
            "sparsity__rules": [{"match": "layers.*", "sparsity": 0.9, "permute": "learned"}],
        },
        {
            "deepspeed__zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "topology": {"method": "dynadiag", "explore": "full", "update": {"every": 3, "until": 0.3}},
        },
    ],
    ids=["zero1", "zero3-dynadiag", "zero2-bf16-low-rank", "zero0-permuted", "zero3-paper"],
)
def test_10_and_10_steps_equal_20_bitwise(
    write_job: Any, run_job: Any, launch_job: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = write_job(name="whole", data__num_workers=0, **changes)
    assert run_job(whole).returncode == 0
    halves = write_job(name="halves", **changes)
    first = run_job(halves, "--stop-at", "10")
    assert first.returncode == 0, first.stderr
    assert "stopped, run the same command to continue at step 10" in first.stdout
    # Once in processes whose hashes of strings are others.
    second = (launch_job if changes.get("topology__method") == "dynadiag" else run_job)(halves)
    assert second.returncode == 0, second.stderr
    assert "resumed" in second.stdout
    runs = tmp_path / "runs"
    _assert_equal(runs / "whole/checkpoints" / STEP_20, runs / "halves/checkpoints" / STEP_20)
    content = _content(runs / "whole/checkpoints" / STEP_20).values()
    # The larger sparse layer is 64 x 784; even all parameters flat in one tensor are fewer than its dense weight has.
    assert max(value.numel() for value in content if isinstance(value, torch.Tensor)) < 64 * 784

    # What people see continues too: each step once, the same numbers, the same topology lines.
    series = {name: _scalars(runs / name, "train/loss") for name in ("whole", "halves")}
    assert [step for step, _ in series["halves"]] == list(range(1, 21))
    assert series["halves"] == series["whole"]
    assert _scalars(runs / "halves", "train/lr") == _scalars(runs / "whole", "train/lr")
    assert (runs / "halves/topology.jsonl").read_text() == (runs / "whole/topology.jsonl").read_text()

    (_, accuracy) = _scalars(runs / "whole", "eval/accuracy")[-1]
    wrong = count_right(load_model(runs / "whole"), whole) - round(accuracy * 21)
    assert abs(wrong) <= ("train__precision" in changes)  # what bf16 rounds may decide for another class


def test_a_language_model_resumes_bitwise(run_job: Any, tmp_path: Path) -> None:
    content = np.random.RandomState(0).randint(97, 101, (39, 17)).astype(np.uint8)
    write_sequences(tmp_path, "s", content, 13)
    split = f"{{shards: '{tmp_path}/s-{{000000..000002}}.tar', samples: 39, transform: next_byte, length: 16}}"
    changes = [
        *("model.args.n_layer=1", "model.args.n_embd=32", "model.args.n_positions=16", "model.args.resid_pdrop=0.1"),
        *(f"data.train={split}", f"data.eval={split}", "train.epochs=null", "train.steps=8", "train.batch_size=8"),
        *("train.micro_batch_size=2", "schedule.warmup_epochs=0.5", "topology.update={every: 3, until: 1.0}"),
        *("monitor.every_steps=1", f"run_root={tmp_path / 'runs'}"),
    ]

    def run(name: str, *arguments: str) -> str:
        overrides = [text for change in (*changes, f"name={name}") for text in ("--set", change)]
        result = run_job(ROOT / "jobs/gpt_stdlib.yaml", *overrides, *arguments)
        assert result.returncode == 0, result.stderr
        assert not result.stderr.strip()
        return result.stdout

    run("whole")
    run("halves", "--stop-at", "4")
    assert "resumed step-00000004 at step 4 of 8" in run("halves")
    whole, halves = tmp_path / "runs/whole", tmp_path / "runs/halves"
    _assert_equal(whole / "checkpoints/step-00000008", halves / "checkpoints/step-00000008")
    assert _scalars(halves, "train/loss") == _scalars(whole, "train/loss")
    assert (halves / "topology.jsonl").read_text() == (whole / "topology.jsonl").read_text() != ""
    (accuracy,) = [value for _, value in _scalars(whole, "eval/accuracy")[-1:]]
    assert accuracy * 39 * 16 == pytest.approx(round(accuracy * 39 * 16), abs=1e-3)  # every token once, padding never


def test_a_job_goes_on_with_other_ranks_micro_batches_and_zero_stages(
    write_job: Any, run_job: Any, tmp_path: Path
) -> None:
    whole = write_job(name="whole", topology__method="dynadiag")
    assert run_job(whole).returncode == 0
    parts = write_job(name="parts", topology__method="dynadiag")
    assert run_job(parts, "--stop-at", "8").returncode == 0
    alone = run_job(parts, "--stop-at", "13", "--set", "train.micro_batch_size=16", ranks=1)
    assert "resuming with train.micro_batch_size: 4 -> 16" in alone.stdout
    assert "ranks: 2 when step-00000008 was written, 1 now; what follows" in alone.stdout
    overrides = ("--set", "deepspeed.zero_optimization.stage=3", "--set", "train.micro_batch_size=2")
    four = run_job(parts, *overrides, ranks=4)
    assert "ranks: 1 when step-00000013 was written, 4 now; what follows" in four.stdout
    runs = tmp_path / "runs"
    series = {name: dict(_scalars(runs / name, "train/loss")) for name in ("whole", "parts")}
    assert series["parts"].keys() == series["whole"].keys() == set(range(1, 21))
    for step, loss in series["whole"].items():  # AdamW divides what sums in another order leave by sqrt(v), 12 times
        assert series["parts"][step] == pytest.approx(loss, rel=1e-4)
    units = []
    for name in ("whole", "parts"):
        lines = [json.loads(line) for line in (runs / name / "topology.jsonl").read_text().splitlines()]
        units.append([(line["step"], line["layer"], line["active"]) for line in lines])
    assert units[0] == units[1] != []
    manifests = [
        json.loads((runs / name / "checkpoints" / STEP_20 / "manifest.json").read_text()) for name in ("whole", "parts")
    ]
    assert manifests[0]["topology_digest"] == manifests[1]["topology_digest"]
    assert count_right(load_model(runs / "parts"), whole) == count_right(load_model(runs / "whole"), whole)


def test_a_finished_job_is_not_done_again(write_job: Any, run_job: Any, tmp_path: Path) -> None:
    job = write_job(train__steps=6, schedule={})
    first, again = run_job(job), run_job(job)
    assert again.returncode == 0, again.stderr
    assert first.stdout.splitlines()[-3:] == again.stdout.splitlines()[-3:]
    assert "accuracy" in again.stdout
    assert [step for step, _ in _scalars(tmp_path / "runs/small", "eval/accuracy")] == [6]
    assert [step for step, _ in _scalars(tmp_path / "runs/small", "train/loss")] == list(range(1, 7))
    without = run_job(job, "--set", "data.eval=null")
    assert "finished at step 6\n" in without.stdout
    shard = yaml.safe_load(job.read_text())["data"]["train"]["shards"].replace("{000000..000003}", "000000")
    other = run_job(job, "--set", f"data.eval.shards={shard}", "--set", "data.eval.samples=24")
    (accuracy,) = re.findall(r"finished at step 6, accuracy (.*)%", other.stdout)
    assert float(accuracy) * 24 / 100 == pytest.approx(round(float(accuracy) * 24 / 100), abs=2e-3)


INTERRUPTED_IN_THE_EVALUATION = f"""
import os, runpy, signal
from dst_train.engine import trainer

evaluate = trainer.evaluate

def interrupted(engine, batches, dtype, stop_requested):
    def begun():
        for batch in batches:
            if os.environ["RANK"] == "1":
                signal.raise_signal(signal.SIGTERM)
            yield batch
    return evaluate(engine, begun(), dtype, stop_requested)

trainer.evaluate = interrupted
runpy.run_path({str(ROOT / "launch/train.py")!r}, run_name="__main__")
"""


@pytest.mark.parametrize("steps", [20, 6], ids=["an epoch's", "the last"])
def test_an_evaluation_that_a_stop_cut_off_is_made_up_for(
    write_job: Any, run_job: Any, tmp_path: Path, steps: int
) -> None:
    whole = run_job(write_job(name="whole", train__steps=steps, schedule={}))
    (tmp_path / "interrupted.py").write_text(INTERRUPTED_IN_THE_EVALUATION)
    halves = write_job(name="halves", train__steps=steps, schedule={})
    first = run_job(halves, script=tmp_path / "interrupted.py")
    assert first.returncode == 0, first.stderr
    assert "stopped, run the same command to continue at step 6\n" in first.stdout
    assert "eval/" not in first.stdout
    second = run_job(halves)
    assert second.returncode == 0, second.stderr
    (finished,) = re.findall(r"finished .*", second.stdout)
    assert finished in whole.stdout
    series = [_scalars(tmp_path / "runs" / name, "eval/loss") for name in ("whole", "halves")]
    assert series[0] == series[1] != []
    if steps == 20:
        paths = (tmp_path / "runs" / name / "checkpoints" / STEP_20 for name in ("whole", "halves"))
        _assert_equal(*paths)


def _scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_two_trainings_of_one_name_do_not_meet(write_job: Any, run_job: Any, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "runs/small").lock():
        result = run_job(write_job())
    assert result.returncode == 2
    assert (
        f"{tmp_path / 'runs/small'} is in use by process {os.getpid()} on {platform.node()}, which trains a job of this name; stop that"
        in result.stderr
    )
    assert {path.name for path in (tmp_path / "runs/small").iterdir()} == {"lock"}


def test_damaged_checkpoints_are_passed_over(write_job: Any, run_job: Any, tmp_path: Path) -> None:
    job = write_job(checkpoint__every_steps=5, checkpoint__keep=2)
    assert run_job(job, "--stop-at", "15").returncode == 0
    checkpoints = tmp_path / "runs/small/checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir() if p.is_dir()) == [STEP_10, "step-00000015"]
    assert (checkpoints / "latest").read_text() == "step-00000015"

    shard = next((checkpoints / "step-00000015").glob("*optim_states.pt"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    result = run_job(job, "--stop-at", "12")
    assert f"{shard.name} does not have the sha256 of the manifest; taking the one before" in result.stdout
    assert "resumed" in result.stdout
    assert "at step 10 of 20" in result.stdout

    for folder in checkpoints.glob("step-*"):
        (folder / "manifest.json").write_text("{")
    result = run_job(job)
    assert result.returncode != 0
    assert "no checkpoint under" in result.stderr
    assert "unreadable manifest" in result.stderr


def test_what_a_checkpoint_means_cannot_be_changed(write_job: Any, run_job: Any, tmp_path: Path) -> None:
    assert run_job(write_job(), "--stop-at", "2").returncode == 0
    changed = run_job(write_job(optimizer__lr=0.1, seed=3), "--stop-at", "3")
    assert changed.returncode == 2
    assert "optimizer.lr: 0.003 -> 0.1; seed: 0 -> 3. Change it back" in changed.stderr
    assert "Traceback" not in changed.stderr
    job_of_the_run = (tmp_path / "runs/small/job.yaml").read_text()
    never = run_job(write_job(checkpoint__resume="never"), "--stop-at", "3")
    assert "already holds step-00000002 and checkpoint.resume is never" in never.stderr
    stage_0 = run_job(write_job(deepspeed__zero_optimization={"stage": 0}), "--stop-at", "3")
    assert "deepspeed.zero_optimization.stage: 1 -> 0. Change it back" in stage_0.stderr
    assert (tmp_path / "runs/small/job.yaml").read_text() == job_of_the_run
    allowed = run_job(write_job(monitor__every_steps=2), "--stop-at", "3")
    assert allowed.returncode == 0
    assert "resuming with monitor.every_steps: 1 -> 2" in allowed.stdout
    manifest = tmp_path / "runs/small/checkpoints/step-00000003/manifest.json"
    facts = {**json.loads(manifest.read_text()), "topology_digest": 64 * "0"}
    del facts["sha256"]
    manifest.write_text(json.dumps({**facts, "sha256": manifests.manifest_digest(facts)}))
    another = run_job(write_job(), "--stop-at", "4")
    assert another.returncode == 2
    assert (
        "step-00000003: the topology that was loaded is not the one that its manifest has the digest of"
        in another.stderr
    )


def test_a_killed_run_continues_from_its_last_checkpoint(write_job: Any, run_job: Any, tmp_path: Path) -> None:
    """SIGKILL leaves a staging directory at worst; SIGTERM to one rank stops all of them with a checkpoint."""
    job = write_job(train__steps=4000, checkpoint__every_steps=5, data__num_workers=1)
    checkpoints = tmp_path / "runs/small/checkpoints"
    command = [sys.executable, str(ROOT / "launch/train.py"), "--job", str(job)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait(lambda: (checkpoints / "latest").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.copytree(checkpoints / (checkpoints / "latest").read_text(), checkpoints / "step-00099999.partial")

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [str(Path(sys.executable).parent / "dst-train"), "run", str(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
        assert "99999" not in line
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped, run the same command to continue" in output


def _wait(condition: Any, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.05)
