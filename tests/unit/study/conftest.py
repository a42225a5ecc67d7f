"""A small study as text, results of its runs, and a worker that trains nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dst_train.study import results
from dst_train.study.grid import Grid, Run, build, fingerprint

JOB = """\
name: base
model: {builder: mlp, in_features: 784, hidden_features: [8], num_classes: 4}
sparsity: {rules: [{match: "layers.*", sparsity: 0.9}]}
data:
  train: {shards: "none-{0..1}.tar", samples: 40, transform: digits}
  eval: {shards: none.tar, samples: 20, transform: digits}
train: {steps: 5, batch_size: 4, micro_batch_size: 2}
optimizer: {lr: 1e-3}
"""
STUDY = """\
name: small
run_root: ROOT
job: jobs/base.yaml
seeds: [0, 1, 2]
metric: accuracy
axes:
  sparsity:
    "80": [sparsity.rules.0.sparsity=0.8]
    "90": [sparsity.rules.0.sparsity=0.9]
  method:
    dense: [sparsity=null]
    rigl: [topology.method=rigl]
columns: sparsity
"""
# What stands in $FAKE/<run> is what becomes of the run: a result (with a newline behind it the worker leaves then),
# `crash` of the last rank, `kill`, or `signal N` to the study.
WORKER = """\
import os, pathlib, signal, sys, time
fake, rank = pathlib.Path(os.environ["FAKE"]), os.environ["RANK"]
for line in sys.stdin:
    run = pathlib.Path(line.strip())
    with (fake / "log").open("a") as log:
        print(os.getpid(), run.name, rank, os.environ["OMP_NUM_THREADS"], file=log)
    what = (fake / run.name).read_text()
    with (fake / "gpus").open("a") as log:
        print(run.name, os.environ.get("CUDA_VISIBLE_DEVICES"), file=log)
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    if what == "crash" and int(rank) + 1 == int(os.environ["WORLD_SIZE"]):
        (run / f"output-{rank}.txt").write_text("Traceback\\nValueError: too bad\\n\\n")
        sys.exit(1)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crash":
        time.sleep(60)
    if what.startswith("signal"):
        signal.signal(signal.SIGTERM, lambda *_: ((fake / "stopped").touch(), sys.exit(1)))
        os.kill(os.getppid(), int(what.split()[1]))
        time.sleep(60)
    if rank == "0":
        (run / "result.json").write_text(what)
    print("finished", flush=True)
    if what.endswith("\\n"):
        sys.exit()
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes the study, with a text replaced, and its job; returns the study's path."""

    def write(*changes: tuple[str, str], job: str = JOB) -> Path:
        (tmp_path / "jobs").mkdir(exist_ok=True)
        (tmp_path / "jobs/base.yaml").write_text(job)
        text = STUDY
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "study.yaml"
        path.write_text(text.replace("ROOT", str(tmp_path / "studies")))
        return path

    return write


@pytest.fixture
def grid(write: Callable[..., Path]) -> Grid:
    return build(write())


def result(run: Run, accuracy: float = 0.5, **changes: object) -> results.Result:
    fields = {
        "evaluation": {"loss": 1.0 - accuracy, "accuracy": accuracy},
        "steps": 5,
        "seconds": 10.0,
        "job_digest": fingerprint(run.job),
        "ranks": run.ranks,
        "threads": 1,
        "git": {"revision": "0123456789abcdef", "dirty": False},
        "machine": "a machine",
        "torch": "2.0",
    }
    return results.Result.model_validate({**fields, **changes})


class Fake:
    """A worker's command, what it makes of each run, and what it was asked for."""

    def __init__(self, folder: Path, runs: tuple[Run, ...]) -> None:
        self.folder = folder
        (folder / "worker.py").write_text(WORKER)
        self.command = (sys.executable, "-I", "-S", str(folder / "worker.py"))
        for i, run in enumerate(runs):
            self.make(run.name, result(run, i / 10).model_dump_json())

    def make(self, name: str, what: str) -> None:
        (self.folder / name).write_text(what)

    def log(self) -> list[list[str]]:
        """Process, run, rank and threads of each start."""
        path = self.folder / "log"
        return [line.split() for line in path.read_text().splitlines()] if path.is_file() else []

    def started(self) -> list[str]:
        return [name for _, name, _, _ in self.log()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Grid], Fake]:
    def make(grid: Grid) -> Fake:
        folder = tmp_path / "fake"
        folder.mkdir()
        monkeypatch.setenv("FAKE", str(folder))
        return Fake(folder, grid.runs)

    return make
