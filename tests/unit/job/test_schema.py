"""The surface of a job file: frozen keys, the schema for editors, the jobs that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from dst_train.job import BatchPlan, Job, JobError, load, reference_markdown, schema_json
from dst_train.job.schema import Data, Split
from dst_train.job.validate import _models

JOBS = Path(__file__).parents[3] / "jobs"

# A new key is a promise: add it here on purpose.
KEYS = [
    "name",
    "seed",
    "run_root",
    "model.builder",
    "model.name",
    "model.args",
    "model.in_features",
    "model.hidden_features",
    "model.num_classes",
    "sparsity.budget",
    "sparsity.rules.match",
    "sparsity.rules.pattern",
    "sparsity.rules.sparsity",
    "sparsity.rules.band",
    "sparsity.rules.size",
    "sparsity.rules.permute",
    "sparsity.low_rank.rank",
    "sparsity.low_rank.start",
    "topology.method",
    "topology.update.every",
    "topology.update.until",
    "topology.drop_fraction",
    "topology.grow_signal",
    "topology.gradient_weight",
    "topology.cold_start",
    "topology.gamma_sal",
    "topology.channel_sparsity",
    "topology.explore",
    "topology.alpha_lr",
    "topology.temperature.start",
    "topology.temperature.end",
    "data.train.shards",
    "data.train.samples",
    "data.train.transform",
    "data.train.length",
    "data.eval.shards",
    "data.eval.samples",
    "data.eval.transform",
    "data.eval.length",
    "data.num_workers",
    "data.max_bad_samples",
    "data.cache_dir",
    "data.in_memory",
    "train.epochs",
    "train.steps",
    "train.batch_size",
    "train.micro_batch_size",
    "train.precision",
    "train.clip_grad_norm",
    "train.label_smoothing",
    "train.max_skipped_steps",
    "optimizer.name",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.momentum",
    "schedule.name",
    "schedule.warmup_epochs",
    "schedule.min_lr",
    "deepspeed.zero_optimization.stage",
    "deepspeed.zero_optimization.overlap_comm",
    "deepspeed.zero_optimization.reduce_bucket_size",
    "deepspeed.zero_optimization.allgather_bucket_size",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold",
    "evaluate.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.resume",
    "monitor.tensorboard",
    "monitor.every_steps",
    "monitor.hang_minutes",
]


def _keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in model.model_fields.items():
        inner = _models(field.annotation)
        found |= {key for m in inner for key in _keys(m, f"{prefix}{name}.")} if inner else {f"{prefix}{name}"}
    return found


def test_keys_are_frozen() -> None:
    assert _keys(Job) == set(KEYS)


def test_committed_schema_is_in_sync() -> None:
    assert (JOBS / "schema.json").read_text() == schema_json(), "run: dst-train schema > jobs/schema.json"
    page = (JOBS.parent / "docs" / "job.md").read_text()
    assert page == reference_markdown(), "run: dst-train schema --markdown > docs/job.md"
    missing = [key for key in KEYS if f"| `{key.replace('rules.', 'rules.0.')}` |" not in page]
    assert missing == []


def _files() -> list[Path]:
    return sorted(JOBS.glob("*.yaml"))


def test_jobs_are_found() -> None:
    assert len(_files()) == 8


@pytest.mark.parametrize("path", _files(), ids=lambda p: p.stem)
def test_jobs_load_and_fit_the_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET", "/data")
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert load(path).name
    content = yaml.safe_load(path.read_text().replace("e-3", ".0e-3").replace(".0.0e-3", ".0e-3"))
    jsonschema.validate(content, json.loads(schema_json()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "sede": 1}, json.loads(schema_json()))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"transform": "next_byte"}, "next_byte needs a length.*got transform=next_byte, length=None"),
        ({"transform": "digits", "length": 8}, "no other transform takes one; got transform=digits, length=8"),
    ],
)
def test_only_sequences_have_a_length(split: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Split.model_validate({"shards": "x.tar", "samples": 1, **split})


def test_both_splits_have_one_length() -> None:
    splits = [{"shards": "x.tar", "samples": 1, "transform": "next_byte", "length": n} for n in (8, 9)]
    with pytest.raises(ValidationError, match=r"eval\.length 9 must be train\.length 8"):
        Data.model_validate({"train": splits[0], "eval": splits[1]})


def _job(**train: Any) -> Job:
    return Job.model_validate(
        {
            "name": "test",
            "model": {"builder": "mlp", "in_features": 4, "hidden_features": [3], "num_classes": 2},
            "data": {"train": {"shards": "x.tar", "samples": 1000, "transform": "digits"}},
            "train": {"epochs": 3, "batch_size": 96, "micro_batch_size": 8, **train},
            "optimizer": {"lr": 0.1},
            "schedule": {"warmup_epochs": 0.5},
        }
    )


def test_batch_arithmetic() -> None:
    assert BatchPlan.of(_job(), 4) == BatchPlan(96, 8, 3, 4, 10, 30, 5)
    assert BatchPlan.of(_job(epochs=None, steps=17), 12) == BatchPlan(96, 8, 1, 12, 10, 17, 5)
    assert str(BatchPlan.of(_job(), 4)).startswith(
        "96 samples per step = 8 x 3 accumulated x 4 ranks; 10 steps per epoch, 30 steps"
    )


@pytest.mark.parametrize(
    ("train", "ranks", "message"),
    [
        ({}, 5, "train.batch_size 96 does not divide by 5 ranks; use a multiple of 5, of micro_batch_size x ranks ="),
        (
            {"micro_batch_size": 7},
            4,
            r"micro_batch_size 7 does not divide the 24 samples .* these do: 1, 2, 3, 4, 6, 8, 12, 24$",
        ),
        ({"batch_size": 1008}, 1, "train.batch_size 1008 is larger than data.train.samples 1000"),
        (
            {"batch_size": 10**12 + 1, "micro_batch_size": 2},
            1,
            "train.batch_size 1000000000001 is larger than data.train.samples",
        ),
        ({"epochs": None, "steps": 5}, 1, "schedule.warmup_epochs 0.5 is 5 steps, and the training has only 5"),
    ],
)
def test_batches_that_do_not_work(train: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(JobError, match=message):
        BatchPlan.of(_job(**train), ranks)
