"""Small jobs on synthetic shards, run the way people run them: as processes, on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from dst_train.data import eval_loader, write_shards
from dst_train.job import BatchPlan, load
from tests import processes

ROOT = Path(__file__).parents[2]


def count_right(model: nn.Module, path: Path) -> int:
    """Evaluation samples of the job at `path` that the model gets right."""
    job = load(path)
    with torch.no_grad():
        batches = list(eval_loader(job, BatchPlan.of(job, 1), rank=0))
        return sum(int(((model(b.inputs).argmax(1) == b.targets) & b.valid).sum()) for b in batches)


Write = Callable[..., Path]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 train shards of 24 images and one eval shard of 21, of classes that a small model learns in a few steps."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    for prefix, count, per_shard in (("train", 96, 24), ("eval", 21, 21)):
        labels = np.arange(count) % 4
        images = random.integers(0, 60, (count, 28, 28), np.uint8)
        for i, label in enumerate(labels):
            images[i, 7 * label : 7 * label + 7] += 150
        write_shards(folder, prefix, images, labels, per_shard)
    return folder


@pytest.fixture
def write_job(tmp_path: Path, digit_shards: Path) -> Write:
    """Writes job.yaml with a small sparse MLP; keyword `a__b=c` sets key a.b."""

    def write(**changes: Any) -> Path:
        job: dict[str, Any] = {
            "name": "small",
            "run_root": str(tmp_path / "runs"),
            "model": {"builder": "mlp", "in_features": 784, "hidden_features": [64, 64], "num_classes": 4},
            "sparsity": {"rules": [{"match": "layers.*", "sparsity": 0.9}]},
            "topology": {"method": "rigl", "update": {"every": 3, "until": 0.9}},
            "data": {
                "train": {
                    "shards": f"{digit_shards}/train-{{000000..000003}}.tar",
                    "samples": 96,
                    "transform": "digits",
                },
                "eval": {"shards": f"{digit_shards}/eval-000000.tar", "samples": 21, "transform": "digits"},
            },
            "train": {"steps": 20, "batch_size": 16, "micro_batch_size": 4, "precision": "fp32", "clip_grad_norm": 1.0},
            "optimizer": {"lr": 3e-3, "weight_decay": 0.05},
            "schedule": {"warmup_epochs": 0.5},
            "deepspeed": {"zero_optimization": {"stage": 1}},
            "checkpoint": {"every_steps": 100},
            "monitor": {"every_steps": 1},
        }
        for key, value in changes.items():
            *parents, last = key.split("__")
            place = job
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        return path

    return write


@pytest.fixture
def run_job(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs launch/train.py on `ranks` processes, as the launcher would; returns rank 0's, or the first one that failed."""

    def run(
        job: Path, *arguments: str, ranks: int = 2, seconds: float = 180.0, script: Path = ROOT / "launch/train.py"
    ) -> subprocess.CompletedProcess[str]:
        folder, port, context = tmp_path_factory.mktemp("output"), processes.free_port(), processes.context()
        command = ["--job", str(job), *arguments]
        outputs = [(folder / f"stdout{rank}", folder / f"stderr{rank}") for rank in range(ranks)]
        started = []
        for rank in range(ranks):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            process = context.Process(target=processes.run_script, args=(script, command, environment, *outputs[rank]))
            process.start()
            started.append(process)
        try:
            for process in started:
                process.join(seconds)
                assert process.exitcode is not None, f"a rank still runs after {seconds} s"
                if process.exitcode:  # a launcher ends the others
                    for other in started:
                        other.terminate()
        finally:
            for process in started:
                process.kill()
        results = [
            subprocess.CompletedProcess(command, process.exitcode, stdout.read_text(), stderr.read_text())
            for process, (stdout, stderr) in zip(started, outputs, strict=True)
        ]
        return next((r for r in results if r.returncode), results[0])

    return run


@pytest.fixture
def launch_job() -> Run:
    """The command of the README, on two CPU ranks."""

    def launch(job: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        command = [
            "deepspeed",
            "-q",
            "--num_gpus",
            "2",
            "--master_port",
            str(processes.free_port()),
            str(ROOT / "launch/train.py"),
        ]
        return subprocess.run(
            [*command, "--job", str(job), *arguments], env=environment, capture_output=True, text=True, timeout=300
        )

    return launch
